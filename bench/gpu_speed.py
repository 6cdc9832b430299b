"""The speed of training on a GPU, row by row of `gpu_suite.py`: one row of `bench/train.py` each.

    python bench/gpu_speed.py train-base --work FOLDER [--device cuda]

train-base, train-big     target tokens per second, share of the card's products, memory, wait for the loader
train-deterministic       the base network with and without training.deterministic, in turn
train-peers               the base network by whichever other toolkit this Python has, in turn with trmt
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import synthetic
from budget import die_together
from provenance import RESULTS, record
from train import PRESETS, Shape, Spec, measure

Keep = Callable[[dict[str, Any]], object]  # gets the figures of the rounds so far
PEERS = ("transformers",)  # those that run in the environment of trmt
# Tokens of the longer side in a batch: as many as keep the card busy and leave its memory half empty.
BATCH_TOKENS = {"train-base": 65536, "train-big": 32768}
PAIRS = 300_000
TINY = Shape(width=16, feed_forward=16, heads=2, encoder_layers=1, decoder_layers=1, vocabulary=500)


def main() -> None:
    rows = {
        "train-base": measured,
        "train-big": measured,
        "train-deterministic": deterministic,
        "train-peers": beside_peers,
    }
    parser = argparse.ArgumentParser(description="One row of the speed of training on a GPU.")
    parser.add_argument("row", choices=rows)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="a tiny network and little data")
    given = parser.parse_args()
    die_together()

    def keep(figures: dict[str, Any]) -> Path:
        command = f"python bench/gpu_speed.py {given.row}"
        return record(given.row, figures, command=command, folder=given.out)

    print(keep(rows[given.row](specification(given), keep)))


def specification(given: argparse.Namespace) -> Spec:
    shape, pairs = PRESETS["big" if given.row == "train-big" else "base"], PAIRS
    window: dict[str, Any] = {"rounds": 3, "seconds": 15.0, "warmup_seconds": 10.0, "warmup_updates": 20}
    if given.smoke:
        shape, pairs = TINY, 2000
        window = {"rounds": 1, "seconds": 0.5, "warmup_seconds": 0.0, "warmup_updates": 1}
    work = given.work.resolve()
    folder = work / f"synthetic-{pairs}-{shape.vocabulary}"
    return Spec(
        data_set=synthetic.prepared(folder, pairs=pairs, vocabulary=shape.vocabulary),
        work=work / given.row,
        shape=shape,
        threads=1 if given.smoke else (os.cpu_count() or 2) // 2,
        device=given.device,
        precision="fp32" if given.smoke else "bf16",
        batch_tokens=1024 if given.smoke else BATCH_TOKENS.get(given.row, BATCH_TOKENS["train-base"]),
        **window,
    )


def measured(spec: Spec, keep: Keep | None = None) -> dict[str, Any]:
    """What `bench/train.py` finds; a training of ours that fails is no figure. `keep` gets each round."""
    figures = measure(spec, keep)
    if "trmt" not in figures:
        raise SystemExit(figures["toolkits"]["trmt"]["error"])
    return figures


def deterministic(spec: Spec, keep: Keep) -> dict[str, Any]:
    """The cost of exactness: the same training both ways."""
    found: dict[str, Any] = {}
    for name, asked in (("usual", False), ("deterministic", True)):

        def keep_one(figures: dict[str, Any], name: str = name) -> object:
            return keep({**found, name: figures})

        options = {"trmt": {"settings": {"training.deterministic": asked}}}
        found[name] = measured(replace(spec, options=options, work=spec.work / name), keep_one)
    usual, exact = (one["toolkits"]["trmt"]["target_tokens_per_second"] for one in found.values())
    return {"times_slower": round(usual / exact, 3), **found}


def beside_peers(spec: Spec, keep: Keep) -> dict[str, Any]:
    """Ours and the toolkits that are installed here, round by round."""
    names = tuple(name for name in PEERS if find_spec(name))
    if not names:
        raise SystemExit(f"none of {', '.join(PEERS)} is installed")
    peers = spec.work / "environments"
    for name in names:
        python = peers / name / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        # A link would lose the environment that this Python belongs to.
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
        python.chmod(0o755)
    figures = measured(replace(spec, peers=peers, toolkits=names), keep)
    if not figures["ratios"]:
        raise SystemExit("\n".join(figures["toolkits"][name]["error"] for name in names))
    return figures


if __name__ == "__main__":
    main()
