"""Facts about a run from its folder: recipe with all defaults, data, progress, scores, network size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from trmt.bundles.bundles import Manifest
from trmt.bundles.checkpoints import CONFIG
from trmt.config import to_tree
from trmt.errors import DataError, TrmtError
from trmt.sets.record import read_record
from trmt.sets.shards import PAIRS, SIDES, PreparedSet, dev_file
from trmt.storage.files import checksum
from trmt.training import planning
from trmt.training.history import LOG, TRAIN, VALIDATE, History, Point, best
from trmt.training.recipe import Recipe, flat, read_recipe, with_defaults

Facts = dict[str, Any]


def is_run(folder: Path) -> bool:
    """Whether the folder is a run folder; it may have no checkpoint yet."""
    try:
        return (folder / CONFIG).is_file()
    except OSError:  # the name is too long, or the folder may not be read
        return False


def run_of(bundle: Path) -> Path | None:
    """The run folder that contains a bundle, if there is one."""
    parent = bundle.resolve().parent
    return parent if is_run(parent) else None


# Configuration


def recipe(run: Path) -> Recipe:
    """The recipe of a run."""
    return read_recipe(run / CONFIG)


def settings(run: Path) -> Facts:
    """Every setting of a run by dotted name, including defaults."""
    found = recipe(run)
    with suppress(TrmtError):  # code outside trmt or of another version, whose defaults are unknown
        found = with_defaults(found)
    return flat(to_tree(found))


def origin(run: Path) -> Facts:
    """What a run was started with."""
    found = planning.read_origin(run)
    return to_tree(found) if found else {}


def data(run: Path) -> Facts:
    """The prepared set of a run, as it was when the run was started."""
    index = read_record(run)
    if index is None:
        return {}
    splits, files = index["splits"], index["files"]
    languages = list(index["languages"])
    corpora = [{"name": each.get("name", ""), "pairs": each.get("kept", 0)} for each in index["corpora"]]
    texts = [files.get(dev_file(side), {}).get("sha256") for side in ("source", "target")]
    found = origin(run)
    return {
        "set": found.get("data", ""),
        "fingerprint": found.get("fingerprint", ""),
        "languages": languages,
        "corpora": corpora,
        **{name: split["pairs"] for name, split in splits.items()},
        "dev_text": "".join(texts) if all(texts) else "",
    }


def dev_set(run: Path, folder: Path | None = None) -> PreparedSet | None:
    """The prepared set of a run, or its copy in `folder`, to read the dev set of; None if it has none.

    It is an error if the dev set cannot be read or is another one than when the run was started.
    """
    known = data(run)
    if known and "dev" not in known:
        return None
    where = folder or _data_folder(run)
    try:
        found = PreparedSet.open(where)
        if "dev" not in found.splits and not known:
            return None
        files = [dev_file(side) for side in SIDES] if found.kind == PAIRS else []
        texts = "".join(str(found.index["files"][file]["sha256"]) for file in files)
        damaged = any(checksum(where / file) != found.index["files"][file]["sha256"] for file in files)
    except (TrmtError, OSError, KeyError, TypeError) as error:
        raise DataError(f"the dev set of {run} cannot be read: {error}") from error
    if damaged or (known and texts != known["dev_text"]):
        raise DataError(f"the dev set in {where} has changed since {run} was started")
    return found


def _data_folder(run: Path) -> Path:
    """The prepared set of a run; a relative path is also tried from the folder that has models/ in it."""
    named = planning.read_origin(run)
    if not named:
        raise DataError(f"{run} has no {planning.ORIGIN}, which names its prepared set")
    folder = Path(named.data)
    beside = run.resolve().parent.parent / folder
    return beside if not folder.exists() and beside.is_dir() else folder


# Results


def history(run: Path) -> History | None:
    """The history in a run's log; None before there is one."""
    return History.read(run / LOG) if (run / LOG).is_file() else None


def progress(found: History) -> Facts:
    """Steps, target tokens, seconds of training, and the median speed."""
    if not found.entries:
        return {"step": 0}
    last = found.entries[-1]
    speeds = [point.value for point in found.curve(TRAIN, "tokens_per_second")]
    known = {"step": last["step"], "target_tokens": last.get("tokens"), "seconds": last.get("elapsed")}
    known["tokens_per_second"] = median(speeds) if speeds else None
    return {name: value for name, value in known.items() if value is not None}


def best_scores(found: History) -> list[Facts]:
    """The best score of each metric on the dev set, with its step and signature."""
    points = [(metric, best(found.curve(VALIDATE, metric), metric)) for metric in found.metrics()]
    return [
        {"metric": metric, "value": point.value, "step": point.step, "signature": _signature(found, metric)}
        for metric, point in points
        if isinstance(point, Point) and math.isfinite(point.value)
    ]


def _signature(found: History, metric: str) -> str:
    """The signature of the newest score of a metric."""
    for entry in reversed(found.entries):
        for score in entry.get("scores", ()):
            if score["metric"] == metric:
                return str(score.get("signature", ""))
    return ""


# Network


def parameter_counts(weights: Mapping[str, Tensor], manifest: Manifest) -> dict[str, int]:
    """The number of parameters of each top-level module; tied ones are counted once."""
    counts: dict[str, int] = {}
    for name, tensor in weights.items():
        if name not in manifest.tied:
            module = name.partition(".")[0]
            counts[module] = counts.get(module, 0) + math.prod(tensor.shape)
    return counts


def tied_modules(manifest: Manifest) -> dict[str, str]:
    """The top-level modules whose weights are those of another one, with the name of that one."""
    pairs = {name.partition(".")[0]: other.partition(".")[0] for name, other in manifest.tied.items()}
    return {name: other for name, other in pairs.items() if name != other}
