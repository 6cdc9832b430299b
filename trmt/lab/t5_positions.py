"""T5's biases (Raffel et al., arXiv 1910.10683): a learned number for each head and bucket of distances.

Axes: S sentence, Q queries, J keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.lab.distance_attention import BiasedAttention
from trmt.nets.transformer import Decoder, EncoderConfig


@dataclass(frozen=True, kw_only=True)
class T5PositionsConfig(EncoderConfig):
    """The sizes and options of a Transformer with T5's biases."""

    positions: Literal["t5"] = "t5"  # type: ignore[assignment]
    buckets: int = 32  # of distances; in the encoder half of them for each direction
    max_distance: int = 128  # beyond it, distances share the last bucket

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buckets % 4 or self.max_distance <= self.buckets // 2:
            raise ConfigError(
                f"buckets = {self.buckets} must be a multiple of 4 and max_distance = {self.max_distance} "
                "more than half of it; change one"
            )


class T5Positions(BiasedAttention):
    """A Transformer with T5's biases, which all layers of the encoder share, and all of the decoder."""

    config: T5PositionsConfig
    config_class = T5PositionsConfig

    def __init__(self, config: T5PositionsConfig) -> None:
        super().__init__(config)
        decoder: Decoder | None = getattr(self, "decoder", None)
        for stack in (self.encoder, decoder) if decoder else (self.encoder,):
            # An axis more than needed: int8 quantises matrices, which would be too coarse for biases.
            bias = torch.randn(1, config.buckets, config.heads) * config.d_model**-0.5
            stack.register_parameter("distance_bias", nn.Parameter(bias))

    def bias(self, distance_SQJ: Tensor, *, decoder: bool) -> Tensor:
        buckets, max_distance = self.config.buckets, self.config.max_distance
        index_SQJ = bucket(
            distance_SQJ, buckets=buckets, max_distance=max_distance, bidirectional=not decoder
        )
        table: Tensor = getattr(self, "decoder" if decoder else "encoder").distance_bias[0]
        return F.embedding(index_SQJ, table).permute(0, 3, 1, 2)


def bucket(distance: Tensor, *, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """The bucket of each distance: near ones have their own, farther ones share them by their logarithm."""
    before = (-distance).clamp(min=0)
    first = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first, before = (distance > 0) * buckets, distance.abs()
    exact = buckets // 2
    share = torch.log(before.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    shared = exact + (share * (buckets - exact)).long()
    return first + torch.where(before < exact, before, shared.clamp(max=buckets - 1))
