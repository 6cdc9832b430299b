"""Word alignments in Pharaoh format, and the alignment error rate of Och and Ney (2003).

A link `i-j` aligns word i of the source with word j of the target, both counted from 0; a line holds the
links of one pair. In gold alignments `ipj` is a link that is possible but not sure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trmt.errors import DataError

Links = frozenset[tuple[int, int]]  # (source word, target word)

NO_LINKS: Links = frozenset()
POSSIBLE = "p?:"  # the separators of possible links in the gold files in use
LINK = re.compile(rf"([0-9]{{1,9}})([-{POSSIBLE}])([0-9]{{1,9}})")


@dataclass(frozen=True)
class GoldAlignment:
    """The manual alignment of a pair; sure links are possible ones too."""

    sure: Links
    possible: Links


@dataclass(frozen=True)
class AlignmentScore:
    """Counts of links compared with a gold alignment, which add up over pairs."""

    found: int = 0
    sure: int = 0
    found_sure: int = 0
    found_possible: int = 0

    def __add__(self, other: AlignmentScore) -> AlignmentScore:
        return AlignmentScore(
            self.found + other.found,
            self.sure + other.sure,
            self.found_sure + other.found_sure,
            self.found_possible + other.found_possible,
        )

    @property
    def precision(self) -> float:
        """The share of the found links that are possible; 1 without any."""
        return self.found_possible / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        """The share of the sure links that were found."""
        return self.found_sure / self.sure if self.sure else 1.0

    @property
    def error_rate(self) -> float:
        """1 - (|found and sure| + |found and possible|) / (|found| + |sure|)."""
        total = self.found + self.sure
        return 1 - (self.found_sure + self.found_possible) / total if total else 0.0


def score_links(found: Links, gold: GoldAlignment) -> AlignmentScore:
    """The links of one pair compared with its gold alignment."""
    return AlignmentScore(
        len(found), len(gold.sure), len(found & gold.sure), len(found & (gold.possible | gold.sure))
    )


def score_corpus(found: Sequence[Links], gold: Sequence[GoldAlignment]) -> AlignmentScore:
    """The links of all pairs compared with their gold alignments."""
    return sum((score_links(*pair) for pair in zip(found, gold, strict=True)), AlignmentScore())


def format_links(links: Iterable[tuple[int, int]]) -> str:
    """A line of links in Pharaoh format, sorted."""
    return " ".join(f"{source}-{target}" for source, target in sorted(links))


def parse_links(line: str, *, where: str) -> Links:
    """The links of a line, possible ones included; anything else is an error that begins with `where`."""
    gold = parse_gold(line, where=where)
    return gold.sure | gold.possible


def parse_gold(line: str, *, where: str) -> GoldAlignment:
    """The sure and the possible links of a line."""
    sure: set[tuple[int, int]] = set()
    possible: set[tuple[int, int]] = set()
    for word in line.split():
        match = LINK.fullmatch(word)
        if not match:
            raise DataError(
                f"{where}: {word!r} is no link; write i-j for word i of the source and j of the target, "
                "counted from 0"
            )
        (sure if match[2] == "-" else possible).add((int(match[1]), int(match[3])))
    return GoldAlignment(frozenset(sure), frozenset(sure | possible))


def check_range(links: Links, pair: tuple[str, str], *, where: str) -> None:
    """Refuse links of words that a pair does not have: they are of other text or of the other direction."""
    counts = [len(text.split()) for text in pair]
    for link in sorted(links):
        if link[0] >= counts[0] or link[1] >= counts[1]:
            raise DataError(
                f"{where}: {format_links([link])} is beyond the {counts[0]} and {counts[1]} words of the "
                "pair; check that both are of the same text, source first"
            )


def reverse_links(links: Links) -> Links:
    """The links of the other direction: from target to source."""
    return frozenset((target, source) for source, target in links)
