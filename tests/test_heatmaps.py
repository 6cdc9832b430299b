"""Attention maps as text and as figures: labels, shades, widths, scripts."""

from __future__ import annotations

import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from tests import texts
from tests.scripted import small_tokenizer
from trmt.errors import TrmtError
from trmt.insight.heatmaps import figure, terminal
from trmt.insight.heatmaps.maps import (
    AttentionMap,
    AttentionMaps,
    MapChoice,
    attention_maps,
    axis_labels,
    choose_map,
)
from trmt.insight.heatmaps.weights import AttentionWeights
from trmt.text.tokenizer import Tokenizer

ARABIC, CHINESE, HEBREW = "مرحبا بالعالم", "今天天气很好，我们去公园吧。", "שלום עולם"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def random_maps(
    tokenizer: Tokenizer, source: str, target: str, *, layers: int = 3, heads: int = 2
) -> AttentionMaps:
    """Random weights for a pair."""
    eos = tokenizer.target.eos
    ids = [
        (*side.encode([line])[0], eos)
        for side, line in ((tokenizer.source, source), (tokenizer.target, target))
    ]
    source_ids, target_ids = ids
    generator = torch.Generator().manual_seed(1)
    sizes = {"cross": (len(target_ids), len(source_ids)), "decoder": (len(target_ids),) * 2}
    weights = {
        kind: torch.rand(layers, heads, *size, generator=generator).softmax(-1)
        for kind, size in sizes.items()
    }
    return attention_maps(tokenizer, AttentionWeights(source_ids, target_ids, weights))


# Choosing a map


def test_the_chosen_map_is_that_of_a_layer_and_head_or_their_mean(tokenizer: Tokenizer) -> None:
    found = random_maps(tokenizer, texts.ENGLISH[0], texts.GERMAN[0])
    weights = found.weights["cross"]
    for choice, expected in (
        (MapChoice(layer=2, head=1), weights[1, 0]),
        (MapChoice(layer=3), weights[2].mean(0)),
        (MapChoice(head=2), weights[:, 1].mean(0)),
        (MapChoice(), weights.mean((0, 1))),
        (MapChoice("decoder", layer=1), found.weights["decoder"][0].mean(0)),
    ):
        drawn = choose_map(found, choice)
        torch.testing.assert_close(torch.tensor(drawn.weights), expected)
        assert drawn.max_weight == pytest.approx(expected.max().item())
        assert drawn.rows == found.axes["target"].pieces
    assert choose_map(found, MapChoice("decoder")).columns == ("<s>", *found.axes["target"].pieces[:-1])


def test_the_display_width_a_right_to_left_source_are_reversed(tokenizer: Tokenizer) -> None:
    found = random_maps(tokenizer, ARABIC, "good day")
    drawn = choose_map(found, MapChoice(layer=1, head=1))
    assert drawn.right_to_left and drawn.columns == found.axes["source"].pieces[::-1]
    torch.testing.assert_close(torch.tensor(drawn.weights), found.weights["cross"][0, 0].flip(-1))
    assert choose_map(found, MapChoice(by_words=True)).columns == ("</s>", *reversed(ARABIC.split()))


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ('"We won\'t be late," she said.', ['"', "We", "won't", "be", "late", ",", '"', "she", "said", "."]),
        ("At 7:45 … yes", ["At", "7:45", "…", "yes"]),
        (HEBREW, HEBREW.split()),
        ("漢字と kana 한국어 텍스트", ["漢", "字", "と", "kana", "한국어", "텍스트"]),
        ("", []),
    ],
)
def test_punctuation_and_unspaced_characters_are_words(
    tokenizer: Tokenizer, sentence: str, words: list[str]
) -> None:
    side = tokenizer.source
    found = axis_labels(side, [*side.encode([sentence])[0], side.eos])
    assert list(found.words) == [*words, "</s>"]
    assert [position for word in found.word_pieces for position in word] == list(range(len(found.pieces)))


def test_chinese_is_split_between_characters(tokenizer: Tokenizer) -> None:
    side = tokenizer.source
    for sentence in (CHINESE, *texts.ALL["zh"]):
        found = axis_labels(side, side.encode([sentence])[0])
        assert "".join(found.words) == side.normalise(sentence).replace(" ", "")
        assert len(found.words) > 3


def test_labels_contain_no_control_characters(tokenizer: Tokenizer) -> None:
    side = tokenizer.source
    found = axis_labels(side, side.encode(["a\x1b[31mb\u202ec\u2028d \x07 e"])[0])
    for label in (*found.words, *found.pieces, found.text):
        assert not {unicodedata.category(character) for character in label} & {"Cc", "Cf", "Zl", "Zp"}


# As text


def plain(drawn: AttentionMap, width: int = 80, *, coloured: bool = False) -> list[str]:
    rows = terminal.rows(drawn, width=width, coloured=coloured)
    return ["".join(text for text, _ in row) for row in rows]


def display_width(line: str) -> int:
    """An independent count of the terminal columns of each character."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in line)
    none = sum(unicodedata.category(character) in ("Mn", "Cf") for character in line)
    return len(line) + wide - none


def test_blocks_are_aligned_with_their_labels_whatever_their_width(tokenizer: Tokenizer) -> None:
    labels = ("das", "今天天气", "مرحبا", "क्षि", "</s>")
    weights = tuple(tuple(float(row == column) for column in range(5)) for row in range(5))
    head, *rows = plain(AttentionMap(labels, labels, weights))
    for row, label in zip(rows, labels, strict=True):
        before, blocks = row.index("█"), row.rindex("█")
        assert display_width(row[:before]) == display_width(head[: head.index(label)])
        assert blocks - before + 1 >= min(display_width(label), 3)
        assert label in row[:before]
    assert len(set(map(display_width, rows))) == 1


@pytest.mark.parametrize("coloured", [True, False])
@pytest.mark.parametrize("width", [30, 60, 100])
def test_no_line_is_wider_than_the_terminal(tokenizer: Tokenizer, width: int, coloured: bool) -> None:
    for source, target in ((texts.ENGLISH[4], CHINESE), (ARABIC * 3, "x" * 50), ("y" * 50, "x")):
        found = random_maps(tokenizer, source, target)
        for by_words in (True, False):
            drawn = choose_map(found, MapChoice(by_words=by_words))
            lines = plain(drawn, width, coloured=coloured)
            assert max(map(display_width, lines)) <= width
            shown = " ".join(lines)
            assert all(terminal.truncate(label, terminal.MAX_LABEL) in shown for label in drawn.columns)


def test_shades_follow_the_weights_and_numbers_give_them() -> None:
    drawn = AttentionMap(("a",), ("b", "c", "d", "e"), ((0.0, 0.1, 0.46, 0.5),))
    [row] = terminal.rows(drawn, width=80, coloured=True)[1:]
    cells = [(part.strip(), shade) for part, shade in row[1:] if part.strip() or shade]
    assert [number for number, _ in cells] == ["10", "46", "50"]
    shades = [shade or 0 for _, shade in cells]
    assert shades == sorted(shades) and shades[-1] == len(terminal.SHADES) - 1
    [blocks] = plain(drawn)[1:]
    assert blocks.split() == ["a", "░░░", "███", "███"]
    assert "50%" in terminal.legend(drawn, coloured=False)[0][0]


def test_a_map_of_zeros_can_be_drawn() -> None:
    drawn = AttentionMap(("a",), ("b",), ((0.0,),))
    assert len(plain(drawn)) == 2 and terminal.legend(drawn, coloured=True)


# As a figure


def test_an_svg_contains_its_labels_as_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = random_maps(tokenizer, f"{ARABIC} <b> $x$", CHINESE)
    drawn = choose_map(found, MapChoice(by_words=True))
    figure.write_figure(tmp_path / "map.svg", drawn, title="layer 1 & more")
    tree = ElementTree.parse(tmp_path / "map.svg")
    written = {"".join(node.itertext()).strip() for node in tree.iter("{http://www.w3.org/2000/svg}text")}
    assert {*drawn.rows, *drawn.columns, "layer 1 & more"} <= written
    before = (tmp_path / "map.svg").read_bytes()
    figure.write_figure(tmp_path / "map.svg", drawn, title="layer 1 & more")
    assert (tmp_path / "map.svg").read_bytes() == before


def test_the_colours_of_a_png_follow_the_weights(tmp_path: Path) -> None:
    from matplotlib.image import imread

    drawn = AttentionMap(("a", "b"), ("c", "d"), ((1.0, 0.0), (0.5, 0.25)))
    axes = figure.draw_figure(drawn, title="").axes[0]
    [image] = axes.images
    assert image.get_array().tolist() == [[1.0, 0.0], [0.5, 0.25]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["c", "d"]
    figure.write_figure(tmp_path / "map.png", drawn, title="t")
    assert imread(tmp_path / "map.png").shape[2] == 4


def test_characters_without_a_font_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure, "_candidates", lambda: ())
    drawn = AttentionMap(("漢",), (ARABIC, "ᚠ"), ((1.0, 0.0),))
    figure.write_figure(tmp_path / "map.svg", drawn, title="")
    assert capsys.readouterr().err == ""
    figure.write_figure(tmp_path / "map.png", drawn, title="")
    err = capsys.readouterr().err
    assert "漢 (U+6F22)" in err and "ᚠ (U+16A0)" in err and ".html" in err and "U+0645" not in err


def test_fonts_are_added_until_every_character_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import font_manager

    serif = font_manager.findfont("DejaVu Serif")
    monkeypatch.setattr(figure, "_candidates", lambda: (serif,))
    assert figure.font_families("abc مرحبا") == (["DejaVu Sans"], [])
    missing = figure._missing
    monkeypatch.setattr(
        figure, "_missing", lambda path, some: ["b"] if "Sans" in path else missing(path, some)
    )
    assert figure.font_families("abc") == (["DejaVu Sans", "DejaVu Serif"], [])


def test_an_old_matplotlib_gives_a_warning_for_complex_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    figure._warn_about_text("Größe 漢", [], (3, 8))
    figure._warn_about_text(ARABIC, [], (3, 11))
    assert capsys.readouterr().err == ""
    for script in (ARABIC, HEBREW, "नमस्ते"):
        figure._warn_about_text(script, [], (3, 10))
        assert "upgrade it to 3.11" in capsys.readouterr().err


def test_long_sentences_fit_into_a_figure() -> None:
    many = tuple(map(str, range(260)))
    width, height = figure.draw_figure(
        AttentionMap(("a",), many, ((0.0,) * 260,)), title=""
    ).get_size_inches()
    assert max(width, height) < 52


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TrmtError, match=r"pip install 'trmt\[plot\]'"):
        figure.write_figure(tmp_path / "map.png", AttentionMap(("a",), ("b",), ((1.0,),)), title="")
    assert not any(tmp_path.iterdir())
