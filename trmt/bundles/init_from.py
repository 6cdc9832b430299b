"""What a network takes over from another: `--init-from RUN`, all weights, or `RUN:encoder`, the encoder's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trmt.bundles import bundles, consistency
from trmt.bundles.bundles import Manifest
from trmt.bundles.upgrade import POSITIONS, fold_segments, without_segments
from trmt.config import Tree
from trmt.errors import BundleError, ConfigError
from trmt.registry import ENCODER_VARIANTS, split_variants

ENCODER_SUFFIX = ":encoder"
# The options of an encoder; they have the same names in all networks that have one.
ENCODER_FIELDS = (
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
OPTIONAL_FIELDS = ("position_offset", "position_columns", "max_distance", "buckets")
# Tensors of the encoder that others may be tied to
SHARED = ("encoder.embedding.tokens.weight", "encoder.embedding.frequencies.weight")


@dataclass(frozen=True)
class EncoderOptions:
    """What an encoder depends on: the variants of the Transformer, and options."""

    variants: list[str]
    network: Tree


def split_encoder_suffix(path: Path) -> tuple[Path, bool]:
    """The path of a bundle, and whether only its encoder is meant."""
    text = str(path)
    if text.endswith(ENCODER_SUFFIX) and not path.exists():
        return Path(text.removesuffix(ENCODER_SUFFIX)), True
    return path, False


def encoder_options(manifest: Manifest, *, where: Path) -> EncoderOptions:
    """The options of a network that have to be those of the bundle whose encoder it takes over."""
    missing = [name for name in ENCODER_FIELDS if name not in manifest.network]
    if missing:
        raise BundleError(
            f"{where} is a network of architecture {manifest.architecture!r}, which has no encoder to take "
            f"over (no {missing[0]!r}); name a run of trmt pretrain or of a transformer"
        )
    network = without_segments(manifest.network)
    options = {name: network[name] for name in (*ENCODER_FIELDS, *OPTIONAL_FIELDS) if name in network}
    _, variants = split_variants(manifest.architecture)
    return EncoderOptions([each for each in variants if each in ENCODER_VARIANTS], options)


def check_options(
    architecture: str, network: Mapping[str, Any], encoder: EncoderOptions, *, where: Path
) -> None:
    """Raise an error if a network's settings do not fit the encoder that it takes over."""
    for name, value in encoder.network.items():
        if network.get(name) != value:
            raise ConfigError(
                f"network.{name} = {network.get(name)!r} does not fit the encoder of {where}, which has "
                f"{name} = {value!r}; remove that setting, or train without --init-from"
            )
    others = set(ENCODER_VARIANTS) & set(split_variants(architecture)[1]) - set(encoder.variants)
    if others:
        raise ConfigError(
            f"architecture = {architecture!r} does not fit the encoder of {where}, which is without "
            f"{min(others)!r}; choose another architecture, or train without --init-from"
        )


def check_network(
    architecture: str, network: Tree, bundle: Path, manifest: Manifest, encoder: EncoderOptions | None
) -> None:
    """Raise an error if a network does not fit the weights that it is to take over; it is not built yet."""
    if ":" in architecture:  # a bundle cannot name it
        return
    where = str(bundle)
    weights = bundles.read_weights(bundle, manifest, verify=False)
    consistency.check_options(encoder.network if encoder else network, weights, where=where)
    net = consistency.build_empty(lambda: bundles.build_network(architecture, network))
    if encoder:
        with_encoder(net.state_dict(), weights, where=where)
    else:
        consistency.check_weights(net, weights, where=where)


def with_encoder(
    state: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, where: str
) -> dict[str, Tensor]:
    """A network's weights, with those of its encoder replaced by those in `weights`."""
    merged, weights = dict(state), dict(weights)
    if "segments" in weights and POSITIONS[0] in state:
        fold_segments(weights, weights.pop("segments"), state[POSITIONS[0]].shape[1])
        merged[POSITIONS[1]] = weights.get(POSITIONS[1], state[POSITIONS[1]])
    for name, tensor in state.items():
        if name.startswith("encoder."):
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
