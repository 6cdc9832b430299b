"""Facts about a bundle or a run: contents, origin, and how it would run on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trmt.acceleration import accelerated
from trmt.bundles import bundles, checkpoints
from trmt.config import to_tree
from trmt.devices import hardware
from trmt.devices.abilities import abilities
from trmt.devices.choice import choose_device
from trmt.registry import optional
from trmt.training import describing
from trmt.training.models import find_model


def inspect(path: Path | None = None) -> dict[str, Any]:
    """The facts about a bundle or run folder; None is the default model.

    For a run folder, these are the facts about its average or best checkpoint and about the run; before the
    first checkpoint, only about the run.
    """
    path = checkpoints.find_folder(path) if path else None
    run = path if path and describing.is_run(path) and not bundles.is_bundle(path) else None
    if run and not (checkpoints.list_checkpoints(run) or bundles.is_bundle(run / checkpoints.AVERAGE)):
        return {"folder": str(run), "run": _run(run)}
    folder = find_model(path)
    run = run or describing.run_of(folder)
    return _bundle(folder) | ({"run": _run(run)} if run else {})


def _bundle(folder: Path) -> dict[str, Any]:
    manifest = bundles.read_manifest(folder)
    bundles.load_tokenizer(folder, manifest)  # which fits the network, or there is an error
    parts = describing.parameter_counts(bundles.read_weights(folder, manifest), manifest)
    tree = to_tree(manifest)
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
        "best_checkpoint": _best_checkpoint(manifest),
        **_runtime(),
        **{name: tree[name] for name in ("longest", "normalisation", "data", "training", "scores")},
        **{name: tree[name] for name in ("golden", "licences", "versions")},
    }


def _came_from(folder: Path, manifest: bundles.Manifest) -> dict[str, Any]:
    """The origin of the weights: a run, averaged checkpoints, an imported model."""
    run = describing.run_of(folder)
    origin = describing.origin(run) if run else {}
    known = {
        "imported": manifest.training.get("imported"),
        "averaged": manifest.training.get("averaged"),
        "run": str(run) if run else None,
        "init_from": origin.get("init_from"),
        "init_weights": origin.get("init_weights"),
    }
    return {name: value for name, value in known.items() if value}


def _best_checkpoint(manifest: bundles.Manifest) -> dict[str, Any] | None:
    """The best single checkpoint that an average was compared with on the dev set."""
    record = manifest.average
    return {"name": record.best, "scores": list(record.best_scores)} if record and record.best else None


def _runtime() -> dict[str, Any]:
    """The engine, the device and the kernels with which translation would run on this machine."""
    device = choose_device("auto")
    products = optional("trmt.native.products")
    return {
        "steps": "CUDA graphs" if hardware.is_cuda(device) and abilities(device).has("graphs") else "direct",
        "device": device.type,
        "backend": _backend() if device.type == "cpu" else f"PyTorch on {device.type}",
        "processors": [products.PROCESSORS[number] for number in products.processors()] if products else [],
    }


def _backend() -> str:
    """What makes the products on this CPU."""
    backend = accelerated("backend")
    found: str | None = backend() if backend else None
    return found or "pure PyTorch"


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
