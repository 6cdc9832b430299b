"""The program that measures links of words: both directions are score_corpus by the same gold."""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Sequence
from pathlib import Path

import pytest

import alignment
import alignment_tables
from trmt.insight.alignment.aligners import HeadOptions, SymmetrisedAligner, TextPair
from trmt.text.lines import read_lines
from trmt.text.links import GoldAlignment, Links, parse_gold, parse_links, reverse_links, score_corpus

LOOKS = [
    {"layer": 1, "head": None, "shift": 0, "aer": 0.5, "from_counting": 0.4, "test_from_counting": 0.1},
    {"layer": 1, "head": 0, "shift": 0, "aer": 0.3, "from_counting": 0.6},
    {"layer": 1, "head": 1, "shift": 0, "aer": 0.6, "from_counting": 0.7},
    {"layer": 2, "head": None, "shift": 0, "aer": 0.7, "from_counting": 0.5, "test_from_counting": 0.2},
    {"layer": 2, "head": 1, "shift": 1, "aer": 0.4, "from_counting": 0.2},
]


class First:
    """Links every word to the first one."""

    languages, truncated = ("de", "en"), 0

    def links(self, pairs: Sequence[TextPair]) -> list[Links]:
        return [frozenset((0, word) for word in range(len(target.split()))) for _, target in pairs]


@pytest.fixture
def given(tmp_path: Path) -> argparse.Namespace:
    texts = {
        "gold.de": "das 's\nja\n",
        "gold.en": "that 's it\nyes\n",
        "gold.align": "0-0 0p2 1-1\n0-0\n",
        "test.de": "Ja, ja.\n",
        "test.en": "Yes.\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    places = {"gold": tmp_path / "gold", "test": tmp_path / "test", "work": tmp_path}
    return argparse.Namespace(source="de", target="en", **places)


def read(path: Path) -> list[GoldAlignment]:
    return [parse_gold(line, where="here") for line in read_lines(path)]


def test_both_directions_have_the_same_gold(given: argparse.Namespace) -> None:
    counting = SymmetrisedAligner(First(), First(), "union")
    ways = alignment.directions(given, counting)
    there, back = (ways[way] for way in ("there", "back"))
    assert there.gold.pairs == [("das &apos;s", "that &apos;s it"), ("ja", "yes")]
    assert there.test.pairs == [("ja , ja .", "yes .")]
    for one, other in ((there.gold, back.gold), (there.counted, back.counted), (there.test, back.test)):
        assert other.pairs == [pair[::-1] for pair in one.pairs]
    for one, other in zip(read(there.gold.links), read(back.gold.links), strict=True):
        assert (reverse_links(one.sure), reverse_links(one.possible)) == (other.sure, other.possible)
    for one, other in ((there.counted, back.counted), (there.test, back.test)):
        found = [parse_links(line, where="here") for line in read_lines(one.links)]
        assert found == counting.links(one.pairs)
        assert [parse_links(line, where="here") for line in read_lines(other.links)] == list(
            map(reverse_links, found)
        )
    aligners = {"there": First(), "back": First()}
    rates = alignment.rates(aligners, ways)
    assert rates["back"] == alignment.figures_of(
        score_corpus(First().links(back.gold.pairs), read(back.gold.links))
    )
    assert rates["union"]["links"] == 5 and rates["intersection"]["links"] == 2


def test_the_look_is_chosen_without_gold() -> None:
    assert alignment.chosen_look(LOOKS) == HeadOptions(layer=2, head=2, shift=True)
    assert alignment.chosen_look(LOOKS[:4]) == HeadOptions(layer=1, shift=False)


def test_a_layer_is_shown_by_its_mean_and_its_best_head() -> None:
    full = [{**look, "shift": shift} for look in LOOKS for shift in (0, 1)]
    assert list(alignment_tables.layer_rows(full)) == [
        ("1", "0.500", "0.500", "0.300", "0.300", "0.100"),
        ("2", "0.700", "0.700", "0.400", "0.400", "0.200"),
    ]
    text = alignment_tables.chosen({"figures": {"plain": {"looks": {"there": LOOKS}}}})
    assert "head 2 of layer 2, shifted, 0.400 (by gold head 1 of layer 1, 0.300)" in text
