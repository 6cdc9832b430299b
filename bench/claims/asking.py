"""Claims as contrasts of measured values, which are named as in `sayings.evidence`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from claims.verdicts import Contrast

BLEU = 2.0  # points: with so few steps, a smaller difference does not matter
TIMES = 1.1  # the same for speed, as a factor


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the literature."""

    name: str
    title: str
    says: str
    source: str
    contrasts: tuple[Contrast, ...]
    figure: str = ""  # the name of the figure that shows it
    note: str = ""  # an explanation that does not depend on the result
    begins_with: str = ""  # the system that initialises the others, whose own loss is reported


def score(system: str, what: str = "all", metric: str = "bleu") -> str:
    """The name of a score: on all test sets of lengths in training, or on one test set."""
    return f"{metric}/{system}/{what}"


def difference(
    asks: str, more: str, less: str, *, what: str = "all", expects: Any = "more", margin: float = BLEU
) -> Contrast:
    """The difference in BLEU of two systems."""
    return Contrast(
        asks=asks,
        terms=((1, score(more, what)), (-1, score(less, what))),
        expects=expects,
        margin=margin,
        unit="BLEU",
    )


def keeps(asks: str, more: str, less: str, *, short: str, long: str) -> Contrast:
    """The ratio of the shares of BLEU that two systems keep from short to long examples."""
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
    """A product of rates or sizes, with weights as exponents."""
    return Contrast(asks=asks, terms=terms, expects=expects, margin=margin, unit="times", at_least=at_least)


def exact(asks: str, name: str, *, within: float) -> Contrast:
    """Whether a computed difference is only rounding."""
    return Contrast(asks=asks, terms=((1, name),), expects="same", margin=within, unit="")
