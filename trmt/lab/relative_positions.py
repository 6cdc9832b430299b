"""Relative positions (Shaw et al., arXiv 1803.02155): learned vectors of distances, added to keys and values.

Axes: S sentence, Q queries, J keys, H heads, P head dimension, R distances, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.lab.distance_attention import QKV, DistanceAttention
from trmt.nets.transformer import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class RelativePositionsConfig(EncoderConfig):
    """The sizes and options of a Transformer with relative positions."""

    positions: Literal["relative"] = "relative"  # type: ignore[assignment]
    max_distance: int = 16  # farther tokens have the vectors of this distance


class RelativePositions(DistanceAttention):
    """A Transformer with relative positions: each layer has vectors of its own, which its heads share."""

    config: RelativePositionsConfig
    config_class = RelativePositionsConfig

    def __init__(self, config: RelativePositionsConfig) -> None:
        super().__init__(config)
        sizes: list[tuple[nn.Module, int, int]] = [
            (self.encoder, config.encoder_layers, 2 * config.max_distance + 1)
        ]
        if decoder_layers := getattr(config, "decoder_layers", 0):
            sizes.append((self.get_submodule("decoder"), decoder_layers, config.max_distance + 1))
        for stack, count, distances in sizes:
            vectors = torch.randn(count, 2, distances, config.head_dim) * config.head_dim**-0.5
            stack.register_parameter("distance_vectors", nn.Parameter(vectors))

    def vectors(self, layer: int, distance_SQJ: Tensor, *, decoder: bool) -> tuple[Tensor, Tensor]:
        """The vectors [2, R, P] of a layer for keys and for values, and which of them each distance has."""
        most = self.config.max_distance
        table: Tensor = getattr(self, "decoder" if decoder else "encoder").distance_vectors
        return table[layer], distance_SQJ.clamp(-most, 0 if decoder else most) + most

    def attend(
        self, layer: int, qkv: QKV, mask: Tensor, distance_SQJ: Tensor, *, decoder: bool, dropout: float = 0.0
    ) -> Tensor:
        vectors_2RP, index_SQJ = self.vectors(layer, distance_SQJ, decoder=decoder)
        if self.training or distance_SQJ.device.type != "cpu":
            return relative_attention(qkv, mask, vectors_2RP, index_SQJ, dropout)
        # In double precision, rounded once: then the order of sums, which padding changes, does not matter.
        query, key, value = (x.double() for x in qkv)
        vectors_2RP, mask = vectors_2RP.double(), mask.double()
        return relative_attention((query, key, value), mask, vectors_2RP, index_SQJ, dropout).to(qkv[0].dtype)

    def weights(self, layer: int, qkv: QKV, mask: Tensor, distance_SQJ: Tensor, *, decoder: bool) -> Tensor:
        vectors_2RP, index_SQJ = self.vectors(layer, distance_SQJ, decoder=decoder)
        return relative_weights(qkv, mask, vectors_2RP[0], index_SQJ)


def relative_attention(
    qkv: QKV, mask: Tensor, vectors_2RP: Tensor, index_SQJ: Tensor, dropout: float
) -> Tensor:
    """Attention with vectors added to keys and values: [S, Q, D]."""
    key_RP, value_RP = vectors_2RP
    weights_SHQJ = relative_weights(qkv, mask, key_RP, index_SQJ)
    weights_SHQJ = F.dropout(weights_SHQJ, dropout) if dropout else weights_SHQJ
    index = index_SQJ[:, None].expand_as(weights_SHQJ)
    shape = (*weights_SHQJ.shape[:3], len(value_RP))
    # The weights of all keys at the same distance together, which all add the same vector
    weights_SHQR = weights_SHQJ.new_zeros(shape).scatter_add(-1, index, weights_SHQJ)
    out_SHQP = weights_SHQJ.to(qkv[2].dtype) @ qkv[2] + weights_SHQR.to(value_RP.dtype) @ value_RP
    return out_SHQP.transpose(1, 2).flatten(2)


def relative_weights(qkv: QKV, mask: Tensor, key_RP: Tensor, index_SQJ: Tensor) -> Tensor:
    """The weights of that attention: [S, H, Q, J]."""
    query_SHQP, key_SHJP, _ = qkv
    # Each query with the vector of each distance once, gathered for the keys at that distance
    score_SHQR = query_SHQP @ key_RP.t()
    index = index_SQJ[:, None].expand(*query_SHQP.shape[:2], -1, -1)
    score_SHQJ = query_SHQP @ key_SHJP.transpose(-2, -1) + score_SHQR.gather(-1, index)
    return (score_SHQJ / math.sqrt(query_SHQP.shape[-1]) + mask).softmax(-1)
