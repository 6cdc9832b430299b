"""The page of trmt attend in a real browser: contents, keys, accessibility."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import chromium, texts
from tests.fakes import small_network
from tests.scripted import small_tokenizer
from trmt.insight.heatmaps.maps import AttentionMaps, MapChoice, attention_maps, choose_map
from trmt.insight.heatmaps.page import PageInfo, write_page
from trmt.insight.heatmaps.weights import attention_weights

pytestmark = [pytest.mark.slow, chromium.wanted]

HOSTILE = "</script><script>document.title = 'gone'</script><img src=x onerror=\"document.title='gone'\">"
PAIRS = [
    (texts.ENGLISH[0], texts.GERMAN[0]),
    (texts.ALL["ar"][1], texts.ALL["zh"][1]),
    (texts.ALL["zh"][2], texts.ALL["fa"][2]),
    (HOSTILE, HOSTILE),
    (" ".join(texts.ENGLISH[:3] * 2), " ".join(texts.GERMAN[:3] * 2)),
]
# The red channel of each cell of the matrix: highest in the lightest shade, lowest in the darkest.
RED = """(() => {
  const canvas = byId("matrix"), context = canvas.getContext("2d");
  return [...context.getImageData(0, 0, canvas.width, canvas.height).data].filter((_, at) => at % 4 === 0);
})()"""
# The colours of text and of its background.
CONTRASTS = """(() => {
  const clear = (each) => /, 0\\)$/.test(getComputedStyle(each).backgroundColor);
  const texts = "h1, h2, p, label, th, dt, li, .column, .row, summary, #rows span, .selected";
  return [...document.querySelectorAll(texts)].map((each) => {
    let behind = each;
    while (clear(behind) && behind.parentElement) behind = behind.parentElement;
    const colours = [getComputedStyle(each).color, getComputedStyle(behind).backgroundColor];
    return [...colours, each.outerHTML.slice(0, 80)];
  });
})()"""

# A letter in the font of the page, drawn alone, as a data URL.
DRAWN = """((letter) => {
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
  context.font = `40px ${getComputedStyle(document.body).fontFamily}`;
  context.fillText(letter, 20, 60);
  return canvas.toDataURL();
})"""


class ShownPage:
    """The page in a browser, and the maps it was made from."""

    def __init__(self, page: chromium.Page, url: str, known: list[AttentionMaps]) -> None:
        self.page, self.url, self.known = page, url, known

    def open(self, address: str = "", **window: Any) -> None:
        self.page.resize(**window)
        self.page.open(f"{self.url}#{address}")
        self.page.wait("byId('readout').textContent !== ''")

    def text(self, name: str) -> str:
        found: str = self.page.eval(f"byId({name!r}).textContent")
        return found

    def labels(self, side: str) -> list[str]:
        found: list[str] = self.page.eval(f"[...byId({side!r}).children].map((each) => each.textContent)")
        return found

    def focused(self) -> str:
        found: str = self.page.eval("document.activeElement.id || document.activeElement.ariaLabel || ''")
        return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShownPage]:
    folder = tmp_path_factory.mktemp("page")
    tokenizer = small_tokenizer(folder / "tokenizer")
    size = tokenizer.source.vocabulary
    net = small_network("transformer", source_vocabulary=size, target_vocabulary=size, max_positions=400)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    ids = [(tokenizer.source.encode([a])[0], tokenizer.target.encode([b])[0]) for a, b in PAIRS]
    found = attention_weights(net, tokenizer, ids, kinds=("cross", "encoder", "decoder"))
    known = [attention_maps(tokenizer, each) for each in found]
    write_page(folder / "page.html", known, PageInfo("models/<b>: Many to many", ("mul", "mul"), MapChoice()))
    with chromium.browser(folder / "profile") as page:
        yield ShownPage(page, (folder / "page.html").as_uri(), known)


@pytest.fixture(autouse=True)
def _without_errors(browser: ShownPage) -> Iterator[None]:
    yield
    assert browser.page.errors() == []
    assert set(browser.page.requests()) <= {browser.url, f"{browser.url}#", "about:blank"}


@pytest.mark.parametrize("sentence", range(len(PAIRS)))
@pytest.mark.parametrize(
    "choice",
    [
        MapChoice(),
        MapChoice(layer=2, head=1, by_words=True),
        MapChoice("encoder", layer=1, by_words=True),
        MapChoice("decoder", head=2),
    ],
    ids=str,
)
def test_each_cell_shows_the_weight_of_the_network(
    browser: ShownPage, sentence: int, choice: MapChoice
) -> None:
    unit = "words" if choice.by_words else "pieces"
    browser.open(
        f"sentence={sentence + 1}&kind={choice.kind}&layer={choice.layer}&head={choice.head}&unit={unit}"
    )
    drawn = choose_map(browser.known[sentence], choice)
    assert tuple(browser.labels("rows")) == drawn.rows
    columns = browser.labels("columns")
    positions = browser.page.eval("[...byId('columns').children].map((each) => parseFloat(each.style.left))")
    displayed = [label for _, label in sorted(zip(positions, columns, strict=True))]
    assert tuple(displayed) == drawn.columns
    assert (positions == sorted(positions)) is not drawn.right_to_left
    cells = browser.page.eval("[...view.cells]")
    weights = torch.tensor(cells).view(len(drawn.rows), len(drawn.columns))
    if drawn.right_to_left:
        weights = weights.flip(-1)
    torch.testing.assert_close(weights, torch.tensor(drawn.weights), atol=0.01, rtol=0.02)
    # The higher a weight, the darker its pixel.
    red = torch.tensor(browser.page.eval(RED)).view(weights.shape)
    assert (red.flatten()[weights.flatten().argsort()].diff() <= 0).all() and red.min() < 20


def test_keys_move_through_sentences_heads_and_cells(browser: ShownPage) -> None:
    page = browser.page
    browser.open("unit=words")
    page.press("Tab")
    assert browser.focused() == "sentences"
    page.press("ArrowDown", times=2)
    page.wait("location.hash.includes('sentence=3')")
    assert tuple(browser.labels("rows")) == choose_map(browser.known[2], MapChoice(by_words=True)).rows
    page.press("Home")
    page.press("Tab")
    assert browser.focused() == "mean of the layers, mean of the heads"
    page.press("ArrowRight", times=2)
    page.press("ArrowDown")
    assert browser.focused() == "layer 1, head 2"
    page.wait("byId('map-title').textContent.endsWith('layer 1, head 2')")
    page.press("Tab", times=3)
    assert browser.focused() == "grid"
    page.press("ArrowRight", times=3)
    page.press("ArrowDown", times=2)
    drawn = choose_map(browser.known[0], MapChoice(layer=1, head=2, by_words=True))
    readout = re.fullmatch(r"“(.*)” attends to “(.*)”: ([\d.]+)%", browser.text("readout"))
    assert readout and (readout[1], readout[2]) == (drawn.rows[2], drawn.columns[3])
    assert float(readout[3]) == pytest.approx(100 * drawn.weights[2][3], abs=1)
    page.press("Tab", shift=True)
    page.press("ArrowLeft")
    page.wait("byId('units').querySelector(':checked').value === 'pieces'")
    page.wait("byId('rows').textContent.includes('\\u2581')")


def test_arrow_keys_follow_the_screen_in_right_to_left_sentences(browser: ShownPage) -> None:
    browser.open("sentence=2&unit=words")
    drawn = choose_map(browser.known[1], MapChoice(by_words=True))
    browser.page.eval("byId('grid').focus()")
    browser.page.press("ArrowLeft")
    assert f"“{drawn.columns[-2]}”" in browser.text("readout")
    browser.page.press("ArrowRight", times=3)
    assert f"“{drawn.columns[-1]}”" in browser.text("readout")
    assert browser.page.eval("getComputedStyle(byId('texts').querySelectorAll('dd')[1]).direction") == "rtl"


@pytest.mark.parametrize("letters", ["文字", "かな", "한글", "אב", "حب", "कख"])
def test_letters_of_all_scripts_are_shown(browser: ShownPage, letters: str) -> None:
    browser.open()
    drawn = {browser.page.eval(f"{DRAWN}({letter!r})") for letter in letters}
    if len(drawn) == 1 and not chromium.NEEDED:
        pytest.skip(f"there is no font with {letters}")
    assert len(drawn) == len(letters)


def test_focused_elements_are_visible_and_named(browser: ShownPage) -> None:
    browser.open()
    for _ in range(6):
        browser.page.press("Tab")
        style = browser.page.eval(
            "(({outlineStyle: kind, outlineWidth: width}) => [kind, width])"
            "(getComputedStyle(document.activeElement))"
        )
        assert style[0] == "solid" and float(style[1].removesuffix("px")) >= 2, browser.focused()
    nodes = browser.page.call("Accessibility.getFullAXTree")["nodes"]
    for node in nodes:
        focusable = {"name": "focusable", "value": {"type": "booleanOrUndefined", "value": True}}
        if focusable in node.get("properties", []) and node["role"]["value"] != "RootWebArea":
            assert node["name"]["value"], node
    assert {"listbox", "grid", "application", "radio"} <= {
        node["role"]["value"] for node in nodes if not node["ignored"]
    }


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_has_enough_contrast(browser: ShownPage, dark: bool) -> None:
    browser.open("sentence=1&layer=1&head=1&unit=words", dark=dark)
    rgb = r"rgba?\((\d+), (\d+), (\d+)"
    page = colours(browser.page.eval("getComputedStyle(document.body).backgroundColor"), rgb)
    assert (luminance(page) < 0.2) is dark
    pairs = browser.page.eval(CONTRASTS)
    assert len(pairs) > 30
    for letters, behind, what in pairs:
        one, other = luminance(colours(letters, rgb)), luminance(colours(behind, rgb))
        assert (max(one, other) + 0.05) / (min(one, other) + 0.05) >= 4.5, (letters, behind, what)


def colours(style: str, pattern: str) -> list[float]:
    found = re.match(pattern, style)
    assert found, style
    return [int(part) / 255 for part in found.groups()]


def luminance(colour: list[float]) -> float:
    """As the Web Content Accessibility Guidelines define it."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_the_page_fits_into_windows_of_any_width(browser: ShownPage, width: int) -> None:
    for sentence in (1, 2, 5):
        browser.open(f"sentence={sentence}", width=width, height=700)
        assert browser.page.eval("document.documentElement.scrollWidth <= innerWidth")
        assert browser.page.eval("byId('grid').clientWidth") > min(width, 800) / 4


def test_the_table_lists_the_highest_weights(browser: ShownPage) -> None:
    browser.open("sentence=1&unit=words&layer=2&head=2")
    browser.page.eval("byId('highest').open = true")
    browser.page.wait("byId('table').rows.length > 1")
    drawn = choose_map(browser.known[0], MapChoice(layer=2, head=2, by_words=True))
    rows = browser.page.eval(
        "[...byId('table').rows].slice(1).map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    assert [row[0] for row in rows] == list(drawn.rows)
    for (_, found), weights in zip(rows, drawn.weights, strict=True):
        best = max(weights)
        named = found.split(", ")[0].rsplit(" ", 1)
        assert weights[drawn.columns.index(named[0])] == pytest.approx(best, abs=0.01)
        assert float(named[1].rstrip("%")) == pytest.approx(100 * best, abs=1)


def test_hostile_text_stays_text(browser: ShownPage) -> None:
    browser.open("sentence=4")
    assert browser.page.eval("document.title") == "models/<b>: Many to many"
    assert browser.page.eval("document.images.length") == 0
    assert HOSTILE in browser.text("sentences")
