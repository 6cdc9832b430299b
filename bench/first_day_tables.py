"""The table of trainings with every default, by the size of the corpus."""

from __future__ import annotations

import json
from pathlib import Path

from trmt.console import duration

RESULTS = Path(__file__).resolve().parent / "results"
HEAD = (
    "corpus",
    "pairs",
    "vocabulary",
    "recipe",
    "planned, at most",
    "steps taken",
    "planned for these",
    "measured",
    "best dev chrF",
    "test chrF",
    "test BLEU",
)
Row = tuple[str, ...]


def result() -> dict | None:
    path = RESULTS / "first-day.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def rows(found: dict) -> list[Row]:
    """One for each size that has been measured."""
    return [_row(row) for row in found["figures"]["rows"].values()]


def planned_seconds(plan: dict, steps: int) -> float:
    """The time of so many steps and their validations, as planned."""
    validations = -(-steps // plan["every"])
    return steps * plan["seconds_per_step"] + validations * plan["seconds_per_validation"]


def measured_seconds(row: dict) -> float:
    """The time of all steps and validations."""
    return row["training"]["seconds"] + row["training"]["validation_seconds"]


def _row(row: dict) -> Row:
    plan, steps, best = row["plan"], row["training"]["steps"], row["best"]["chrf"]
    scores = row["scores"]
    return (
        row["corpus"],
        f"{row['pairs']:,}",
        f"{plan['vocabulary']:,}",
        f"`{plan['recipe']}`",
        duration(planned_seconds(plan, plan["steps"])),
        f"{steps:,} of {plan['steps']:,}",
        duration(planned_seconds(plan, steps)),
        duration(measured_seconds(row)) + (" (machine shared)" if row["shared"] else ""),
        f"{best['value']:.1f} at step {best['step']:,}",
        f"{scores['chrf']['value']:.1f}",
        f"{scores['bleu']['value']:.1f}",
    )
