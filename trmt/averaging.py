"""Averaging the weights of checkpoints, which often gains BLEU ("Attention Is All You Need", section 6.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trmt import console
from trmt.bundles import bundles, checkpoints
from trmt.bundles.bundles import Manifest
from trmt.bundles.checkpoints import AVERAGE, MODELS
from trmt.config import Options
from trmt.errors import BundleError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BEST = 5


@dataclass(frozen=True, kw_only=True)
class AverageOptions(Options):
    """What `trmt average` takes."""

    paths: Sequence[Path] = ()  # a run folder or several bundles; empty: the newest run
    best: int | None = None  # average so many checkpoints with the best scores
    last: int | None = None  # average so many of the newest checkpoints
    out: Path | None = None  # the folder to write; None: average/ in the run folder


RecordGolden = Callable[[Path, Sequence[Mapping[str, Any]]], None]  # (bundle, golden sentences)


def average(options: AverageOptions, record: RecordGolden | None = None) -> Path:
    """Average checkpoints into a bundle and return its folder.

    `record` translates the golden sentences of the checkpoints with the new bundle and stores them in it.
    """
    if options.best is not None and options.last is not None:
        raise ConfigError("--best and --last exclude each other; choose one")
    if any(count is not None and count < 1 for count in (options.best, options.last)):
        raise ConfigError("--best and --last take a number of at least 1")
    chosen, out = _inputs_and_output(options)
    if out.exists() and not bundles.is_bundle(out):
        raise BundleError(f"{out} exists and is not a bundle; choose another folder with --output")
    if out.resolve() in [path.resolve() for path in chosen] or (out / checkpoints.TRAINING).exists():
        raise BundleError(f"{out} is a checkpoint, which would be lost; choose another folder with --output")
    golden = [bundles.read_manifest(path).golden for path in chosen]
    average_bundles(chosen, out)
    if record:
        record(out, next(filter(None, golden), ()))
    console.say(f"average of {', '.join(path.name for path in chosen)} -> {out}")
    return out


def _inputs_and_output(options: AverageOptions) -> tuple[list[Path], Path]:
    """The bundles to average and the folder to write."""
    paths = options.paths or (_newest_run(),)
    if len(paths) == 1 and not bundles.is_bundle(paths[0]):
        run = paths[0]
        best = BEST if options.best is None and options.last is None else options.best
        if options.best is None and not any(found.score() for found in checkpoints.list_checkpoints(run)):
            best = None
        return select_checkpoints(run, best=best, last=options.last), options.out or run / AVERAGE
    if options.best is not None or options.last is not None:
        raise ConfigError("--best and --last select checkpoints of one run folder; name that folder")
    if options.out is None:
        raise ConfigError("several checkpoints need --output, the folder in which to write their average")
    return list(paths), options.out


def _newest_run() -> Path:
    runs = [folder for folder in checkpoints.list_runs(MODELS) if checkpoints.list_checkpoints(folder)]
    if not runs:
        raise BundleError(f"there is no run in {MODELS}/; name one, or train one with trmt train")
    newest = max(runs, key=lambda folder: checkpoints.list_checkpoints(folder)[-1].folder.stat().st_mtime)
    console.say(f"run: {newest}")
    return newest


def select_checkpoints(run: Path, *, best: int | None = None, last: int | None = None) -> list[Path]:
    """The best or the last checkpoints of a run, or all; a warning if there are fewer."""
    found = checkpoints.list_checkpoints(run)
    if not found:
        raise BundleError(f"there are no checkpoints in {run}; train first, or name another run folder")
    wanted = best if best is not None else last if last is not None else len(found)
    order = checkpoints.ranked(found) if best is not None else found[::-1]
    if best is not None and not order:
        raise BundleError(f"no checkpoint in {run} was ever validated; use --last instead of --best")
    if len(order) < wanted:
        console.warn(f"{run} has {len(order)} such checkpoints, not {wanted}; averaging those")
    return [checkpoint.folder for checkpoint in order[:wanted]]


def average_bundles(paths: Sequence[Path], out: Path) -> Manifest:
    """Write the mean of several bundles' weights as a new bundle.

    All must have one architecture and one tokenizer. The mean is taken in double precision.
    """
    if not paths:
        raise BundleError("there is nothing to average; name a run folder or checkpoints")
    manifests = [bundles.read_manifest(path) for path in paths]
    _check_compatible(paths, manifests)
    first = manifests[0]
    tokenizer = bundles.load_tokenizer(paths[0], first)
    kinds: dict[str, tuple[torch.Size, bool]] = {}
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path, manifest in zip(paths, manifests, strict=True):
        weights = bundles.read_weights(path, manifest)
        described = {name: (tensor.shape, tensor.is_floating_point()) for name, tensor in weights.items()}
        if described != (kinds := kinds or described):
            raise BundleError(f"{path} and {paths[0]} differ in weights; average checkpoints of one run")
        for name, tensor in weights.items():
            if name in first.tied:
                continue
            dtypes.setdefault(name, tensor.dtype)
            if tensor.is_floating_point():
                total[name] = total[name].add_(tensor) if name in total else tensor.double()
            else:
                total.setdefault(name, tensor)
    mean = {
        name: (tensor / len(paths)).to(dtypes[name]) if tensor.is_floating_point() else tensor
        for name, tensor in total.items()
    }
    averaged = replace(
        first,
        training={**first.training, "averaged": [path.name for path in paths]},
        scores=(),  # those of the checkpoints do not hold for the average
        golden=(),
    )
    bundles.save_bundle(out, averaged, mean, tokenizer)
    return averaged


def _check_compatible(paths: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    for path, manifest in zip(paths, manifests, strict=True):
        if (manifest.architecture, manifest.network) != (first.architecture, first.network):
            raise BundleError(f"{path} and {paths[0]} differ in architecture; average checkpoints of one run")
        if manifest.precision != "fp32":
            raise BundleError(f"{path} is quantised; average the checkpoints it was made from, then quantise")
        if manifest.tokenizer != first.tokenizer:
            raise BundleError(f"{path} and {paths[0]} differ in tokenizer; average checkpoints of one run")
