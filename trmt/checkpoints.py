"""Run folders: a checkpoint every so often, the best and the last of them kept, averages of them.

    models/<run>/
      config.toml       the recipe with everything resolved, written before the first step
      log.jsonl         one line for each event of the run
      step-00001000/    a bundle, with what resuming needs in step-00001000/training/
      average/          a bundle, written by `trmt average`

A run folder can be used where a bundle is asked for: it stands for its average if it has one, else for
its best checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trmt import bundles, console
from trmt.bundles import Manifest
from trmt.errors import BundleError
from trmt.files import atomic_folder, recover, write_json
from trmt.tokenizer import Tokenizer

STEP = re.compile(r"step-(\d+)")
TRAINING, STATE, TENSORS = "training", "state.json", "state.safetensors"
CONFIG, LOG, AVERAGE = "config.toml", "log.jsonl", "average"
MODELS = Path("models")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a run: a bundle, and what it takes to train on."""

    folder: Path
    step: int

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return bundles.read_manifest(self.folder)

    def score(self) -> tuple[str, float] | None:
        """The metric by which the run chooses and its value, if this step was validated."""
        scores = self.manifest.scores
        return (str(scores[0]["metric"]), float(scores[0]["value"])) if scores else None

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The plain and the tensor part of the training state."""
        folder = self.folder / TRAINING
        try:
            plain = json.loads((folder / STATE).read_bytes())
            return plain, load_file(folder / TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise BundleError(
                f"cannot resume from {folder}: {error}; remove {self.folder} to resume from an older one"
            ) from error

    def resumable(self) -> bool:
        """Whether it still has its training state; only the newest ones keep it."""
        return (self.folder / TRAINING / STATE).is_file()


def steps(run: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    if not run.is_dir():
        return []
    found = [
        Checkpoint(folder, int(match[1]))
        for folder in run.iterdir()
        if (match := STEP.fullmatch(folder.name)) and bundles.is_bundle(folder)
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def save(
    run: Path,
    manifest: Manifest,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    step: int,
    state: tuple[Mapping[str, Any], Mapping[str, Tensor]],
) -> Checkpoint:
    """Write a checkpoint; it is there whole or not at all."""
    folder = run / f"step-{step:08d}"
    plain, tensors = state
    with atomic_folder(folder) as partial:
        bundles.write_bundle(partial, manifest, weights, tokenizer)
        (partial / TRAINING).mkdir()
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, partial / TRAINING / TENSORS)
        write_json(partial / TRAINING / STATE, dict(plain))
    return Checkpoint(folder, step)


def ranked(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The validated ones, best first; of equals the older."""
    scored = [(checkpoint, score) for checkpoint in checkpoints if (score := checkpoint.score())]
    return [
        checkpoint
        for checkpoint, (metric, value) in sorted(
            scored, key=lambda pair: pair[1][1] if pair[1][0] == "loss" else -pair[1][1]
        )
    ]


def prune(run: Path, *, best: int, last: int) -> None:
    """Remove all but the best and the last checkpoints; the newest is never removed.

    Those kept only for their score lose their training state, which is twice the size of the weights.
    """
    found = steps(run)
    recent = found[-max(last, 1) :]
    kept = {checkpoint.folder for checkpoint in [*recent, *ranked(found)[:best]]}
    for checkpoint in found:
        if checkpoint.folder not in kept:
            # Renamed first: a kill halfway must not leave something that looks like a checkpoint.
            doomed = checkpoint.folder.with_name(f".partial-{checkpoint.folder.name}")
            checkpoint.folder.replace(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        elif checkpoint not in recent:
            shutil.rmtree(checkpoint.folder / TRAINING, ignore_errors=True)


def find_bundle(place: Path) -> Path:
    """The bundle that a path stands for: itself, or the best of the run folder it names."""
    if bundles.is_bundle(place):
        return place
    recover(place / AVERAGE)
    if bundles.is_bundle(place / AVERAGE):
        return place / AVERAGE
    found = steps(place)
    if not found:
        raise BundleError(f"there is no model in {place}; name a bundle or a run folder that has one")
    return (ranked(found) or found[::-1])[0].folder


def default_bundle(models: Path = MODELS) -> Path:
    """What to translate with when nothing is named: $TRMT_MODEL, else the newest bundle in models/."""
    named = os.environ.get("TRMT_MODEL")
    if named:
        return find_bundle(Path(named))
    candidates = [folder for folder in models.iterdir() if folder.is_dir()] if models.is_dir() else []
    found = [
        find_bundle(folder)
        for folder in candidates
        if bundles.is_bundle(folder) or bundles.is_bundle(folder / AVERAGE) or steps(folder)
    ]
    if not found:
        raise BundleError(
            f"there is no model in {models}/; name one, set TRMT_MODEL, or train one with trmt train"
        )
    return max(found, key=lambda folder: (folder / bundles.MANIFEST).stat().st_mtime)


def average(places: Sequence[Path], out: Path) -> Manifest:
    """Write the mean of several bundles' weights as a new bundle.

    All must be of one architecture with one tokenizer. The mean is taken in double precision.
    """
    if not places:
        raise BundleError("there is nothing to average; name a run folder or checkpoints")
    manifests = [bundles.read_manifest(place) for place in places]
    first = manifests[0]
    for place, manifest in zip(places, manifests, strict=True):
        if (manifest.architecture, manifest.network) != (first.architecture, first.network):
            raise BundleError(
                f"{place} and {places[0]} differ in architecture; average checkpoints of one run"
            )
        if manifest.tokenizer != first.tokenizer:
            raise BundleError(f"{place} and {places[0]} differ in tokenizer; average checkpoints of one run")
    total: dict[str, Tensor] = {}
    for place, manifest in zip(places, manifests, strict=True):
        for name, tensor in bundles.read_weights(place, manifest).items():
            if name in first.tied:
                continue
            if tensor.is_floating_point():
                total[name] = total[name].add_(tensor) if name in total else tensor.double()
            else:
                total.setdefault(name, tensor)
    kinds = {n: t.dtype for n, t in bundles.read_weights(places[0], first, verify=False).items()}
    mean = {
        name: (tensor / len(places)).to(kinds[name]) if tensor.is_floating_point() else tensor
        for name, tensor in total.items()
    }
    merged = replace(
        first,
        training={**first.training, "averaged": [place.name for place in places]},
        scores=(),  # nobody has measured these weights yet
        golden=(),
    )
    bundles.save_bundle(out, merged, mean, Tokenizer.load(places[0] / bundles.TOKENIZER))
    return merged


def choose(run: Path, *, best: int | None = None, last: int | None = None) -> list[Path]:
    """The best or the last checkpoints of a run; fewer if it has fewer, which is said."""
    found = steps(run)
    if not found:
        raise BundleError(f"there are no checkpoints in {run}; train first, or name another run folder")
    wanted = best if best is not None else last if last is not None else len(found)
    order = ranked(found) if best is not None else found[::-1]
    if best is not None and not order:
        raise BundleError(f"no checkpoint in {run} was ever validated; use --last instead of --best")
    if len(order) < wanted:
        console.warn(f"{run} has {len(order)} such checkpoints, not {wanted}; averaging those")
    return [checkpoint.folder for checkpoint in order[:wanted]]
