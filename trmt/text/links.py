"""Which word translates which, as other programs write it, and how far that is from what people found.

A line of `i-j` says that word i of the source and word j of the target belong together, both counted from 0
(the format of Pharaoh). Gold lines also have `ipj` for links that are possible but not sure. How good links
are is the alignment error rate of Och and Ney (2003).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trmt.errors import DataError

Links = frozenset[tuple[int, int]]  # (source word, target word)

NOTHING: Links = frozenset()
# Marks of links that are only possible, in the gold files that are about.
POSSIBLE = "p?:"
LINK = re.compile(rf"([0-9]{{1,9}})([-{POSSIBLE}])([0-9]{{1,9}})")


@dataclass(frozen=True)
class Gold:
    """What people found for a pair; sure links are possible ones too."""

    sure: Links
    possible: Links


@dataclass(frozen=True)
class Agreement:
    """How links agree with gold: counts, which add up over pairs."""

    found: int = 0
    sure: int = 0
    found_sure: int = 0
    found_possible: int = 0

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.found + other.found,
            self.sure + other.sure,
            self.found_sure + other.found_sure,
            self.found_possible + other.found_possible,
        )

    @property
    def precision(self) -> float:
        """The part of the links found that is possible; of none, all."""
        return self.found_possible / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        """The part of the sure links that was found."""
        return self.found_sure / self.sure if self.sure else 1.0

    @property
    def error_rate(self) -> float:
        """1 - (|found and sure| + |found and possible|) / (|found| + |sure|)."""
        total = self.found + self.sure
        return 1 - (self.found_sure + self.found_possible) / total if total else 0.0


def agreement(found: Links, gold: Gold) -> Agreement:
    """How the links of one pair agree with gold."""
    return Agreement(
        len(found), len(gold.sure), len(found & gold.sure), len(found & (gold.possible | gold.sure))
    )


def written(links: Iterable[tuple[int, int]]) -> str:
    """A line of links, in order."""
    return " ".join(f"{source}-{target}" for source, target in sorted(links))


def parsed(line: str, *, where: str) -> Links:
    """The links of a line, possible ones included; anything else is an error that begins with `where`."""
    gold = parsed_gold(line, where=where)
    return gold.sure | gold.possible


def parsed_gold(line: str, *, where: str) -> Gold:
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
    return Gold(frozenset(sure), frozenset(sure | possible))


def check_range(links: Links, pair: tuple[str, str], *, where: str) -> None:
    """Refuse links of words that a pair does not have: they are of other text, or of the other direction."""
    counts = [len(text.split()) for text in pair]
    for link in sorted(links):
        if link[0] >= counts[0] or link[1] >= counts[1]:
            raise DataError(
                f"{where}: {written([link])} is beyond the {counts[0]} and {counts[1]} words of the pair; "
                "check that both are of the same text, source first"
            )


def turned(links: Links) -> Links:
    """The same links seen from the other side."""
    return frozenset((target, source) for source, target in links)


def judged(found: Sequence[Links], gold: Sequence[Gold]) -> Agreement:
    """How the links of all pairs agree with gold; both are equally many."""
    return sum((agreement(*pair) for pair in zip(found, gold, strict=True)), Agreement())
