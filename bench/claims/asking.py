"""How claims are asked: contrasts of measured values, by names that `sayings.evidence` knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from claims.verdicts import Contrast

BLEU = 2.0  # points: with so few steps, less than this is not worth talking about
TIMES = 1.1  # the same of speed, as a factor


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What people repeat."""

    name: str
    title: str
    says: str
    source: str
    contrasts: tuple[Contrast, ...]
    figure: str = ""  # the name of the picture it is shown in
    note: str = ""  # what is true whatever comes out
    begins_with: str = ""  # the system that others begin with, whose own loss is told


def score(system: str, what: str = "all", metric: str = "bleu") -> str:
    """The name of a score: on all test sets that are no longer than training, or on one of them."""
    return f"{metric}/{system}/{what}"


def difference(
    asks: str, more: str, less: str, *, what: str = "all", expects: Any = "more", margin: float = BLEU
) -> Contrast:
    """How much more BLEU the first system has than the second."""
    return Contrast(
        asks=asks,
        terms=((1, score(more, what)), (-1, score(less, what))),
        expects=expects,
        margin=margin,
        unit="BLEU",
    )


def keeps(asks: str, more: str, less: str, *, short: str, long: str) -> Contrast:
    """How many times as large a share of its BLEU the first keeps, from short to long examples."""
    terms = (
        (1, score(more, long)),
        (-1, score(more, short)),
        (-1, score(less, long)),
        (1, score(less, short)),
    )
    return times(asks, *terms)


def times(
    asks: str, *terms: tuple[float, str], expects: Any = "more", margin: float = TIMES, at_least: float = 1.0
) -> Contrast:
    """A product of rates or sizes, each to the power of its weight."""
    return Contrast(asks=asks, terms=terms, expects=expects, margin=margin, unit="times", at_least=at_least)


def exact(asks: str, name: str, *, within: float) -> Contrast:
    """Whether a computed difference is nothing but rounding."""
    return Contrast(asks=asks, terms=((1, name),), expects="same", margin=within, unit="")
