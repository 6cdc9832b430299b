"""The models in models/: their states, and the one that is meant where none is named.

No time of a file counts, because copies and checkouts change it: only times in logs and manifests.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from trmt import console
from trmt.bundles import bundles, checkpoints, quantised
from trmt.bundles.bundles import Manifest
from trmt.bundles.checkpoints import AVERAGE, CONFIG, MODELS
from trmt.errors import BundleError, TrmtError
from trmt.registry import ENCODERS, split_variants
from trmt.sets.record import is_of_documents
from trmt.storage.locks import is_locked
from trmt.training.history import LOG, read_times

ModelState = Literal[
    "finished",  # a run whose training ended
    "training",  # a run that a process is at work on
    "stopped",  # a run whose training can be resumed
    "imported",  # a bundle that trmt import wrote
    "average",  # an average of checkpoints outside of their run
    "int8",  # a quantised bundle
    "bundle",  # another bundle
    "comes with trmt",
    "damaged",
]
UNFINISHED = ("training", "stopped")


@dataclass(frozen=True, kw_only=True)
class ListedModel:
    """A model or run in models/."""

    name: str
    folder: Path
    state: ModelState
    bundle: Path | None = None  # what the folder stands for; None before the first checkpoint
    manifest: Manifest | None = None  # of that bundle
    time: float = 0.0  # when it was finished, in seconds since 1970; 0 if that is unknown
    problem: str = ""  # what is wrong with a damaged one
    pretrained: bool = False  # whether it was pretrained on documents and does not translate

    @property
    def can_be_default(self) -> bool:
        """Whether it may be used where no model is named."""
        if not self.manifest or self.state in (*UNFINISHED, "damaged", "comes with trmt"):
            return False
        return not (self.pretrained or self.manifest.worse_than_best())


# The default


def find_model(folder: Path | str | None = None) -> Path:
    """The bundle that a folder or name stands for; without a name the default one, which is printed."""
    if folder:
        return checkpoints.find_bundle(Path(folder))
    found, why = default_model()
    console.say(f"model: {found} ({why})")
    return found


def default_model(models: Path = MODELS) -> tuple[Path, str]:
    """The bundle to use where none is named, and why that one.

    It is $TRMT_MODEL, else the newest finished run or complete bundle in models/, else the one that comes
    with trmt. Quantised bundles come after all others.
    """
    if named := os.environ.get("TRMT_MODEL"):
        try:
            return checkpoints.find_bundle(Path(named)), "$TRMT_MODEL"
        except BundleError as error:
            raise BundleError(f"the environment variable TRMT_MODEL is {named}, but {error}") from error
    listed = list_models(models)
    usable = [model for model in listed if model.can_be_default]
    if usable:
        newest = max(usable, key=lambda model: (model.state != "int8", model.time, model.name))
        others = "the newest finished one" if len(usable) > 1 else "the only finished one"
        return checkpoints.find_bundle(newest.folder), f"{others} in {models}/"
    if shipped := checkpoints.shipped_models():
        return shipped[0], f"comes with trmt; there is no finished one in {models}/"
    if listed:
        names = ", ".join(f"{model.folder} ({model.state})" for model in listed)
        raise BundleError(
            f"no model in {models}/ is finished and can translate: {names}; name the one to use, or set "
            "TRMT_MODEL"
        )
    raise BundleError(
        f"there is no model in {models}/; name one, set TRMT_MODEL, or train one with trmt train"
    )


def newest_run(models: Path = MODELS) -> Path:
    """The run with checkpoints whose log was written last, by the log's own times; it is printed."""
    runs = [folder for folder in checkpoints.list_runs(models) if checkpoints.list_checkpoints(folder)]
    if not runs:
        raise BundleError(f"there is no run in {models}/; name one, or train one with trmt train")
    newest = max(runs, key=lambda folder: (read_times(folder / LOG).last, folder.name))
    state = _run_state(newest)
    why = "" if len(runs) == 1 else "the newest"
    if state in UNFINISHED:
        why += (", " if why else "") + "not finished"
    console.say(f"run: {newest}" + (f" ({why})" if why else ""))
    return newest


# The list


def list_models(models: Path = MODELS) -> list[ListedModel]:
    """The models and runs in a folder by name, those first that are newest."""
    found = [_listed(folder) for folder in checkpoints.list_runs(models) if checkpoints.is_model(folder)]
    return sorted(found, key=lambda model: (-model.time, model.name))


def shipped_elsewhere(models: Path = MODELS) -> list[ListedModel]:
    """The models that come with trmt, without those that are in `models` anyway."""
    here = models.resolve()
    return [_listed(folder) for folder in checkpoints.shipped_models() if folder.resolve().parent != here]


def _listed(folder: Path) -> ListedModel:
    try:
        is_bundle = bundles.is_bundle(folder)
        if not (is_bundle or bundles.is_bundle(folder / AVERAGE) or checkpoints.list_checkpoints(folder)):
            return ListedModel(name=folder.name, folder=folder, state=_run_state(folder))
        bundle, _ = checkpoints.bundle_of(folder)
        manifest = bundles.read_manifest(bundle)
    except TrmtError as error:
        return ListedModel(name=folder.name, folder=folder, state="damaged", problem=str(error))
    return ListedModel(
        name=folder.name,
        folder=folder,
        state=_bundle_state(manifest) if is_bundle else _run_state(folder),
        bundle=bundle,
        manifest=manifest,
        time=manifest.created if is_bundle else read_times(folder / LOG).ended or manifest.created,
        pretrained=_is_pretrained(folder, manifest),
    )


def _bundle_state(manifest: Manifest) -> ModelState:
    if manifest.shipped:
        return "comes with trmt"
    if manifest.precision == "int8":
        return "int8"
    if manifest.average:
        return "average"
    return "imported" if "imported" in manifest.training else "bundle"


def _run_state(folder: Path) -> ModelState:
    """The state of a run: it is finished if training ended at the step of its newest checkpoint."""
    found = checkpoints.list_checkpoints(folder)
    if not found and not (folder / CONFIG).is_file():
        return "average"  # copied without its run
    end_step = read_times(folder / LOG).end_step
    if end_step is not None and (not found or end_step >= found[-1].step):
        return "finished"
    return "training" if is_locked(folder) else "stopped"


def _is_pretrained(folder: Path, manifest: Manifest) -> bool:
    """Whether a network was pretrained on documents, by its architecture or the record of its data."""
    return split_variants(manifest.architecture)[0] in ENCODERS or is_of_documents(folder)


# For people


def as_tree(model: ListedModel, *, default: Path | None) -> dict[str, Any]:
    """A model's facts for JSON; `default` is the bundle that is used where none is named."""
    manifest = model.manifest
    return {
        "name": model.name,
        "folder": str(model.folder),
        "state": model.state,
        "bundle": str(model.bundle) if model.bundle else None,
        "default": bool(default and model.bundle and model.bundle.resolve() == default.resolve()),
        "languages": list(manifest.languages) if manifest else [],
        "parameters": count_parameters(model.bundle, manifest) if model.bundle and manifest else None,
        "bytes": sum(file.stat().st_size for file in model.folder.rglob("*") if file.is_file()),
        "scores": list(manifest.scores) if manifest else [],
        "time": model.time or None,
        **({"problem": model.problem} if model.problem else {}),
    }


def count_parameters(bundle: Path, manifest: Manifest) -> int | None:
    """The number of parameters, from the header of the weights' file; None if that is damaged."""
    try:
        with safe_open(bundle / bundles.WEIGHTS, framework="pt") as weights:
            names = [name for name in weights.keys() if not name.endswith(quantised.SCALE)]  # noqa: SIM118
            return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    except (OSError, SafetensorError):
        return None
