"""BERT (Devlin et al., arXiv 1810.04805): the Transformer's encoder with two heads to learn to read by.

One head tells which pieces were masked, the other whether the second part of a text follows the first. Both
are left behind when the encoder moves on to translate.

Axes: S sentence, M tokens in a row, N tokens that are asked for, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.nets import fused, layers
from trmt.nets.base import Network, Output, Source
from trmt.nets.positions import Kind, PositionConfig
from trmt.nets.transformer_layers import Encoder

DEVIATION = 0.02  # of fresh embeddings, as in the paper's code


@dataclass(frozen=True, kw_only=True)
class MaskedEncoderConfig(PositionConfig):
    """The sizes and options of a masked encoder; the defaults are BERT base."""

    source_vocabulary: int
    width: int = 768
    feed_forward: int = 3072
    heads: int = 12
    encoder_layers: int = 12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    norm_place: Literal["post", "pre"] = "post"
    norm: Literal["layer", "rms", "batch"] = "layer"
    epsilon: float = 1e-12  # of the norms
    residual: bool = True  # whether what goes into a sublayer is added to what comes out of it
    score_scale: bool = True  # whether scores of attention are divided by the square root of a head's width
    embedding_norm: bool = True
    embedding_scale: bool = False
    segments: int = 2
    activation: Literal["relu", "gelu", "swiglu"] = "gelu"
    positions: Kind = "learned"
    longest: int = 512  # positions there are, where there is a table of them

    def __post_init__(self) -> None:
        layers.check_sizes(self)
        self.check_positions()


class MaskedEncoder(Encoder, Network):
    """The encoder and its two heads."""

    config_class = MaskedEncoderConfig
    in_row = True
    layers_called_once = True

    def __init__(self, config: MaskedEncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.make_encoder(config, nn.Embedding(config.source_vocabulary, width), sides=1)
        self.guess = layers.xavier(fused.Linear(width, width))
        self.guess_norm = layers.norm(config.norm, width, config.epsilon)
        self.guess_bias = nn.Parameter(torch.zeros(config.source_vocabulary))
        self.summary = layers.xavier(fused.Linear(width, width))
        self.follows = layers.xavier(nn.Linear(width, 2))
        nn.init.normal_(self.source_embedding.weight, std=DEVIATION)
        for name in ("positions", "segments"):
            if isinstance(parameter := getattr(self, name, None), nn.Parameter):
                nn.init.normal_(parameter, std=DEVIATION)

    def forward(self, source: Source, *, want: Collection[str] = ()) -> Output:
        return Output(self.read(source))

    def readout(self, hidden_ND: Tensor) -> Tensor:
        """Which piece stands there: logits [N, V]."""
        guess_ND = self.guess_norm(F.gelu(self.guess(hidden_ND)))
        return F.linear(guess_ND, self.source_embedding.weight, self.guess_bias)

    def judge(self, first_SD: Tensor) -> Tensor:
        """Whether the second part follows the first, from what became of each first token: logits [S, 2].

        The first column is for those that do.
        """
        return self.follows(self.summary(first_SD).tanh())
