"""Run folders: checkpoints in regular intervals, of which the best and the last are kept.

    models/<run>/
      config.toml       the recipe with everything resolved, written before the first step
      log.jsonl         one line for each event of the run
      step-00001000/    a bundle; what resuming needs is in step-00001000/training/
      average/          a bundle, written by `trmt average`

A run folder can be named where a bundle is expected: it stands for its average or, if that is missing or
worse on the dev set, for its best checkpoint. Models and runs in models/ are found by their names.
"""

from __future__ import annotations

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

import trmt
from trmt import console
from trmt.bundles import bundles, slices
from trmt.bundles.bundles import DevScore, Manifest
from trmt.bundles.slices import SlicedTensors
from trmt.errors import BundleError
from trmt.storage.files import PARTIAL, atomic_folder, checksum, recover_folder, write_verified_json
from trmt.text.tokenizer import Tokenizer
from trmt.trees import TreeError, read_json, verified

STEP = re.compile(r"step-(\d+)")
TRAINING, STATE, TENSORS = "training", "state.json", "state.safetensors"
CONFIG, AVERAGE = "config.toml", "average"
MODELS = Path("models")
# Where models that come with trmt are: in the installed package, or in the checkout around it.
SHIPPED = (Path(trmt.__file__).parent / "models", Path(trmt.__file__).parent.parent / "models")
SHIPPED_NAMES = ("en-de", "de-en")  # the first is used where no model is named and there is no other
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

    def score(self) -> DevScore | None:
        """The metric that the run selects checkpoints by and its value, if this step was validated."""
        return self.manifest.score()

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
    scored = [(score.cost, checkpoint) for checkpoint in checkpoints if (score := checkpoint.score())]
    return [checkpoint for cost, checkpoint in sorted(scored, key=lambda pair: pair[0])]


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


def is_model(folder: Path) -> bool:
    """Whether a folder is a bundle or a run folder, which may have no checkpoint yet."""
    files = (folder / bundles.MANIFEST, folder / AVERAGE / bundles.MANIFEST, folder / CONFIG)
    return any(file.is_file() for file in files) or bool(list_checkpoints(folder))


def find_folder(path: Path) -> Path:
    """The model or run that is meant: the one at this path, else the one of this name in models/.

    The models that come with trmt are found by their names too.
    """
    if path.is_file():
        if bundles.is_bundle(path.parent):
            raise BundleError(f"{path} is a file of a model; name the model by its folder, {path.parent}")
        raise BundleError(
            f"{path} is a file and not a model; to translate it: trmt translate < {path} "
            f"or trmt translate MODEL < {path}"
        )
    if path.is_absolute() or ".." in path.parts or is_model(path):
        return path
    if is_model(MODELS / path):
        return MODELS / path
    return next((folder for folder in shipped_models() if Path(folder.name) == path), path)


def named_folder(name: str) -> Path:
    """The folder in which to write a run or bundle of this name: of a bare name, the one in models/.

    ./NAME is in the working directory, and so is a NAME that is there and does not name a model in models/.
    """
    path, named = Path(name), MODELS / name
    is_bare = name == path.name != ".." and not re.search("[,:]", name)  # corpora and URLs have these
    if is_model(path):
        return path
    if is_model(named):  # where a relative path would be found
        return named if is_bare else path.absolute() if name.startswith("./") else path
    return named if is_bare and not path.exists() else path


def shipped_models() -> list[Path]:
    """The bundles that come with trmt, those of the first name first."""
    folders = [folder / name for name in SHIPPED_NAMES for folder in SHIPPED]
    return [
        folder for folder in folders if bundles.is_bundle(folder) and bundles.read_manifest(folder).shipped
    ]


def find_bundle(path: Path) -> Path:
    """The bundle that a path or a name stands for: itself, or what to use of a run folder."""
    bundle, warning = bundle_of(find_folder(path))
    if warning:
        console.warn(warning)
    return bundle


def bundle_of(folder: Path) -> tuple[Path, str]:
    """The bundle that a folder stands for, and what there is to say about the choice.

    Of a run folder, that is the average, unless the best checkpoint is better on the dev set.
    """
    if bundles.is_bundle(folder):
        return folder, ""
    average = folder / AVERAGE
    recover_folder(average)
    found, damaged = _readable(list_checkpoints(folder))
    best = (ranked(found) or found[::-1])[:1]
    if damaged and not best and not bundles.is_bundle(average):
        raise damaged[0]
    if not bundles.is_bundle(average):
        if not best:
            raise BundleError(
                f"there is no model in {folder}; name a bundle or a run folder that has one, or one of those "
                "that trmt models lists"
            )
        return best[0].folder, f"{_fault(damaged[0])}; {best[0].folder} is used" if damaged else ""
    try:
        manifest = bundles.read_manifest(average)
    except BundleError as error:
        if not best:
            raise
        advice = f"make the average again with trmt average {folder}"
        return best[0].folder, f"{_fault(error)}; {best[0].folder} is used instead; {advice}"
    outdated = bool(found) and found[-1].folder.name > _newest_known(manifest)
    again = f"run trmt average {folder} again"
    if best and _is_better(best[0], manifest):
        instead, advice = best[0].folder, f"; {again}" if outdated else ""
        return instead, f"{average} is worse on the dev set than {instead}, which is used instead{advice}"
    if outdated:
        return average, f"{average} is older than {found[-1].folder}; {again}"
    if best and best[0].score() and not manifest.score():
        return average, f"{average} was not scored on the dev set and may be worse than a checkpoint; {again}"
    return average, ""


def _readable(found: Sequence[Checkpoint]) -> tuple[list[Checkpoint], list[BundleError]]:
    """The checkpoints whose manifests can be read, and the errors of the others."""
    readable, errors = [], []
    for checkpoint in found:
        try:
            checkpoint.score()
            readable.append(checkpoint)
        except BundleError as error:
            errors.append(error)
    return readable, errors


def _fault(error: BundleError) -> str:
    """What is wrong, without the advice that ends the sentence."""
    return str(error).partition(";")[0]


def _newest_known(average: Manifest) -> str:
    """The name of the newest checkpoint that there was when an average was written."""
    if average.average:
        return average.average.newest
    averaged = average.training.get("averaged")  # the record of older versions
    return max(map(str, averaged), default="") if isinstance(averaged, list) else ""


def _is_better(checkpoint: Checkpoint, average: Manifest) -> bool:
    """Whether a checkpoint is better on the dev set than an average."""
    record = average.average
    if record and record.best == checkpoint.folder.name:
        return average.worse_than_best()  # both scored in the same way
    return bundles.is_worse(average.score(), checkpoint.score())


def list_runs(models: Path = MODELS) -> list[Path]:
    """The folders that may be run folders or bundles, without those that killed processes left behind."""
    if not models.is_dir():
        return []
    return [path for path in models.iterdir() if path.is_dir() and not path.name.startswith(PARTIAL)]
