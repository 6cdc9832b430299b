"""All claims, and the measured values that decide them.

The first contrast of a claim gives its verdict; the others are follow-up questions with their own verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from claims import on_recurrence, on_transformers
from claims.asking import Claim, score
from claims.scale import SCALES, Scale


def claims(scale: Scale) -> tuple[Claim, ...]:
    """All of them, in the order of the page."""
    return (*on_recurrence.claims(scale), *on_transformers.claims(scale))


def evidence(figures: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """All values of a result by name and seed, or round, or 0 where they are exact."""
    values: dict[str, dict[int, float]] = {name: {0: value} for name, value in figures["computed"].items()}
    for name, rounds in figures["speed"].items():
        values[name] = {int(number): value for number, value in rounds.items()}
    for run in figures["runs"]:
        system, seed = run["system"], run["seed"]
        values.setdefault(f"parameters/{system}", {})[seed] = run["training"]["parameters"]
        tests = {"all": run["all"], **run["lengths"]} if "all" in run else {}
        for what, found in tests.items():
            for metric, value in found.items():
                values.setdefault(score(system, what, metric), {})[seed] = value
    return values


def scale_of(figures: Mapping[str, Any]) -> Scale:
    """The scale that a result is of."""
    return SCALES[figures["scale"]]
