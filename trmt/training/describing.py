"""What a run folder says of itself: its recipe with every default, its data, how far it came and how well."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from trmt.bundles.bundles import Manifest
from trmt.bundles.checkpoints import CONFIG
from trmt.config import build, tree_of
from trmt.errors import TrmtError
from trmt.registry import NETWORKS, OBJECTIVES, resolve
from trmt.sets.shards import dev_file
from trmt.sets.unchanged import RECORD
from trmt.training import planning
from trmt.training.history import LOG, TRAIN, VALIDATE, History, Point, best
from trmt.training.recipe import Recipe, flat, read_recipe

Facts = dict[str, Any]


def is_run(folder: Path) -> bool:
    """Whether it is the folder of a training run, which may have no checkpoint yet."""
    return (folder / CONFIG).is_file()


def run_of(bundle: Path) -> Path | None:
    """The run folder that a bundle lies in, if it lies in one."""
    parent = bundle.resolve().parent
    return parent if is_run(parent) else None


# What it was to be


def recipe(run: Path) -> Recipe:
    """The recipe that a run was begun with."""
    return read_recipe(run / CONFIG)


def settings(run: Path) -> Facts:
    """Every setting of a run by its dotted name, those that its recipe leaves to defaults included."""
    found = recipe(run)
    tree = tree_of(found)
    tree["network"] = _with_defaults(NETWORKS, found.architecture, found.network)
    tree["loss"] = _with_defaults(OBJECTIVES, found.objective, found.loss)
    return flat(tree)


def _with_defaults(table: Mapping[str, str], name: str, options: Facts) -> Facts:
    try:
        return tree_of(build(resolve(table, name).config_class, options, where=name))
    except TrmtError:  # code outside trmt, or of another version: what is written has to do
        return options


def origin(run: Path) -> Facts:
    """What a run was begun with."""
    found = planning.read_origin(run)
    return tree_of(found) if found else {}


def data(run: Path) -> Facts:
    """The prepared set that a run was begun with, as it was then."""
    try:
        index = json.loads((run / RECORD).read_bytes())
        splits, files = index["splits"], index["files"]
        languages = list(index.get("languages", ()))
        corpora = [{"name": each["name"], "pairs": each["kept"]} for each in index["corpora"]]
    except (OSError, ValueError, KeyError, TypeError):  # of a run without a record
        return {}
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


# What became of it


def history(run: Path) -> History | None:
    """The log of a run; None before it has one."""
    return History.read(run / LOG) if (run / LOG).is_file() else None


def progress(found: History) -> Facts:
    """How far a run came: steps, target tokens, seconds of training, and its usual speed."""
    if not found.entries:
        return {"step": 0}
    last = found.entries[-1]
    speeds = [point.value for point in found.curve(TRAIN, "tokens_per_second")]
    known = {"step": last["step"], "target_tokens": last.get("tokens"), "seconds": last.get("elapsed")}
    known["tokens_per_second"] = median(speeds) if speeds else None
    return {name: value for name, value in known.items() if value is not None}


def best_scores(found: History) -> list[Facts]:
    """The best of each metric on the dev set, with the step and the signature."""
    points = [(metric, best(found.curve(VALIDATE, metric), metric)) for metric in found.metrics()]
    return [
        {"metric": metric, "value": point.value, "step": point.step, "signature": _signature(found, metric)}
        for metric, point in points
        if isinstance(point, Point) and math.isfinite(point.value)
    ]


def _signature(found: History, metric: str) -> str:
    """The signature of a metric's newest score."""
    for entry in reversed(found.entries):
        for score in entry.get("scores", ()):
            if score["metric"] == metric:
                return str(score.get("signature", ""))
    return ""


# Its network


def parts(weights: Mapping[str, Tensor], manifest: Manifest) -> dict[str, int]:
    """How many numbers each part of a network has; those it shares are counted once."""
    counts: dict[str, int] = {}
    for name, tensor in weights.items():
        if name not in manifest.tied:
            part = name.partition(".")[0]
            counts[part] = counts.get(part, 0) + math.prod(tensor.shape)
    return counts


def shared(manifest: Manifest) -> dict[str, str]:
    """The parts that are another one, by the name of that one."""
    pairs = {name.partition(".")[0]: other.partition(".")[0] for name, other in manifest.tied.items()}
    return {name: other for name, other in pairs.items() if name != other}
