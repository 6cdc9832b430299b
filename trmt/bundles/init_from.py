"""What a network can take over from another: `--init-from RUN`, all of it, or `RUN:encoder`, what reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trmt.bundles.bundles import Manifest
from trmt.config import Tree
from trmt.errors import BundleError, ConfigError

ENCODER = ":encoder"
# What an encoder is made of; networks that have one name these alike.
FIELDS = (
    "width",
    "feed_forward",
    "heads",
    "encoder_layers",
    "norm_place",
    "norm",
    "epsilon",
    "embedding_norm",
    "embedding_scale",
    "segments",
    "activation",
    "positions",
    "longest",
)
# What networks also have in common; those of bundles that do not say have it like this.
OPTIONS: Mapping[str, Any] = {
    "residual": True,
    "score_scale": True,
    "position_join": "add",
    "position_width": 64,
    "reach": 16,
    "buckets": 32,
    "farthest": 128,
}
PREFIXES = (
    "source_embedding.",
    "source_turns",
    "encoder.",
    "encoder_norm.",
    "encoder_apart",
    "embedding_norms.0.",
    "segments",
)
SIDES = ("positions", "biases")  # tables with a part for each side; the encoder's is the first


def split(place: Path) -> tuple[Path, bool]:
    """The place of a bundle, and whether only its encoder is meant."""
    text = str(place)
    if text.endswith(ENCODER) and not place.exists():
        return Path(text.removesuffix(ENCODER)), True
    return place, False


def encoder_fields(manifest: Manifest, *, where: Path) -> Tree:
    """The fields of a network that must be as those of the bundle whose encoder it takes over."""
    missing = [name for name in FIELDS if name not in manifest.network]
    if missing:
        raise BundleError(
            f"{where} is a network of architecture {manifest.architecture!r}, which has no encoder to take "
            f"over (no {missing[0]!r}); name a run of trmt pretrain or of a transformer"
        )
    network = {**OPTIONS, **manifest.network}
    return {name: network[name] for name in (*FIELDS, *OPTIONS)}


def check_fields(network: Mapping[str, Any], wanted: Mapping[str, Any], *, where: Path) -> None:
    """Refuse settings that would make the encoder another one."""
    for name, value in wanted.items():
        if network.get(name) != value:
            raise ConfigError(
                f"network.{name} = {network.get(name)!r} is set, and the encoder of {where} has {name} = "
                f"{value!r}; leave it out, or begin without --init-from"
            )


def with_encoder(
    state: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, where: str
) -> dict[str, Tensor]:
    """A network's weights with those of the encoder in `weights` put in."""
    taken = dict(state)
    for name, tensor in state.items():
        if name in SIDES:
            if name not in weights or weights[name].shape[1:] != tensor.shape[1:]:
                raise BundleError(f"{where} has no table of {name} like the network's; they do not fit")
            taken[name] = tensor.clone()
            taken[name][0] = weights[name][0]
        elif name.startswith(PREFIXES):
            if name not in weights or weights[name].shape != tensor.shape:
                raise BundleError(f"{where} has no {name!r} of shape {list(tensor.shape)}; they do not fit")
            taken[name] = weights[name]
    for shared in ("source_embedding.weight", "source_turns"):
        for name in _same_as(state, shared):
            taken[name] = taken[shared]
    return taken


def _same_as(state: Mapping[str, Tensor], wanted: str) -> list[str]:
    """The names of the tensors that are tied to this one."""
    if wanted not in state:
        return []
    address = state[wanted].data_ptr()
    return [name for name, tensor in state.items() if tensor.data_ptr() == address and name != wanted]
