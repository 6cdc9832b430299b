"""Attention as text and as pictures: labels, shades, widths, scripts."""

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
from trmt.insight.heatmaps import picture, text
from trmt.insight.heatmaps.attending import Attended
from trmt.insight.heatmaps.matrix import Choice, Looks, Matrix, axis, looks, matrix
from trmt.text.tokenizer import Tokenizer

ARABIC, CHINESE, HEBREW = "مرحبا بالعالم", "今天天气很好，我们去公园吧。", "שלום עולם"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def some_looks(tokenizer: Tokenizer, source: str, target: str, *, layers: int = 3, heads: int = 2) -> Looks:
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
    return looks(tokenizer, Attended(source_ids, target_ids, weights))


# What there is to draw


def test_the_chosen_matrix_is_that_layer_and_head_or_their_mean(tokenizer: Tokenizer) -> None:
    found = some_looks(tokenizer, texts.ENGLISH[0], texts.GERMAN[0])
    weights = found.weights["cross"]
    for choice, expected in (
        (Choice(layer=2, head=1), weights[1, 0]),
        (Choice(layer=3), weights[2].mean(0)),
        (Choice(head=2), weights[:, 1].mean(0)),
        (Choice(), weights.mean((0, 1))),
        (Choice("decoder", layer=1), found.weights["decoder"][0].mean(0)),
    ):
        drawn = matrix(found, choice)
        torch.testing.assert_close(torch.tensor(drawn.weights), expected)
        assert drawn.greatest == pytest.approx(expected.max().item())
        assert drawn.rows == found.axes["target"].pieces
    assert matrix(found, Choice("decoder")).columns == ("<s>", *found.axes["target"].pieces[:-1])


def test_a_source_from_right_to_left_has_its_columns_in_that_order(tokenizer: Tokenizer) -> None:
    found = some_looks(tokenizer, ARABIC, "good day")
    drawn = matrix(found, Choice(layer=1, head=1))
    assert drawn.leftward and drawn.columns == found.axes["source"].pieces[::-1]
    torch.testing.assert_close(torch.tensor(drawn.weights), found.weights["cross"][0, 0].flip(-1))
    assert matrix(found, Choice(by_words=True)).columns == ("</s>", *reversed(ARABIC.split()))


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
def test_words_are_those_that_people_see(tokenizer: Tokenizer, sentence: str, words: list[str]) -> None:
    side = tokenizer.source
    found = axis(side, [*side.encode([sentence])[0], side.eos])
    assert list(found.words) == [*words, "</s>"]
    assert [place for word in found.places for place in word] == list(range(len(found.pieces)))


def test_chinese_is_cut_between_characters(tokenizer: Tokenizer) -> None:
    side = tokenizer.source
    for sentence in (CHINESE, *texts.ALL["zh"]):
        found = axis(side, side.encode([sentence])[0])
        assert "".join(found.words) == side.normalise(sentence).replace(" ", "")
        assert len(found.words) > 3


def test_what_would_steer_a_terminal_is_no_label(tokenizer: Tokenizer) -> None:
    side = tokenizer.source
    found = axis(side, side.encode(["a\x1b[31mb\u202ec\u2028d \x07 e"])[0])
    for label in (*found.words, *found.pieces, found.text):
        assert not {unicodedata.category(character) for character in label} & {"Cc", "Cf", "Zl", "Zp"}


# As text


def plain(matrix: Matrix, width: int = 80, *, coloured: bool = False) -> list[str]:
    drawn = text.rows(matrix, width=width, coloured=coloured)
    return ["".join(part for part, _ in row) for row in drawn]


def columns_of(line: str) -> int:
    """An independent count: what a terminal gives each character."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in line)
    none = sum(unicodedata.category(character) in ("Mn", "Cf") for character in line)
    return len(line) + wide - none


def test_blocks_stand_under_their_words_whatever_their_width(tokenizer: Tokenizer) -> None:
    labels = ("das", "今天天气", "مرحبا", "क्षि", "</s>")
    weights = tuple(tuple(float(row == column) for column in range(5)) for row in range(5))
    head, *rows = plain(Matrix(labels, labels, weights))
    for row, label in zip(rows, labels, strict=True):
        before, blocks = row.index("█"), row.rindex("█")
        assert columns_of(row[:before]) == columns_of(head[: head.index(label)])
        assert blocks - before + 1 >= min(columns_of(label), 3)
        assert label in row[:before]
    assert len(set(map(columns_of, rows))) == 1


@pytest.mark.parametrize("coloured", [True, False])
@pytest.mark.parametrize("width", [30, 60, 100])
def test_no_line_is_wider_than_the_terminal(tokenizer: Tokenizer, width: int, coloured: bool) -> None:
    for source, target in ((texts.ENGLISH[4], CHINESE), (ARABIC * 3, "x" * 50), ("y" * 50, "x")):
        found = some_looks(tokenizer, source, target)
        for by_words in (True, False):
            drawn = matrix(found, Choice(by_words=by_words))
            lines = plain(drawn, width, coloured=coloured)
            assert max(map(columns_of, lines)) <= width
            shown = " ".join(lines)
            assert all(text.fitted(label, text.LABEL) in shown for label in drawn.columns)


def test_shades_grow_with_the_weights_and_numbers_say_them() -> None:
    drawn = Matrix(("a",), ("b", "c", "d", "e"), ((0.0, 0.1, 0.46, 0.5),))
    [row] = text.rows(drawn, width=80, coloured=True)[1:]
    cells = [(part.strip(), shade) for part, shade in row[1:] if part.strip() or shade]
    assert [number for number, _ in cells] == ["10", "46", "50"]
    shades = [shade or 0 for _, shade in cells]
    assert shades == sorted(shades) and shades[-1] == len(text.SHADES) - 1
    [blocks] = plain(drawn)[1:]
    assert blocks.split() == ["a", "░░░", "███", "███"]
    assert "50%" in text.legend(drawn, coloured=False)[0][0]


def test_nothing_at_all_can_be_drawn() -> None:
    drawn = Matrix(("a",), ("b",), ((0.0,),))
    assert len(plain(drawn)) == 2 and text.legend(drawn, coloured=True)


# As a picture


def test_a_svg_holds_its_labels_as_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = some_looks(tokenizer, f"{ARABIC} <b> $x$", CHINESE)
    drawn = matrix(found, Choice(by_words=True))
    picture.write(tmp_path / "look.svg", drawn, title="layer 1 & more")
    tree = ElementTree.parse(tmp_path / "look.svg")
    written = {"".join(node.itertext()).strip() for node in tree.iter("{http://www.w3.org/2000/svg}text")}
    assert {*drawn.rows, *drawn.columns, "layer 1 & more"} <= written
    before = (tmp_path / "look.svg").read_bytes()
    picture.write(tmp_path / "look.svg", drawn, title="layer 1 & more")
    assert (tmp_path / "look.svg").read_bytes() == before


def test_the_colours_of_a_png_follow_the_weights(tmp_path: Path) -> None:
    from matplotlib.image import imread

    drawn = Matrix(("a", "b"), ("c", "d"), ((1.0, 0.0), (0.5, 0.25)))
    axes = picture.figure(drawn, title="").axes[0]
    [image] = axes.images
    assert image.get_array().tolist() == [[1.0, 0.0], [0.5, 0.25]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["c", "d"]
    picture.write(tmp_path / "look.png", drawn, title="t")
    assert imread(tmp_path / "look.png").shape[2] == 4


def test_characters_that_no_font_has_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "_candidates", lambda: ())
    drawn = Matrix(("漢",), (ARABIC, "ᚠ"), ((1.0, 0.0),))
    picture.write(tmp_path / "look.svg", drawn, title="")
    assert capsys.readouterr().err == ""
    picture.write(tmp_path / "look.png", drawn, title="")
    told = capsys.readouterr().err
    assert "漢 (U+6F22)" in told and "ᚠ (U+16A0)" in told and ".html" in told and "U+0645" not in told


def test_fonts_are_looked_for_until_all_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import font_manager

    serif = font_manager.findfont("DejaVu Serif")
    monkeypatch.setattr(picture, "_candidates", lambda: (serif,))
    assert picture.families("abc مرحبا") == (["DejaVu Sans"], [])
    lacking = picture._lacking
    monkeypatch.setattr(
        picture, "_lacking", lambda path, some: ["b"] if "Sans" in path else lacking(path, some)
    )
    assert picture.families("abc") == (["DejaVu Sans", "DejaVu Serif"], [])


def test_an_old_matplotlib_is_said_to_spoil_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    picture._complain("Größe 漢", [], (3, 8))
    picture._complain(ARABIC, [], (3, 11))
    assert capsys.readouterr().err == ""
    for script in (ARABIC, HEBREW, "नमस्ते"):
        picture._complain(script, [], (3, 10))
        assert "upgrade it to 3.11" in capsys.readouterr().err


def test_long_sentences_fit_into_a_picture() -> None:
    many = tuple(map(str, range(260)))
    width, height = picture.figure(Matrix(("a",), many, ((0.0,) * 260,)), title="").get_size_inches()
    assert max(width, height) < 52


def test_without_matplotlib_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TrmtError, match=r"pip install 'trmt\[plot\]'"):
        picture.write(tmp_path / "look.png", Matrix(("a",), ("b",), ((1.0,),)), title="")
    assert not any(tmp_path.iterdir())
