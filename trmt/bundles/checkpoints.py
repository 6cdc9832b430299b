"""Run folders: checkpoints in regular intervals, of which the best and the last are kept.

    models/<run>/
      config.toml       the recipe with everything resolved, written before the first step
      log.jsonl         one line for each event of the run
      step-00001000/    a bundle; what resuming needs is in step-00001000/training/
      average/          a bundle, written by `trmt average`

A run folder can be named where a bundle is expected: it stands for its average if it has one, else for its
best checkpoint.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trmt import console
from trmt.bundles import bundles, slices
from trmt.bundles.bundles import Manifest
from trmt.bundles.slices import SlicedTensors
from trmt.errors import BundleError
from trmt.storage.files import PARTIAL, atomic_folder, checksum, recover_folder, write_verified_json
from trmt.text.tokenizer import Tokenizer
from trmt.trees import TreeError, read_json, verified

STEP = re.compile(r"step-(\d+)")
TRAINING, STATE, TENSORS = "training", "state.json", "state.safetensors"
CONFIG, AVERAGE = "config.toml", "average"
MODELS = Path("models")
FORMAT = 3  # of the training state

SavedState = tuple[Mapping[str, Any], Mapping[str, Tensor]]  # the JSON part and the tensors


class DamagedState(BundleError):
    """A training state that is not as it was written."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a run: a bundle, and the training state that resuming needs."""

    folder: Path
    step: int

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""
        return bundles.read_manifest(self.folder)

    def score(self) -> tuple[str, float] | None:
        """The metric that the run selects checkpoints by and its value, if this step was validated."""
        scores = self.manifest.scores
        return (str(scores[0]["metric"]), float(scores[0]["value"])) if scores else None

    def load_state(self) -> SavedState:
        """The training state; an error if any part of it is missing or altered."""
        folder = self.folder / TRAINING
        try:
            state = self.load_values()
            path = folder / state["tensors"]
            if checksum(path) != state["sha256"]:
                raise DamagedState(f"{path} is not as it was written: its checksum differs")
            if path.name == TENSORS:
                return state, load_file(path)
            tensors = SlicedTensors(folder)
            if altered := tensors.altered_file():
                raise DamagedState(f"{altered} is not as it was written: its checksum differs")
            return state, tensors
        except (FileNotFoundError, TreeError, SafetensorError) as error:
            raise DamagedState(f"{folder} is damaged: {error}") from error
        except OSError as error:
            raise BundleError(f"cannot read {folder}: {error.strerror}; check the disk") from error

    def load_values(self) -> dict[str, Any]:
        """The training state without its tensors; an error if it is missing or altered."""
        path = self.folder / TRAINING / STATE
        try:
            tree = read_json(path)
            _check_format(self.folder.parent, tree.get("format") if isinstance(tree, dict) else None)
            state = verified(tree, required=True)
        except (FileNotFoundError, TreeError) as error:
            raise DamagedState(f"{path} {_what_is_wrong(error)}") from error
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror}; check the disk") from error
        if state.get("tensors") not in (TENSORS, slices.INDEX) or not isinstance(state.get("sha256"), str):
            raise DamagedState(f"{path} does not name the file of its tensors")
        return state

    def add_results(self, state: Mapping[str, Any], **manifest: Any) -> None:
        """Write validation results into the manifest, and after that into the training state."""
        values = self.load_values()
        bundles.rewrite_manifest(self.folder, **manifest)
        write_verified_json(self.folder / TRAINING / STATE, {**values, **state})

    def resumable(self) -> bool:
        """Whether it still has its training state; only the newest checkpoints keep it."""
        return (self.folder / TRAINING / STATE).is_file()


def _what_is_wrong(error: Exception) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else str(error)


def _check_format(run: Path, found: Any) -> None:
    if not isinstance(found, int):
        raise TreeError("has no number of a format")
    if found < FORMAT:
        raise BundleError(
            f"{run} was begun by an older version of trmt and cannot be resumed by this one; finish it with "
            f"the version that began it, or start a new run from its weights with --init-from {run}"
        )
    if found > FORMAT:
        raise BundleError(f"{run} was begun by a newer version of trmt; upgrade trmt to resume it")


def check_format(run: Path) -> None:
    """Refuse a run folder whose training states another version of trmt has written."""
    for checkpoint in list_checkpoints(run):
        try:
            _check_format(run, read_json(checkpoint.folder / TRAINING / STATE)["format"])
        except (OSError, TreeError, KeyError, TypeError):  # pruned or damaged, see newest_state
            continue


def step_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    try:
        if not run.is_dir():
            return []
    except OSError:  # the name is too long
        return []
    found = [
        Checkpoint(folder, int(match[1]))
        for folder in run.iterdir()
        if (match := STEP.fullmatch(folder.name)) and bundles.is_bundle(folder)
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def resumable_checkpoints(run: Path) -> list[Checkpoint]:
    """The checkpoints of a run that still have their training state, oldest first."""
    return [checkpoint for checkpoint in list_checkpoints(run) if checkpoint.resumable()]


def save_checkpoint(
    run: Path,
    manifest: Manifest,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    step: int,
    state: SavedState,
) -> Checkpoint:
    """Write a checkpoint, atomically."""
    folder = step_folder(run, step)
    values, tensors = state
    with atomic_folder(folder) as partial:
        bundles.write_bundle(partial, manifest, weights, tokenizer)
        (partial / TRAINING).mkdir()
        bundles.write_tensors(partial / TRAINING / TENSORS, tensors)
        write_state(partial / TRAINING, values, tensors=TENSORS)
    return Checkpoint(folder, step)


def write_state(folder: Path, values: Mapping[str, Any], *, tensors: str) -> None:
    """Write the JSON part of a training state, with the name and the checksum of the file of its tensors."""
    header = {"format": FORMAT, "tensors": tensors, "sha256": checksum(folder / tensors)}
    write_verified_json(folder / STATE, {**header, **values})


def newest_values(run: Path) -> dict[str, Any] | None:
    """What `newest_state` returns, but without tensors, and with damaged checkpoints left where they are."""
    for checkpoint in reversed(resumable_checkpoints(run)):
        with suppress(DamagedState):
            return checkpoint.load_values()
    return None


def newest_state(run: Path) -> SavedState | None:
    """The newest undamaged training state; None for a run that has no checkpoints.

    Damaged checkpoints that are newer are renamed, with a warning: the run is going to write them again.
    """
    damaged: list[tuple[Checkpoint, DamagedState]] = []
    for checkpoint in reversed(resumable_checkpoints(run)):
        try:
            state = checkpoint.load_state()
        except DamagedState as error:
            damaged.append((checkpoint, error))
            continue
        for broken, reason in damaged:
            renamed = set_aside(broken, "damaged")
            console.warn(
                f"{reason}; it was renamed to {renamed}, and training resumes from {checkpoint.folder}"
            )
        return state
    if list_checkpoints(run):
        why = f": {damaged[0][1]}" if damaged else ""
        raise BundleError(f"no checkpoint in {run} can be resumed from{why}; name another run folder")
    return None


def set_aside(checkpoint: Checkpoint, prefix: str) -> Path:
    """Rename a checkpoint so that it no longer counts as one; returns its new path."""
    renamed = checkpoint.folder.with_name(f"{prefix}-{checkpoint.folder.name}")
    shutil.rmtree(renamed, ignore_errors=True)
    checkpoint.folder.replace(renamed)
    return renamed


def ranked(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The validated checkpoints, best first; of equal ones the older first."""
    scored = [(checkpoint, score) for checkpoint in checkpoints if (score := checkpoint.score())]
    return [checkpoint for checkpoint, (metric, value) in sorted(scored, key=lambda pair: _cost(*pair[1]))]


def _cost(metric: str, value: float) -> float:
    """A sort key: the lower, the better."""
    if math.isnan(value):  # it would leave the order undefined
        return math.inf
    return value if metric == "loss" else -value


def prune(run: Path, *, best: int, last: int) -> None:
    """Remove all but the best and the last checkpoints; the newest is never removed.

    Those kept only for their score lose their training state, which is twice the size of the weights.
    """
    found = list_checkpoints(run)
    recent = found[-max(last, 1) :]
    kept = {checkpoint.folder for checkpoint in [*recent, *ranked(found)[:best]]}
    for checkpoint in found:
        if checkpoint.folder not in kept:
            # Renamed first: a kill halfway must not leave something that looks like a checkpoint.
            doomed = checkpoint.folder.with_name(f"{PARTIAL}{checkpoint.folder.name}")
            checkpoint.folder.replace(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        elif checkpoint not in recent:
            shutil.rmtree(checkpoint.folder / TRAINING, ignore_errors=True)


def find_bundle(path: Path) -> Path:
    """The bundle that a path stands for: itself, or the average or best checkpoint of a run folder."""
    if bundles.is_bundle(path):
        return path
    recover_folder(path / AVERAGE)
    found = list_checkpoints(path)
    if bundles.is_bundle(path / AVERAGE):
        averaged = bundles.read_manifest(path / AVERAGE).training.get("averaged", [])
        if found and found[-1].folder.name > max(averaged, default=""):
            console.warn(f"{path / AVERAGE} is older than {found[-1].folder}; run trmt average {path} again")
        return path / AVERAGE
    if not found:
        raise BundleError(f"there is no model in {path}; name a bundle or a run folder that has one")
    return (ranked(found) or found[::-1])[0].folder


def default_bundle(models: Path = MODELS) -> Path:
    """The bundle to use when none is named: $TRMT_MODEL, else the newest one in models/."""
    named = os.environ.get("TRMT_MODEL")
    if named:
        return find_bundle(Path(named))
    found = [
        find_bundle(folder)
        for folder in list_runs(models)
        if bundles.is_bundle(folder) or bundles.is_bundle(folder / AVERAGE) or list_checkpoints(folder)
    ]
    if not found:
        raise BundleError(
            f"there is no model in {models}/; name one, set TRMT_MODEL, or train one with trmt train"
        )
    return max(found, key=lambda folder: (folder / bundles.MANIFEST).stat().st_mtime)


def list_runs(models: Path = MODELS) -> list[Path]:
    """The folders that may be run folders or bundles, without those that killed processes left behind."""
    if not models.is_dir():
        return []
    return [path for path in models.iterdir() if path.is_dir() and not path.name.startswith(PARTIAL)]
