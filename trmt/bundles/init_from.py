"""What a network can take over from another: `--init-from RUN`, all of it, or `RUN:encoder`, the encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trmt.bundles.bundles import Manifest
from trmt.bundles.upgrade import POSITIONS, fold_segments, without_segments
from trmt.config import Tree
from trmt.errors import BundleError, ConfigError
from trmt.registry import ENCODER_VARIANTS, split_variants

ENCODER = ":encoder"
# The options of an encoder, which all networks that have one call alike
FIELDS = (
    "d_model",
    "feed_forward",
    "heads",
    "encoder_layers",
    "norm_position",
    "norm",
    "norm_epsilon",
    "embedding_norm",
    "embedding_scale",
    "activation",
    "positions",
    "max_positions",
)
# Options that only some encoders have
SOME = ("position_offset", "position_columns", "max_distance", "buckets")


@dataclass(frozen=True)
class EncoderOptions:
    """What makes an encoder."""

    variants: list[str]  # of the Transformer
    network: Tree


def split(place: Path) -> tuple[Path, bool]:
    """The path of a bundle, and whether only its encoder is meant."""
    text = str(place)
    if text.endswith(ENCODER) and not place.exists():
        return Path(text.removesuffix(ENCODER)), True
    return place, False


def encoder_options(manifest: Manifest, *, where: Path) -> EncoderOptions:
    """What a network must have to take over the encoder of a bundle."""
    missing = [name for name in FIELDS if name not in manifest.network]
    if missing:
        raise BundleError(
            f"{where} is a network of architecture {manifest.architecture!r}, which has no encoder to take "
            f"over (no {missing[0]!r}); name a run of trmt pretrain or of a transformer"
        )
    network = without_segments(manifest.network)
    network = {name: network[name] for name in (*FIELDS, *SOME) if name in network}
    _, variants = split_variants(manifest.architecture)
    return EncoderOptions([each for each in variants if each in ENCODER_VARIANTS], network)


def check_options(
    architecture: str, network: Mapping[str, Any], encoder: EncoderOptions, *, where: Path
) -> None:
    """Refuse settings that would make the encoder another one."""
    for name, value in encoder.network.items():
        if network.get(name) != value:
            raise ConfigError(
                f"network.{name} = {network.get(name)!r} is set, and the encoder of {where} has {name} = "
                f"{value!r}; leave it out, or begin without --init-from"
            )
    other = set(ENCODER_VARIANTS) & set(split_variants(architecture)[1]) - set(encoder.variants)
    if other:
        raise ConfigError(
            f"architecture = {architecture!r} has an encoder with {min(other)!r}, which that of {where} has not; "
            "choose another, or begin without --init-from"
        )


def with_encoder(
    state: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, where: str
) -> dict[str, Tensor]:
    """A network's weights with those of the encoder in `weights` put in."""
    taken, weights = dict(state), dict(weights)
    if "segments" in weights and POSITIONS[0] in state:
        fold_segments(weights, weights.pop("segments"), state[POSITIONS[0]].shape[1])
        taken[POSITIONS[1]] = weights.get(POSITIONS[1], taken[POSITIONS[1]])
    for name, tensor in state.items():
        if name.startswith("encoder."):
            if name not in weights or weights[name].shape != tensor.shape:
                raise BundleError(f"{where} has no {name!r} of shape {list(tensor.shape)}; they do not fit")
            taken[name] = weights[name]
    for shared in ("encoder.embedding.tokens.weight", "encoder.embedding.frequencies"):
        for name in _same_as(state, shared):
            taken[name] = taken[shared]
    return taken


def _same_as(state: Mapping[str, Tensor], wanted: str) -> list[str]:
    """The names of the tensors that are tied to this one."""
    if wanted not in state:
        return []
    address = state[wanted].data_ptr()
    return [name for name, tensor in state.items() if tensor.data_ptr() == address and name != wanted]
