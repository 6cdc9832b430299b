"""The Pharaoh format of links, their error rate, and symmetrisation."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise, product

import pytest

from trmt.errors import DataError
from trmt.insight.alignment.symmetrisation import METHODS
from trmt.text.links import (
    AlignmentScore,
    GoldAlignment,
    Links,
    format_links,
    parse_gold,
    parse_links,
    reverse_links,
    score_corpus,
    score_links,
)


def random_links(chooser: random.Random) -> Links:
    size = chooser.randint(1, 7)
    points = [*product(range(size), range(chooser.randint(1, 7)))]
    return frozenset(chooser.sample(points, chooser.randint(0, len(points) // 2)))


def neighbours(point: tuple[int, int]) -> list[tuple[int, int]]:
    return [
        (point[0] + down, point[1] + right)
        for down, right in ((-1, 0), (0, -1), (1, 0), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))
    ]


def textbook_symmetrisation(
    forward: Links, backward: Links, last: Callable[[bool, bool], bool] | None
) -> Links:
    """The pseudocode of textbooks, without any bookkeeping."""
    links = set(forward & backward)

    def unaligned(point: tuple[int, int]) -> tuple[bool, bool]:
        return (point[0] not in {i for i, _ in links}, point[1] not in {j for _, j in links})

    added = True
    while added:
        added = False
        for point in sorted(links):
            for other in neighbours(point):
                if other in forward | backward and other not in links and any(unaligned(other)):
                    links.add(other)
                    added = True
    if last:
        for side in (forward, backward):
            for point in sorted(side):
                if point not in links and last(*unaligned(point)):
                    links.add(point)
    return frozenset(links)


def test_growing_follows_the_textbook() -> None:
    chooser = random.Random(5)
    expected: dict[str, Callable[[bool, bool], bool] | None] = {
        "grow-diag": None,
        "grow-diag-final": lambda one, other: one or other,
        "grow-diag-final-and": lambda one, other: one and other,
    }
    different = set()
    for _ in range(400):
        both = random_links(chooser), random_links(chooser)
        found = {name: method(*both) for name, method in METHODS.items()}
        different.add(len({*found.values()}))
        for name, last in expected.items():
            assert found[name] == textbook_symmetrisation(*both, last)
        for last_name in ("grow-diag-final-and", "grow-diag-final"):
            order = [found[name] for name in ("intersection", "grow-diag", last_name, "union")]
            assert all(fewer <= more for fewer, more in pairwise(order))
    assert 5 in different


def test_a_known_case() -> None:
    forward, backward = parse_links("0-0 1-1 2-3 4-4", where=""), parse_links("0-0 1-2 2-3 3-3 5-6", where="")
    # 1-1 and 1-2 are neighbours of 0-0 and 2-3; 3-3 is one of 2-3 and aligns an unaligned word; 4-4 follows.
    assert format_links(METHODS["grow-diag"](forward, backward)) == "0-0 1-1 1-2 2-3 3-3 4-4"
    assert format_links(METHODS["grow-diag-final-and"](forward, backward)) == "0-0 1-1 1-2 2-3 3-3 4-4 5-6"
    assert format_links(METHODS["intersection"](forward, backward)) == "0-0 2-3"
    assert reverse_links(reverse_links(forward)) == forward != reverse_links(forward)


def test_written_links_are_parsed_again() -> None:
    chooser = random.Random(1)
    for _ in range(50):
        links = random_links(chooser)
        assert parse_links(format_links(links), where="") == links
    assert parse_links("  3-1\t0p0 0-0 ", where="") == {(3, 1), (0, 0)}
    assert format_links([(10, 2), (2, 10), (2, 9)]) == "2-9 2-10 10-2"
    assert parse_gold("0-0 1p2 0p0", where="") == GoldAlignment(
        frozenset({(0, 0)}), frozenset({(0, 0), (1, 2)})
    )


@pytest.mark.parametrize("line", ["0-", "a-b", "1-2-3", "1,2", "-1-2", "0-0 x", "٣-٤", "1" * 50 + "-1"])
def test_an_invalid_link_is_named(line: str) -> None:
    with pytest.raises(DataError, match=r"file\.align, line 7.*is no link"):
        parse_links(line, where="file.align, line 7")


def test_the_error_rate_follows_its_definition() -> None:
    # Och and Ney (2003): A = found, S = sure, P = possible.
    gold = parse_gold("0-0 1-1 2p2 1p2", where="")
    found = parse_links("0-0 2-2 3-3", where="")
    seen = score_links(found, gold)
    assert seen == AlignmentScore(found=3, sure=2, found_sure=1, found_possible=2)
    assert seen.precision == pytest.approx(2 / 3) and seen.recall == pytest.approx(1 / 2)
    assert seen.error_rate == pytest.approx(1 - (1 + 2) / (3 + 2))


def test_counts_add_up_over_pairs() -> None:
    chooser = random.Random(2)
    gold = [
        GoldAlignment(links, links | random_links(chooser))
        for links in (random_links(chooser) for _ in range(9))
    ]
    found = [random_links(chooser) for _ in gold]
    whole = score_corpus(found, gold)
    assert whole == score_corpus(found[:4], gold[:4]) + score_corpus(found[4:], gold[4:])
    assert 0 < whole.error_rate < 1
    assert score_corpus([each.sure for each in gold], gold).error_rate == 0
    assert score_corpus([frozenset()] * 9, gold).error_rate == 1
    only_sure = [GoldAlignment(each.sure, each.sure) for each in gold]
    seen = score_corpus(found, only_sure)
    harmonic = 2 * seen.precision * seen.recall / (seen.precision + seen.recall)
    assert seen.error_rate == pytest.approx(1 - harmonic)
