"""The tables of how far links of words are from those that people found."""

from __future__ import annotations

import json
from pathlib import Path

RESULT = Path(__file__).resolve().parent / "results" / "alignment.json"
KINDS = {
    "counting": "counting",
    "plain": "attention, last layer, mean of its heads",
    "guided": "a head that was taught, one step later",
}
WAYS = {
    "there": "source to target",
    "back": "target to source",
    "intersection": "intersection",
    "grow-diag-final-and": "grow-diag-final-and",
    "union": "union",
}
HEAD = ("links from", *WAYS.values(), "precision, recall of the best")
LOOK_HEAD = ("network", "layer", "its heads' mean", "a step later", "its best head", "a step later")
Row = tuple[str, ...]


def result() -> dict | None:
    return json.loads(RESULT.read_bytes()) if RESULT.exists() else None


def rows(found: dict) -> list[Row]:
    """The alignment error rates of each kind of links."""
    figures = found["figures"]
    made = []
    for kind, name in KINDS.items():
        known = figures[kind]
        rates = [f"{known[way]['aer']:.3f}" if way in known else "" for way in WAYS]
        best = min((known[way] for way in WAYS if way in known), key=lambda each: each["aer"])
        made.append((name, *rates, f"{best['precision']:.3f}, {best['recall']:.3f}"))
    return made


def look_rows(found: dict) -> list[Row]:
    """The error rates of every layer from source to target."""
    made = []
    for kind in ("plain", "guided"):
        looks = found["figures"][kind]["looks"]
        for layer in sorted({look["layer"] for look in looks}):
            rates = [
                min(
                    look["aer"]
                    for look in looks
                    if (look["layer"], look["shift"], look["head"] is None) == (layer, shift, mean)
                )
                for mean in (True, False)
                for shift in (0, 1)
            ]
            made.append((kind, str(layer), *(f"{rate:.3f}" for rate in rates)))
    return made


def made_with(found: dict) -> str:
    """On what the figures were measured, in a sentence."""
    known = found["figures"]["made_with"]
    source, target = known["languages"]
    return (
        f"{known['gold_pairs']} pairs of gold from {source} to {target}; counted in {known['pairs']:,} other "
        f"pairs, on which `{known['recipe']}` was trained for {known['steps']:,} steps "
        f"({known['target_tokens']:,} target tokens), taught with a weight of {known['weight']}."
    )
