"""The tables of how far links of words are from those that people found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

RESULT = Path(__file__).resolve().parent / "results" / "alignment.json"
KINDS = {
    "counting": "counting",
    "plain": "attention, the default look",
    "chosen": "attention, the look that agrees best with counting",
    "guided": "a head that was taught, one step later",
}
WAYS = {
    "there": "source to target",
    "back": "target to source",
    "intersection": "intersection",
    "grow-diag-final-and": "grow-diag-final-and",
    "union": "union",
}
NETWORKS = {"plain": "as it is", "guided": "taught"}
HEAD = ("links from", *WAYS.values(), "precision, recall of the best")
LOOK_HEAD = (
    "network",
    "direction",
    "layer",
    "its heads' mean",
    "a step later",
    "its best head",
    "a step later",
    "its heads' mean, against counting, on a test of the corpus",
)
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
    """The error rates of every layer, from source to target and back."""
    return [
        (name, WAYS[way], *row)
        for kind, name in NETWORKS.items()
        for way, looks in found["figures"][kind]["looks"].items()
        for row in layer_rows(looks)
    ]


def layer_rows(looks: list[dict]) -> Iterable[Row]:
    for layer in sorted({look["layer"] for look in looks}):
        [mean] = [look for look in looks if (look["layer"], look["head"], look["shift"]) == (layer, None, 0)]
        rates = [*(least(looks, layer, *cell) for cell in CELLS), mean["test_from_counting"]]
        yield (str(layer), *(f"{rate:.3f}" for rate in rates))


CELLS = [(mean, shift) for mean in (True, False) for shift in (0, 1)]


def least(looks: list[dict], layer: int, mean: bool, shift: int) -> float:
    """The least error of a layer's mean, or of its heads."""
    wanted = (layer, mean, shift)
    return min(
        look["aer"] for look in looks if (look["layer"], look["head"] is None, look["shift"]) == wanted
    )


def chosen(found: dict) -> str:
    """What choosing by counting costs against choosing by gold, in a sentence."""
    parts = []
    for looks in found["figures"]["plain"]["looks"].values():
        counted, best = (min(looks, key=lambda look: look[by]) for by in ("from_counting", "aer"))
        parts.append(f"{told(counted)}, {counted['aer']:.3f} (by gold {told(best)}, {best['aer']:.3f})")
    return f"Of the looks of the network as it is, counting agrees best with {'; back, '.join(parts)}."


def told(look: dict) -> str:
    head = "the mean" if look["head"] is None else f"head {look['head'] + 1}"
    return f"{head} of layer {look['layer']}{', a step later' if look['shift'] else ''}"


def made_with(found: dict) -> str:
    """On what the figures were measured, in sentences."""
    known = found["figures"]["made_with"]
    source, target = known["languages"]
    text = (
        f"{known['gold_pairs']} pairs of gold from {source} to {target}; counted in {known['pairs']:,} other "
        f"pairs, on which `{known['recipe']}` was trained with {known['pieces']:,} pieces for "
        f"{known['steps']:,} steps ({known['target_tokens']:,} target tokens; "
        f"{', '.join(f'`{each}`' for each in known['settings'])}), taught with a weight of {known['weight']}."
    )
    scores = [
        f"{name} {' and back '.join(f'{value:.1f}' for value in found['figures'][kind]['bleu'].values())}"
        for kind, name in NETWORKS.items()
    ]
    return f"{text} BLEU on a test of the corpus: {', '.join(scores)}."
