"""Averaging checkpoints: often worth a point of BLEU (Attention Is All You Need, 6.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trmt import console
from trmt.bundles import bundles, checkpoints
from trmt.bundles.checkpoints import AVERAGE, MODELS
from trmt.errors import BundleError, ConfigError

BEST = 5


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """What `trmt average` takes."""

    places: tuple[Path, ...] = ()  # a run folder or several checkpoints; none: the newest run
    best: int | None = None
    last: int | None = None
    out: Path | None = None


Record = Callable[[Path, Sequence[Mapping[str, Any]]], None]  # of golden sentences


def average(options: AverageOptions, record: Record | None = None) -> Path:
    """Average checkpoints into a bundle and return its folder.

    `record` translates golden sentences with it, those of the checkpoints.
    """
    if options.best is not None and options.last is not None:
        raise ConfigError("--best and --last exclude each other; choose one")
    if any(count is not None and count < 1 for count in (options.best, options.last)):
        raise ConfigError("--best and --last take a number of at least 1")
    places = options.places or (_newest_run(),)
    if len(places) == 1 and not bundles.is_bundle(places[0]):
        run = places[0]
        best = BEST if options.best is None and options.last is None else options.best
        if best is not None and not any(point.score() for point in checkpoints.steps(run)):
            best = None if options.best is None else best
        chosen = checkpoints.choose(run, best=best, last=options.last)
        out = options.out or run / AVERAGE
    else:
        if options.best is not None or options.last is not None:
            raise ConfigError("--best and --last choose among the checkpoints of one run folder; name that")
        if options.out is None:
            raise ConfigError("say with --out where the average of these checkpoints is to be written")
        chosen, out = list(places), options.out
    if out.exists() and not bundles.is_bundle(out):
        raise BundleError(f"{out} is there and is no bundle; choose another place with --out")
    if out.resolve() in [place.resolve() for place in chosen] or (out / checkpoints.TRAINING).exists():
        raise BundleError(f"{out} is a checkpoint that would be lost; choose another place with --out")
    golden = [bundles.read_manifest(place).golden for place in chosen]
    checkpoints.average(chosen, out)
    if record:
        record(out, next(filter(None, golden), ()))
    console.say(f"average of {', '.join(place.name for place in chosen)} -> {out}")
    return out


def _newest_run() -> Path:
    runs = [folder for folder in checkpoints.runs(MODELS) if checkpoints.steps(folder)]
    if not runs:
        raise BundleError(f"there is no run in {MODELS}/; name one, or train one with trmt train")
    newest = max(runs, key=lambda folder: checkpoints.steps(folder)[-1].folder.stat().st_mtime)
    console.say(f"run: {newest}")
    return newest
