"""Batch normalisation (Ioffe and Szegedy, arXiv 1502.03167) in the place of all norms of a Transformer.

Axes: N tokens of a batch in a row, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from trmt.nets.base import Products
from trmt.nets.transformer import EncoderConfig, TransformerEncoder


class BatchNorm(nn.BatchNorm1d):
    """Each column with mean 0 and variance 1 over the packed tokens of a batch [N, D]; there is no padding.

    In inference it uses running means, and a token gets the same whatever stands beside it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) < 2:  # one token has no variance
            return FrozenBatchNorm(self)(x)
        return super().forward(x.float())

    def frozen_as(self, products: Products) -> FrozenBatchNorm:
        return FrozenBatchNorm(self)


class FrozenBatchNorm(nn.Module):
    """A batch norm in inference."""

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None, "it has running statistics"
        self.scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        self.shift = norm.bias.detach() - norm.running_mean * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


@dataclass(frozen=True, kw_only=True)
class BatchNormConfig(EncoderConfig):
    """The sizes and options of a Transformer with batch normalisation."""

    norm: Literal["batch"] = "batch"  # type: ignore[assignment]

    def make_norm(self) -> nn.Module:
        return BatchNorm(self.d_model, eps=self.norm_epsilon or 1e-5)


class BatchNormalised(TransformerEncoder):
    """A Transformer with batch normalisation."""

    config_class = BatchNormConfig
    couples_batch = True
