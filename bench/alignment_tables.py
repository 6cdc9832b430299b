"""The tables of alignment error rates."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

RESULT = Path(__file__).resolve().parent / "results" / "alignment.json"
KINDS = {
    "counting": "IBM Model 1",
    "plain": "attention, default",
    "chosen": "attention, chosen by agreement with IBM Model 1",
    "guided": "guided attention head, shifted",
}
WAYS = {
    "there": "source to target",
    "back": "target to source",
    "intersection": "intersection",
    "grow-diag-final-and": "grow-diag-final-and",
    "union": "union",
}
NETWORKS = {"plain": "not guided", "guided": "guided"}
HEAD = ("aligner", *WAYS.values(), "precision, recall of the best")
HEADS_HEAD = (
    "network",
    "direction",
    "layer",
    "mean of heads",
    "mean of heads, shifted",
    "best head",
    "best head, shifted",
    "mean of heads against IBM Model 1, test set of the corpus",
)
Row = tuple[str, ...]


def result() -> dict | None:
    return json.loads(RESULT.read_bytes()) if RESULT.exists() else None


def rows(found: dict) -> list[Row]:
    """The alignment error rates of each aligner."""
    figures = found["figures"]
    made = []
    for kind, name in KINDS.items():
        known = figures[kind]
        rates = [f"{known[way]['aer']:.3f}" if way in known else "" for way in WAYS]
        best = min((known[way] for way in WAYS if way in known), key=lambda each: each["aer"])
        made.append((name, *rates, f"{best['precision']:.3f}, {best['recall']:.3f}"))
    return made


def head_rows(found: dict) -> list[Row]:
    """The error rates of every layer in both directions."""
    return [
        (name, WAYS[way], *row)
        for kind, name in NETWORKS.items()
        for way, choices in found["figures"][kind]["looks"].items()
        for row in layer_rows(choices)
    ]


def layer_rows(choices: list[dict]) -> Iterable[Row]:
    for layer in sorted({choice["layer"] for choice in choices}):
        [mean] = [
            choice
            for choice in choices
            if (choice["layer"], choice["head"], choice["shift"]) == (layer, None, 0)
        ]
        rates = [*(least(choices, layer, *cell) for cell in CELLS), mean["test_from_counting"]]
        yield (str(layer), *(f"{rate:.3f}" for rate in rates))


CELLS = [(mean, shift) for mean in (True, False) for shift in (0, 1)]


def least(choices: list[dict], layer: int, mean: bool, shift: int) -> float:
    """The lowest error rate of a layer's mean, or of its heads."""
    wanted = (layer, mean, shift)
    return min(
        choice["aer"]
        for choice in choices
        if (choice["layer"], choice["head"] is None, choice["shift"]) == wanted
    )


def chosen(found: dict) -> str:
    """What choosing by IBM Model 1 instead of gold links costs, in a sentence."""
    parts = []
    for choices in found["figures"]["plain"]["looks"].values():
        counted, best = (min(choices, key=lambda choice: choice[by]) for by in ("from_counting", "aer"))
        parts.append(f"{named(counted)}, {counted['aer']:.3f} (by gold {named(best)}, {best['aer']:.3f})")
    return (
        "Of the unguided network's layers and heads, IBM Model 1 agrees best with "
        f"{'; in the other direction with '.join(parts)}."
    )


def named(choice: dict) -> str:
    """A head or the mean of a layer, in words."""
    head = "the mean" if choice["head"] is None else f"head {choice['head'] + 1}"
    return f"{head} of layer {choice['layer']}{', shifted' if choice['shift'] else ''}"


def made_with(found: dict) -> str:
    """The data and the networks of the measurement, in sentences."""
    known = found["figures"]["made_with"]
    source, target = known["languages"]
    text = (
        f"{known['gold_pairs']} gold pairs from {source} to {target}. IBM Model 1 was trained on "
        f"{known['pairs']:,} other pairs, and on the same pairs `{known['recipe']}` with "
        f"{known['pieces']:,} pieces for {known['steps']:,} steps ({known['target_tokens']:,} target tokens; "
        f"{', '.join(f'`{each}`' for each in known['settings'])}); the guided network has "
        f"`loss.alignment_weight={known['weight']}`."
    )
    scores = [
        f"{name} {' and '.join(f'{value:.1f}' for value in found['figures'][kind]['bleu'].values())}"
        for kind, name in NETWORKS.items()
    ]
    return f"{text} BLEU on a test set of the corpus, in both directions: {', '.join(scores)}."
