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
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trmt import console
from trmt.bundles import bundles
from trmt.bundles.bundles import Manifest
from trmt.bundles.slices import INDEX, Slice, Slices, write_index
from trmt.bundles.slices import write as write_slices
from trmt.errors import BundleError
from trmt.storage.files import PARTIAL, atomic_folder, checksum, recover_folder, write_json
from trmt.text.tokenizer import Tokenizer
from trmt.training.distributed import Team

STEP = re.compile(r"step-(\d+)")
TRAINING, STATE, TENSORS = "training", "state.json", "state.safetensors"
CONFIG, AVERAGE = "config.toml", "average"
MODELS = Path("models")
FORMAT = 1  # of the training state

State = tuple[Mapping[str, Any], Mapping[str, Tensor]]  # the plain and the tensor part


class Damaged(BundleError):
    """A training state that is not as it was written."""


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

    def state(self) -> State:
        """The training state, whole or not at all."""
        folder = self.folder / TRAINING
        try:
            plain = json.loads((folder / STATE).read_bytes())
            if plain["format"] != FORMAT:
                raise BundleError(
                    f"{folder} is of format {plain['format']}, not {FORMAT}; use the trmt that wrote it"
                )
            path = folder / plain.get("tensors", TENSORS)
            if checksum(path) != plain["sha256"]:
                raise Damaged(f"{path} is not as it was written: its checksum differs")
            if path.name == TENSORS:
                return plain, load_file(path)
            tensors = Slices(folder)
            if altered := tensors.altered():
                raise Damaged(f"{altered} is not as it was written: its checksum differs")
            return plain, tensors
        except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise Damaged(f"{folder} is damaged: {error}") from error
        except OSError as error:
            raise BundleError(f"cannot read {folder}: {error.strerror}; check the disk") from error

    def add(self, plain: Mapping[str, Any], **manifest: Any) -> None:
        """Put what was found out later into the manifest, and then into the state."""
        bundles.rewrite_manifest(self.folder, **manifest)
        path = self.folder / TRAINING / STATE
        write_json(path, {**json.loads(path.read_bytes()), **plain})

    def resumable(self) -> bool:
        """Whether it still has its training state; only the newest ones keep it."""
        return (self.folder / TRAINING / STATE).is_file()


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run / f"step-{step:08d}"


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
    state: State,
) -> Checkpoint:
    """Write a checkpoint; it is there whole or not at all."""
    folder = step_folder(run, step)
    plain, tensors = state
    with atomic_folder(folder) as partial:
        bundles.write_bundle(partial, manifest, weights, tokenizer)
        (partial / TRAINING).mkdir()
        bundles.write_tensors(partial / TRAINING / TENSORS, tensors)
        proof = {"format": FORMAT, "sha256": checksum(partial / TRAINING / TENSORS)}
        write_json(partial / TRAINING / STATE, {**proof, **plain})
    return Checkpoint(folder, step)


def save_slices(
    run: Path,
    manifest: Manifest,
    tokenizer: Tokenizer,
    *,
    step: int,
    state: tuple[Mapping[str, Any], Mapping[str, Slice]],
    kept: Mapping[str, str],
    team: Team,
) -> None:
    """Write a checkpoint of a team in which each rank has slices; for all ranks to call together.

    `kept` names the tensors that make the bundle, and their names there.
    """
    plain, mine = state
    with atomic_folder(step_folder(run, step)) if team.leads else nullcontext(run) as partial:
        folder = partial / TRAINING
        if team.leads:
            folder.mkdir()
        folder = Path(team.lead(lambda: str(folder)))
        written = team.gather(_written(folder, mine, team))
        if team.leads:
            write_index(folder, written)
            Slices(folder).merge(partial / bundles.WEIGHTS, kept)
            bundles.seal(partial, manifest, tokenizer)
            proof = {"format": FORMAT, "tensors": INDEX, "sha256": checksum(folder / INDEX)}
            write_json(folder / STATE, {**proof, **plain})
    team.lead(lambda: None)  # nobody goes on before it is there


def _written(folder: Path, mine: Mapping[str, Slice], team: Team) -> dict[str, Any]:
    try:
        return write_slices(folder, mine, number=team.rank, count=team.size)
    except OSError as error:
        raise BundleError(
            f"cannot write to {folder}: {error.strerror or error}; free some space, and let every machine "
            "see the run folder"
        ) from error


def newest_state(run: Path) -> State | None:
    """What to resume from: the newest whole training state; None for a run that has no checkpoints.

    Damaged checkpoints that are newer are set aside, which is said: the run is going to write them again.
    """
    found = steps(run)
    damaged: list[tuple[Checkpoint, Damaged]] = []
    for point in reversed([point for point in found if point.resumable()]):
        try:
            state = point.state()
        except Damaged as error:
            damaged.append((point, error))
            continue
        for broken, reason in damaged:
            aside = set_aside(broken, "damaged")
            console.warn(f"{reason}; it is now {aside}, and training goes on from {point.folder}")
        return state
    if found:
        why = f": {damaged[0][1]}" if damaged else ""
        raise BundleError(f"no checkpoint in {run} can be resumed from{why}; name another run folder")
    return None


def set_aside(point: Checkpoint, why: str) -> Path:
    """Give a checkpoint a name under which nothing takes it for one; that name is returned."""
    aside = point.folder.with_name(f"{why}-{point.folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    point.folder.replace(aside)
    return aside


def ranked(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The validated ones, best first; of equals the older."""
    scored = [(checkpoint, score) for checkpoint in checkpoints if (score := checkpoint.score())]
    return [checkpoint for checkpoint, (metric, value) in sorted(scored, key=lambda pair: _badness(*pair[1]))]


def _badness(metric: str, value: float) -> float:
    if math.isnan(value):  # it would leave the order undefined
        return math.inf
    return value if metric == "loss" else -value


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
    recover_folder(place / AVERAGE)
    found = steps(place)
    if bundles.is_bundle(place / AVERAGE):
        averaged = bundles.read_manifest(place / AVERAGE).training.get("averaged", [])
        if found and found[-1].folder.name > max(averaged, default=""):
            console.warn(
                f"{place / AVERAGE} is older than {found[-1].folder}; run trmt average {place} again"
            )
        return place / AVERAGE
    if not found:
        raise BundleError(f"there is no model in {place}; name a bundle or a run folder that has one")
    return (ranked(found) or found[::-1])[0].folder


def default_bundle(models: Path = MODELS) -> Path:
    """What to translate with when nothing is named: $TRMT_MODEL, else the newest bundle in models/."""
    named = os.environ.get("TRMT_MODEL")
    if named:
        return find_bundle(Path(named))
    found = [
        find_bundle(folder)
        for folder in runs(models)
        if bundles.is_bundle(folder) or bundles.is_bundle(folder / AVERAGE) or steps(folder)
    ]
    if not found:
        raise BundleError(
            f"there is no model in {models}/; name one, set TRMT_MODEL, or train one with trmt train"
        )
    return max(found, key=lambda folder: (folder / bundles.MANIFEST).stat().st_mtime)


def runs(models: Path = MODELS) -> list[Path]:
    """The folders in which runs or bundles may be, without what killed writers left."""
    if not models.is_dir():
        return []
    return [place for place in models.iterdir() if place.is_dir() and not place.name.startswith(PARTIAL)]


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
        if manifest.precision != "fp32":
            raise BundleError(
                f"{place} is quantised; average the checkpoints it was made from, then quantise"
            )
        if manifest.tokenizer != first.tokenizer:
            raise BundleError(f"{place} and {places[0]} differ in tokenizer; average checkpoints of one run")
    total: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for place, manifest in zip(places, manifests, strict=True):
        for name, tensor in bundles.read_weights(place, manifest).items():
            if name in first.tied:
                continue
            kinds.setdefault(name, tensor.dtype)
            if tensor.is_floating_point():
                total[name] = total[name].add_(tensor) if name in total else tensor.double()
            else:
                total.setdefault(name, tensor)
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
