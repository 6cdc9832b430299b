"""Complex embeddings (Wang et al., arXiv 1912.12333): a position rotates the embedding of a token.

An embedding has d_model / 2 complex numbers r exp(i (w p + t)) at position p, whose real and imaginary parts
stand side by side. Amplitude r and phase t of each token and column are held as the embedding at position 0,
which can be shared with the output; the frequencies w of each token and column are learned, too.

Axes: D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.nets import layers
from trmt.nets.transformer import EncoderConfig, TokenEmbedding, TransformerEncoder


@dataclass(frozen=True, kw_only=True)
class ComplexPositionsConfig(EncoderConfig):
    """The sizes and options of a Transformer with complex embeddings."""

    positions: Literal["complex"] = "complex"  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % 2:
            raise ConfigError(
                f'positions = "complex" rotates pairs of columns; d_model = {self.d_model} is odd; change it'
            )


class Frequencies(nn.Module):
    """The frequencies of all tokens, at first the same: those of the sinusoids."""

    keeps_fp32 = ("weight",)

    def __init__(self, vocabulary: int, d_model: int) -> None:
        super().__init__()
        # An axis more than needed, [1, V, D / 2]: int8 quantises matrices, which would be too coarse here.
        self.weight = nn.Parameter(layers.frequencies(d_model).repeat(1, vocabulary, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight[0])


class ComplexEmbedding(TokenEmbedding):
    """Scaled embeddings of tokens, rotated by their positions."""

    def __init__(self, config: EncoderConfig, tokens: nn.Embedding) -> None:
        super().__init__(config, tokens)
        self.frequencies: nn.Module = Frequencies(tokens.num_embeddings, config.d_model)

    def embed(self, ids: Tensor, position: Tensor) -> Tensor:
        angle = self.frequencies(ids) * position[..., None]
        return layers.rotate(super().embed(ids, position), angle.sin(), angle.cos())


class ComplexPositions(TransformerEncoder):
    """A Transformer with complex embeddings."""

    config_class = ComplexPositionsConfig

    def make_embedding(
        self, config: EncoderConfig, tokens: nn.Embedding, *, decoder: bool
    ) -> ComplexEmbedding:
        embedding = ComplexEmbedding(config, tokens)
        if decoder and getattr(config, "tied", "none") == "all":
            embedding.frequencies = self.encoder.embedding.get_submodule("frequencies")
        return embedding
