"""What a bundle is, and how it would run here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trmt import bundles, checkpoints
from trmt.config import tree_of
from trmt.engines import linear
from trmt.kernels import products


def inspect(place: Path | None = None) -> dict[str, Any]:
    """The facts about the bundle in `place`, by default the newest one."""
    folder = checkpoints.find_bundle(place) if place else checkpoints.default_bundle()
    manifest = bundles.read_manifest(folder)
    weights = bundles.read_weights(folder, manifest)
    own = {name: tensor for name, tensor in weights.items() if name not in manifest.tied}
    tree = tree_of(manifest)
    return {
        "folder": str(folder),
        "architecture": manifest.architecture,
        "network": manifest.network,
        "languages": list(manifest.languages),
        "parameters": sum(math.prod(tensor.shape) for tensor in own.values()),
        "bytes": (folder / bundles.WEIGHTS).stat().st_size,
        "precision": manifest.precision,
        "shortlist": manifest.shortlist,
        "backend": linear.backend(),
        "processors": [products.PROCESSORS[number] for number in products.processors()],
        **{name: tree[name] for name in ("longest", "normalisation", "data", "training", "scores")},
        **{name: tree[name] for name in ("golden", "licences", "versions")},
    }
