"""ALiBi (Press et al., arXiv 2108.12409): scores are lowered by the distance of query and key times a slope.

Axes: S sentence, H heads, Q queries, J keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trmt.lab.distance_attention import BiasedAttention
from trmt.nets.transformer import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class ALiBiConfig(EncoderConfig):
    """The sizes and options of a Transformer with ALiBi."""

    positions: Literal["alibi"] = "alibi"  # type: ignore[assignment]


class ALiBi(BiasedAttention):
    """A Transformer with ALiBi."""

    config_class = ALiBiConfig
    slopes_H: Tensor

    def __init__(self, config: ALiBiConfig) -> None:
        super().__init__(config)
        self.register_buffer("slopes_H", slopes(config.heads), persistent=False)

    def bias(self, distance_SQJ: Tensor, *, decoder: bool) -> Tensor:
        return -self.slopes_H[:, None, None] * distance_SQJ[:, None].abs()


def slopes(heads: int) -> Tensor:
    """For 2^n heads a geometric sequence; other numbers add every second of the next longer sequence."""
    power = 1 << (heads.bit_length() - 1)
    sequence = [2 ** (-8 * number / power) for number in range(1, power + 1)]
    longer = [2 ** (-4 * number / power) for number in range(1, 2 * power + 1, 2)]
    return torch.tensor(sequence + longer[: heads - power])
