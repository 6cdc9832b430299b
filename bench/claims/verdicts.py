"""The rule for verdicts: confirmed, not confirmed or cannot tell, from an interval over seeds or rounds.

A contrast is a weighted sum of measured values, computed for each seed, so that what the systems of a seed
have in common (data, order) cancels out. From its values follows a 95 % confidence interval of the mean
(Student's t). With m the smallest difference that matters,

    more   confirmed if the interval is above 0, not confirmed if it is below m
    same   confirmed if the interval is within -m and m, not confirmed if it does not overlap with that

and everything else is "cannot tell". An exact value is its own interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

CONFIRMED, NOT_CONFIRMED, CANNOT_TELL, PENDING = "confirmed", "not confirmed", "cannot tell", "pending"
LEAST = 3  # seeds or rounds that a verdict needs
# Student's t for 1, 2, ... degrees of freedom, 97.5 %.
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
LITTLE = 0.1  # replaces smaller scores in ratios
Values = Mapping[int, float]  # by seed or round; 0 stands for an exact value
Evidence = Mapping[str, Values]


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A question that measured values decide."""

    asks: str
    terms: tuple[tuple[float, str], ...]  # weights and names of values
    expects: Literal["more", "same"] = "more"
    margin: float  # the smallest difference that matters
    unit: str  # "times": logarithms of the values are taken, and the result is a factor
    at_least: float = 0.0  # the threshold of "more"


@dataclass(frozen=True)
class Judged:
    """A verdict and its values."""

    verdict: str
    values: tuple[float, ...] = ()
    mean: float | None = None
    low: float | None = None
    high: float | None = None


def judged(contrast: Contrast, evidence: Evidence) -> Judged:
    """The verdict on a contrast; pending with too few values."""
    values = values_of(contrast, evidence)
    exact = all(set(evidence.get(name, {})) == {0} for _, name in contrast.terms)
    if not values or (len(values) < LEAST and not exact):
        return Judged(PENDING, tuple(values))
    mean, low, high = interval(values)
    shown = [_shown(contrast, value) for value in (mean, low, high)]
    return Judged(_verdict(contrast, low, high), tuple(_shown(contrast, value) for value in values), *shown)


def values_of(contrast: Contrast, evidence: Evidence) -> list[float]:
    """The sum of the terms for every seed that has all values."""
    found = [evidence.get(name, {}) for _, name in contrast.terms]
    seeds = sorted(set.intersection(*(set(values) for values in found)))
    take = _logarithm if contrast.unit == "times" else float
    return [
        sum(weight * take(values[seed]) for (weight, _), values in zip(contrast.terms, found, strict=True))
        for seed in seeds
    ]


def _logarithm(value: float) -> float:
    return math.log(max(value, LITTLE))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95 % interval; of a single value, that value."""
    mean = fmean(values)
    if len(values) == 1:
        return mean, mean, mean
    degrees = min(len(values) - 1, len(STUDENT))
    half = STUDENT[degrees - 1] * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def _verdict(contrast: Contrast, low: float, high: float) -> str:
    margin, least = contrast.margin, contrast.at_least
    if contrast.unit == "times":
        margin = math.log(margin)
        least = math.log(least) if least else 0.0
    if contrast.expects == "more":
        if low > least:
            return CONFIRMED
        return NOT_CONFIRMED if high < least + margin else CANNOT_TELL
    if -margin <= low and high <= margin:
        return CONFIRMED
    return NOT_CONFIRMED if low > margin or high < -margin else CANNOT_TELL


def _shown(contrast: Contrast, value: float) -> float:
    return math.exp(value) if contrast.unit == "times" else value


def as_tree(judged: Judged) -> dict[str, Any]:
    """For a result file."""
    numbers = {
        name: None if value is None else float(f"{value:.5g}")
        for name, value in (("mean", judged.mean), ("low", judged.low), ("high", judged.high))
    }
    return {
        "verdict": judged.verdict,
        "values": [float(f"{value:.5g}") for value in judged.values],
        **numbers,
    }
