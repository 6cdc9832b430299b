"""Vectors of positions beside the embeddings of tokens and not added to them.

Of the columns of the hidden size, `position_columns` hold the vector of the position and the others the
embedding. Where an embedding is also the output's matrix, its last columns are used there only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.nets import layers
from trmt.nets.transformer import EncoderConfig, TokenEmbedding, TransformerEncoder


@dataclass(frozen=True, kw_only=True)
class ConcatenatedPositionsConfig(EncoderConfig):
    """The sizes and options of a Transformer with concatenated positions."""

    positions: Literal["sinusoidal", "learned"] = "sinusoidal"
    position_columns: int = 64  # columns of the hidden size that hold the position

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position_columns >= self.d_model:
            raise ConfigError(
                f"position_columns = {self.position_columns} leaves no columns of d_model = {self.d_model} "
                "for tokens; change one"
            )


class ConcatenatedEmbedding(TokenEmbedding):
    """Scaled embeddings of tokens with their positions beside them."""

    positions: Tensor

    def __init__(self, config: ConcatenatedPositionsConfig, tokens: nn.Embedding) -> None:
        super().__init__(config, tokens)
        columns = config.position_columns
        self.columns = config.d_model - columns
        if config.positions == "learned":
            learned = torch.randn(1, config.max_positions, columns) * config.d_model**-0.5
            self.positions = nn.Parameter(learned)
        else:
            table = layers.sinusoids(config.max_positions, columns, offset=config.position_offset)
            self.positions = table[None]

    def embed(self, ids: Tensor, position: Tensor) -> Tensor:
        x = F.embedding(ids, self.tokens.weight) * self.scale
        positions = self.positions[0, position].expand(*x.shape[:-1], -1)
        return torch.cat([x[..., : self.columns], positions.to(x.dtype)], -1)


class ConcatenatedPositions(TransformerEncoder):
    """A Transformer with concatenated positions."""

    config_class = ConcatenatedPositionsConfig

    def make_embedding(
        self, config: EncoderConfig, tokens: nn.Embedding, *, decoder: bool
    ) -> ConcatenatedEmbedding:
        assert isinstance(config, ConcatenatedPositionsConfig)
        tied = getattr(config, "tied", "all")
        if tied == "none" or (tied == "target" and not decoder):  # only the output uses the other columns
            columns = config.d_model - config.position_columns
            tokens = layers.embedding(tokens.num_embeddings, columns)
        return ConcatenatedEmbedding(config, tokens)
