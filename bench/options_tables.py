"""The table of short trainings with each option of the Transformer."""

from __future__ import annotations

import json
from pathlib import Path

PATH = Path(__file__).resolve().parent / "results" / "options.json"
HEAD = ("option", "BLEU", "loss, nats per token")
NAMES = {
    "base": "none (sinusoidal positions, pre-norm LayerNorm, 4 heads)",
    "none": "`transformer-no-positions`",
    "learned": '`positions = "learned"`',
    "complex": "`transformer-complex`",
    "rotary": '`positions = "rotary"`',
    "relative": "`transformer-relative`",
    "t5": "`transformer-t5`",
    "alibi": "`transformer-alibi`",
    "sinusoidal-beside": "`transformer-concatenated`",
    "learned-beside": '`transformer-concatenated`, `positions = "learned"`',
    "post": '`norm_position = "post"`',
    "rms": '`norm = "rms"`',
    "batch": "`transformer-batch-norm`",
    "no-residual": "`transformer-no-residual`",
    "no-scale": "`transformer-unscaled`",
    "one-head": "`heads = 1`",
    "sixteen-heads": "`heads = 16`",
    "same": "`transformer-same-layer`",
    "gumbel": "`transformer-hard`",
    "sampled": '`transformer-hard`, `cross_attention = "sampled"`',
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
