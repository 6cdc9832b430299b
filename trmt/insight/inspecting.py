"""What a bundle or a run is, where it came from, and how it would run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trmt.bundles import bundles, checkpoints
from trmt.config import tree_of
from trmt.devices.choice import choose_device
from trmt.native import products
from trmt.nets import linear
from trmt.training import describing
from trmt.translating import TranslateOptions, engine_for


def inspect(place: Path | None = None) -> dict[str, Any]:
    """The facts about the bundle or the run in `place`, by default about the newest bundle.

    Of a run folder that is its average or best checkpoint, and beside it what the run has been through;
    before its first checkpoint, only that.
    """
    run = place if place and describing.is_run(place) and not bundles.is_bundle(place) else None
    if run and not (checkpoints.list_checkpoints(run) or bundles.is_bundle(run / checkpoints.AVERAGE)):
        return {"folder": str(run), "run": _run(run)}
    folder = checkpoints.find_bundle(place) if place else checkpoints.default_bundle()
    run = run or describing.run_of(folder)
    return _bundle(folder) | ({"run": _run(run)} if run else {})


def _bundle(folder: Path) -> dict[str, Any]:
    manifest = bundles.read_manifest(folder)
    parts = describing.parameter_counts(bundles.read_weights(folder, manifest), manifest)
    tree = tree_of(manifest)
    return {
        "folder": str(folder),
        "architecture": manifest.architecture,
        "network": manifest.network,
        "languages": list(manifest.languages),
        "parameters": sum(parts.values()),
        "parts": parts,
        "shared": describing.tied_modules(manifest),
        "bytes": (folder / bundles.WEIGHTS).stat().st_size,
        "precision": manifest.precision,
        "came_from": _came_from(folder, manifest),
        **_would_run(),
        **{name: tree[name] for name in ("longest", "normalisation", "data", "training", "scores")},
        **{name: tree[name] for name in ("golden", "licences", "versions")},
    }


def _came_from(folder: Path, manifest: bundles.Manifest) -> dict[str, Any]:
    """What its weights were made of: a run, checkpoints that were averaged, another program's model."""
    run = describing.run_of(folder)
    begun = describing.origin(run) if run else {}
    known = {
        "imported": manifest.training.get("imported"),
        "averaged": manifest.training.get("averaged"),
        "run": str(run) if run else None,
        "init_from": begun.get("init_from"),
        "init_weights": begun.get("init_weights"),
    }
    return {name: value for name, value in known.items() if value}


def _would_run() -> dict[str, Any]:
    """The engine, the device and the back end that would translate here."""
    device = choose_device("auto")
    return {
        "engine": engine_for(TranslateOptions(), device),
        "device": device.type,
        "backend": linear.backend() if device.type == "cpu" else f"PyTorch on {device.type}",
        "processors": [products.PROCESSORS[number] for number in products.processors()],
    }


def _run(run: Path) -> dict[str, Any]:
    history = describing.history(run)
    return {
        "folder": str(run),
        "settings": describing.settings(run),
        "data": describing.data(run),
        "origin": describing.origin(run),
        "progress": describing.progress(history) if history else {"step": 0},
        "best": describing.best_scores(history) if history else [],
        "checkpoints": [point.step for point in checkpoints.list_checkpoints(run)],
    }
