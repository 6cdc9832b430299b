"""What a network takes over from another: `--init-from RUN`, all weights, or `RUN:encoder`, the encoder's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trmt.bundles.bundles import Manifest
from trmt.config import Tree
from trmt.errors import BundleError, ConfigError

ENCODER_SUFFIX = ":encoder"
# The fields of a network's config that its encoder depends on; they have the same names in all networks.
ENCODER_FIELDS = (
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
# More such fields, with the values of bundles that were written before the fields existed.
NEWER_ENCODER_FIELDS: Mapping[str, Any] = {
    "residual": True,
    "score_scale": True,
    "position_join": "add",
    "position_width": 64,
    "reach": 16,
    "buckets": 32,
    "farthest": 128,
}
ENCODER_PREFIXES = (
    "source_embedding.",
    "source_turns",
    "encoder.",
    "encoder_norm.",
    "encoder_apart",
    "embedding_norms.0.",
    "segments",
)
TWO_SIDED = ("positions", "biases")  # tensors that hold the encoder's part at index 0, the decoder's at 1
SHARED = ("source_embedding.weight", "source_turns")  # tensors of the encoder that others may be tied to


def split_encoder_suffix(path: Path) -> tuple[Path, bool]:
    """The path of a bundle, and whether only its encoder is meant."""
    text = str(path)
    if text.endswith(ENCODER_SUFFIX) and not path.exists():
        return Path(text.removesuffix(ENCODER_SUFFIX)), True
    return path, False


def encoder_fields(manifest: Manifest, *, where: Path) -> Tree:
    """The fields of a network that have to be those of the bundle whose encoder it takes over."""
    missing = [name for name in ENCODER_FIELDS if name not in manifest.network]
    if missing:
        raise BundleError(
            f"{where} is a network of architecture {manifest.architecture!r}, which has no encoder to take "
            f"over (no {missing[0]!r}); name a run of trmt pretrain or of a transformer"
        )
    network = {**NEWER_ENCODER_FIELDS, **manifest.network}
    return {name: network[name] for name in (*ENCODER_FIELDS, *NEWER_ENCODER_FIELDS)}


def check_fields(network: Mapping[str, Any], expected: Mapping[str, Any], *, where: Path) -> None:
    """Raise an error if a network's settings do not fit the encoder that it takes over."""
    for name, value in expected.items():
        if network.get(name) != value:
            raise ConfigError(
                f"network.{name} = {network.get(name)!r} does not fit the encoder of {where}, which has "
                f"{name} = {value!r}; remove that setting, or train without --init-from"
            )


def with_encoder(
    state: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, where: str
) -> dict[str, Tensor]:
    """A network's weights, with those of its encoder replaced by those in `weights`."""
    merged = dict(state)
    for name, tensor in state.items():
        if name in TWO_SIDED:
            if name not in weights or weights[name].shape[1:] != tensor.shape[1:]:
                raise BundleError(f"{where} has no {name!r} of the network's size; its encoder does not fit")
            merged[name] = tensor.clone()
            merged[name][0] = weights[name][0]
        elif name.startswith(ENCODER_PREFIXES):
            if name not in weights or weights[name].shape != tensor.shape:
                raise BundleError(
                    f"{where} has no {name!r} of shape {list(tensor.shape)}; its encoder does not fit"
                )
            merged[name] = weights[name]
    for shared in SHARED:
        for name in _tied_to(state, shared):
            merged[name] = merged[shared]
    return merged


def _tied_to(state: Mapping[str, Tensor], shared: str) -> list[str]:
    """The names of the other tensors that share the storage of this one."""
    if shared not in state:
        return []
    address = state[shared].data_ptr()
    return [name for name, tensor in state.items() if tensor.data_ptr() == address and name != shared]
