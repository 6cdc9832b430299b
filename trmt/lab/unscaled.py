"""A Transformer whose scores are not divided by the square root of the head dimension."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trmt.nets.layers import Sublayer
from trmt.nets.transformer import DecoderLayer, EncoderConfig, EncoderLayer, TransformerEncoder


class UnscaledEncoderLayer(EncoderLayer):
    """An encoder layer that multiplies queries by what attention divides scores by."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.factor = math.sqrt(config.head_dim)

    def self_sublayer(self, attention: Callable[[Tensor], Tensor]) -> Sublayer:
        def unscaled(qkv: Tensor) -> Tensor:
            query, key, value = qkv.chunk(3, -1)
            return attention(torch.cat([query * self.factor, key, value], -1))

        return super().self_sublayer(unscaled)


class UnscaledDecoderLayer(UnscaledEncoderLayer, DecoderLayer):
    """A decoder layer that does the same."""

    def cross_sublayer(self, attention: Callable[[Tensor], Tensor]) -> Sublayer:
        return super().cross_sublayer(lambda query: attention(query * self.factor))


class UnscaledScores(TransformerEncoder):
    """A Transformer with unscaled scores."""

    encoder_layer = UnscaledEncoderLayer
    decoder_layer = UnscaledDecoderLayer
