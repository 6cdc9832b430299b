"""The page of trmt attend in a real browser: what it shows, what keys do, who can use it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import chromium, texts
from tests.fakes import small_network
from tests.scripted import small_tokenizer
from trmt.insight.heatmaps.attending import attend
from trmt.insight.heatmaps.matrix import Choice, Looks, looks, matrix
from trmt.insight.heatmaps.page import About, write

pytestmark = [pytest.mark.slow, chromium.wanted]

HOSTILE = "</script><script>document.title = 'gone'</script><img src=x onerror=\"document.title='gone'\">"
PAIRS = [
    (texts.ENGLISH[0], texts.GERMAN[0]),
    (texts.ALL["ar"][1], texts.ALL["zh"][1]),
    (texts.ALL["zh"][2], texts.ALL["fa"][2]),
    (HOSTILE, HOSTILE),
    (" ".join(texts.ENGLISH[:3] * 2), " ".join(texts.GERMAN[:3] * 2)),
]
# How much red there is in each cell of the matrix: the lightest shade has most, the darkest least.
RED = """(() => {
  const canvas = byId("matrix"), context = canvas.getContext("2d");
  return [...context.getImageData(0, 0, canvas.width, canvas.height).data].filter((_, at) => at % 4 === 0);
})()"""
# The colours of letters, and of what is behind them.
CONTRASTS = """(() => {
  const clear = (each) => /, 0\\)$/.test(getComputedStyle(each).backgroundColor);
  const texts = "h1, h2, p, label, th, dt, li, .column, .row, summary, #rows span, .on";
  return [...document.querySelectorAll(texts)].map((each) => {
    let behind = each;
    while (clear(behind) && behind.parentElement) behind = behind.parentElement;
    const colours = [getComputedStyle(each).color, getComputedStyle(behind).backgroundColor];
    return [...colours, each.outerHTML.slice(0, 80)];
  });
})()"""

# A letter as the page would show it, drawn alone: as a picture in text.
DRAWN = """((letter) => {
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
  context.font = `40px ${getComputedStyle(document.body).fontFamily}`;
  context.fillText(letter, 20, 60);
  return canvas.toDataURL();
})"""


class Shown:
    """The page, the browser it is in, and what its author knows of it."""

    def __init__(self, page: chromium.Page, url: str, known: list[Looks]) -> None:
        self.page, self.url, self.known = page, url, known

    def open(self, address: str = "", **window: Any) -> None:
        self.page.look(**window)
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
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    folder = tmp_path_factory.mktemp("page")
    tokenizer = small_tokenizer(folder / "tokenizer")
    size = tokenizer.source.vocabulary
    net = small_network("transformer", source_vocabulary=size, target_vocabulary=size, longest=400)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    ids = [(tokenizer.source.encode([a])[0], tokenizer.target.encode([b])[0]) for a, b in PAIRS]
    found = attend(net, tokenizer, ids, kinds=("cross", "encoder", "decoder"))
    known = [looks(tokenizer, each) for each in found]
    write(folder / "look.html", known, About("models/<b>: Many to many", ("mul", "mul"), Choice()))
    with chromium.browser(folder / "profile") as page:
        yield Shown(page, (folder / "look.html").as_uri(), known)


@pytest.fixture(autouse=True)
def _without_complaints(browser: Shown) -> Iterator[None]:
    yield
    assert browser.page.complaints() == []
    assert set(browser.page.requests()) <= {browser.url, f"{browser.url}#", "about:blank"}


@pytest.mark.parametrize("sentence", range(len(PAIRS)))
@pytest.mark.parametrize(
    "choice",
    [
        Choice(),
        Choice(layer=2, head=1, by_words=True),
        Choice("encoder", layer=1, by_words=True),
        Choice("decoder", head=2),
    ],
    ids=str,
)
def test_each_cell_is_what_the_network_did(browser: Shown, sentence: int, choice: Choice) -> None:
    unit = "words" if choice.by_words else "pieces"
    browser.open(
        f"sentence={sentence + 1}&kind={choice.kind}&layer={choice.layer}&head={choice.head}&unit={unit}"
    )
    drawn = matrix(browser.known[sentence], choice)
    assert tuple(browser.labels("rows")) == drawn.rows
    columns = browser.labels("columns")
    places = browser.page.eval("[...byId('columns').children].map((each) => parseFloat(each.style.left))")
    in_sight = [label for _, label in sorted(zip(places, columns, strict=True))]
    assert tuple(in_sight) == drawn.columns
    assert (places == sorted(places)) is not drawn.leftward
    cells = browser.page.eval("[...view.cells]")
    weights = torch.tensor(cells).view(len(drawn.rows), len(drawn.columns))
    if drawn.leftward:
        weights = weights.flip(-1)
    torch.testing.assert_close(weights, torch.tensor(drawn.weights), atol=0.01, rtol=0.02)
    # The greater a weight, the darker its pixel.
    red = torch.tensor(browser.page.eval(RED)).view(weights.shape)
    assert (red.flatten()[weights.flatten().argsort()].diff() <= 0).all() and red.min() < 20


def test_keys_walk_through_sentences_heads_and_cells(browser: Shown) -> None:
    page = browser.page
    browser.open("unit=words")
    page.press("Tab")
    assert browser.focused() == "sentences"
    page.press("ArrowDown", times=2)
    page.wait("location.hash.includes('sentence=3')")
    assert tuple(browser.labels("rows")) == matrix(browser.known[2], Choice(by_words=True)).rows
    page.press("Home")
    page.press("Tab")
    assert browser.focused() == "mean of the layers, mean of the heads"
    page.press("ArrowRight", times=2)
    page.press("ArrowDown")
    assert browser.focused() == "layer 1, head 2"
    page.wait("byId('shown').textContent.endsWith('layer 1, head 2')")
    page.press("Tab", times=3)
    assert browser.focused() == "stage"
    page.press("ArrowRight", times=3)
    page.press("ArrowDown", times=2)
    drawn = matrix(browser.known[0], Choice(layer=1, head=2, by_words=True))
    told = re.fullmatch(r"“(.*)” looks at “(.*)”: ([\d.]+)%", browser.text("readout"))
    assert told and (told[1], told[2]) == (drawn.rows[2], drawn.columns[3])
    assert float(told[3]) == pytest.approx(100 * drawn.weights[2][3], abs=1)
    page.press("Tab", shift=True)
    page.press("ArrowLeft")
    page.wait("byId('units').querySelector(':checked').value === 'pieces'")
    page.wait("byId('rows').textContent.includes('\\u2581')")


def test_right_is_right_in_a_sentence_that_runs_from_right_to_left(browser: Shown) -> None:
    browser.open("sentence=2&unit=words")
    drawn = matrix(browser.known[1], Choice(by_words=True))
    browser.page.eval("byId('stage').focus()")
    browser.page.press("ArrowLeft")
    assert f"“{drawn.columns[-2]}”" in browser.text("readout")
    browser.page.press("ArrowRight", times=3)
    assert f"“{drawn.columns[-1]}”" in browser.text("readout")
    assert browser.page.eval("getComputedStyle(byId('running').querySelectorAll('dd')[1]).direction") == "rtl"


@pytest.mark.parametrize("letters", ["文字", "かな", "한글", "אב", "حب", "कख"])
def test_scripts_are_shown_as_letters_and_not_as_boxes(browser: Shown, letters: str) -> None:
    browser.open()
    drawn = {browser.page.eval(f"{DRAWN}({letter!r})") for letter in letters}
    if len(drawn) == 1 and not chromium.NEEDED:
        pytest.skip(f"there is no font with {letters}")
    assert len(drawn) == len(letters)


def test_what_has_the_focus_can_be_seen_and_has_a_name(browser: Shown) -> None:
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
def test_all_text_stands_out_from_what_is_behind_it(browser: Shown, dark: bool) -> None:
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
def test_the_page_fits_into_windows_of_any_width(browser: Shown, width: int) -> None:
    for sentence in (1, 2, 5):
        browser.open(f"sentence={sentence}", width=width, height=700)
        assert browser.page.eval("document.documentElement.scrollWidth <= innerWidth")
        assert browser.page.eval("byId('stage').clientWidth") > min(width, 800) / 4


def test_the_table_names_the_strongest_looks(browser: Shown) -> None:
    browser.open("sentence=1&unit=words&layer=2&head=2")
    browser.page.eval("byId('strongest').open = true")
    browser.page.wait("byId('table').rows.length > 1")
    drawn = matrix(browser.known[0], Choice(layer=2, head=2, by_words=True))
    rows = browser.page.eval(
        "[...byId('table').rows].slice(1).map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    assert [row[0] for row in rows] == list(drawn.rows)
    for (_, found), weights in zip(rows, drawn.weights, strict=True):
        best = max(weights)
        named = found.split(", ")[0].rsplit(" ", 1)
        assert weights[drawn.columns.index(named[0])] == pytest.approx(best, abs=0.01)
        assert float(named[1].rstrip("%")) == pytest.approx(100 * best, abs=1)


def test_hostile_text_is_only_text(browser: Shown) -> None:
    browser.open("sentence=4")
    assert browser.page.eval("document.title") == "models/<b>: Many to many"
    assert browser.page.eval("document.images.length") == 0
    assert HOSTILE in browser.text("sentences")
