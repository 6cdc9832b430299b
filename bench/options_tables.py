"""The table of short trainings with each option of the Transformer."""

from __future__ import annotations

import json
from pathlib import Path

PATH = Path(__file__).resolve().parent / "results" / "options.json"
HEAD = ("option", "BLEU", "loss, nats per token")
NAMES = {
    "base": "none (sinusoidal positions, pre-norm LayerNorm, 4 heads)",
    "none": '`positions = "none"`',
    "learned": '`positions = "learned"`',
    "complex": '`positions = "complex"`',
    "rotary": '`positions = "rotary"`',
    "relative": '`positions = "relative"`',
    "t5": '`positions = "t5"`',
    "alibi": '`positions = "alibi"`',
    "sinusoidal-beside": '`position_join = "concatenate"`',
    "learned-beside": '`position_join = "concatenate"`, `positions = "learned"`',
    "post": '`norm_place = "post"`',
    "rms": '`norm = "rms"`',
    "batch": '`norm = "batch"`',
    "no-residual": "`residual = false`",
    "no-scale": "`score_scale = false`",
    "one-head": "`heads = 1`",
    "sixteen-heads": "`heads = 16`",
    "same": '`cross_source = "same"`',
    "gumbel": '`cross_focus = "gumbel"`',
    "sampled": '`cross_focus = "sampled"`',
}


def result() -> dict | None:
    return json.loads(PATH.read_bytes()) if PATH.exists() else None


def rows(measured: dict) -> list[tuple[str, ...]]:
    """One for each option."""
    found = measured["figures"]["options"]
    return [
        (title, f"{found[name]['bleu']:.1f}", f"{found[name]['loss']:.2f}")
        if name in found
        else (title, "pending", "")
        for name, title in NAMES.items()
    ]
