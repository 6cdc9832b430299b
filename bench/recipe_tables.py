"""The tables of short trainings with each recipe, and of pretrained initial weights."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
RECIPES_HEAD = (
    "recipe",
    "changed settings",
    "parameters",
    "steps",
    "seconds",
    "BLEU",
    "chrF",
    "exact matches",
)
STARTS_HEAD = ("initial weights", "BLEU", "chrF", "dev loss")
STARTS = {"chance": "random", "encoder": "pretrained encoder (BERT)"}
USUAL = ("validation.", "batches.passage")  # changed settings that are not shown: they only save time
RENAMED = {"width": "d_model"}  # keys that had other names when they were measured
Row = tuple[str, ...]


def load(name: str) -> dict | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_bytes()) if path.exists() else None


def recipe_rows(result: dict) -> list[Row]:
    """One for each recipe."""
    return [_recipe_row(name, row) for name, row in result["figures"]["rows"].items()]


def _recipe_row(name: str, row: dict) -> Row:
    plan, scores = row["plan"], row["scores"]
    changed = [setting for setting in plan["settings"] if not setting.startswith(USUAL)]
    steps, seconds = f"{row['steps']:,}", f"{row['seconds']:,.0f}"
    if "start" in row:
        steps = f"{row['start']['steps']:,} + {steps}"
        seconds = f"{row['start']['seconds']:,.0f} + {seconds}"
    named = " from ".join(f"`{part}`" for part in name.split(" from "))
    return (
        named + (" (its own task)" if plan["task"] != "phrasebook" else ""),
        ", ".join(_short(setting) for setting in changed) or "nothing",
        f"{row['parameters']:,}",
        steps,
        seconds,
        f"{scores['bleu']['value']:.1f}",
        f"{scores['chrf']['value']:.1f}",
        f"{row['exact'] / row['sentences']:.0%}",
    )


def _short(setting: str) -> str:
    name, _, value = setting.partition("=")
    key = name.rpartition(".")[2]
    return f"`{RENAMED.get(key, key)}` {value}"


def earlier_rows(result: dict) -> list[str]:
    """Where the rows were measured that are not of the newest commit and machine, as sentences."""
    groups: dict[str, list[str]] = {}
    for name, row in result["figures"]["rows"].items():
        groups.setdefault(f"Measured at {row['commit']} on {row['cpu']}", []).append(name)
    groups.pop(f"Measured at {result['commit']} on {result['cpu']}", None)
    return [f"{where}: {', '.join(names)}." for where, names in groups.items()]


def start_rows(result: dict) -> list[Row]:
    """One for each kind of initial weights: the mean of its seeds, the lowest and the highest."""
    return [
        (
            STARTS.get(name, name),
            _spread([seed["scores"]["bleu"]["value"] for seed in seeds], 1),
            _spread([seed["scores"]["chrf"]["value"] for seed in seeds], 1),
            _spread([seed["dev_loss"] for seed in seeds], 3),
        )
        for name, seeds in result["figures"]["starts"].items()
    ]


def _spread(values: list[float], digits: int) -> str:
    low, mean, high = (f"{value:.{digits}f}" for value in (min(values), statistics.mean(values), max(values)))
    return f"{mean} ({low}–{high})"


def signatures(runs: list[dict]) -> list[str]:
    """How the scores of these runs were made, once each."""
    made = {
        f"{score['name']}: `{score['signature']}`": None for run in runs for score in run["scores"].values()
    }
    return list(made)
