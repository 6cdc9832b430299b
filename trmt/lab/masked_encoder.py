"""BERT (Devlin et al., arXiv 1810.04805): a Transformer's encoder with two heads for its two training tasks.

One head predicts masked tokens, the other whether the second part of a text follows the first. Both are left
behind when another network begins with the encoder.

Axes: S sentence, M tokens in a row, N masked tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.nets import layers
from trmt.nets.base import NO_WEIGHTS, Output, WantedWeights
from trmt.nets.layers import Linear, Spans
from trmt.nets.ragged import Source
from trmt.nets.transformer import EncoderConfig, TransformerEncoder, Weights

DEVIATION = 0.02  # of fresh embeddings, as in the paper's code


@dataclass(frozen=True, kw_only=True)
class MaskedEncoderConfig(EncoderConfig):
    """The sizes and options of a masked encoder; the defaults are BERT base."""

    d_model: int = 768
    feed_forward: int = 3072
    heads: int = 12
    encoder_layers: int = 12
    attention_dropout: float = 0.1
    norm_epsilon: float = 1e-12
    embedding_norm: bool = True
    embedding_scale: bool = False
    segments: int = 2  # types of tokens, of which each adds a vector of its own if there are several
    activation: Literal["relu", "gelu", "swish", "swiglu"] = "gelu"
    positions: Literal["sinusoidal", "learned", "rotary"] = "learned"
    max_positions: int = 512


class MaskedEncoder(TransformerEncoder):
    """The encoder and its two heads."""

    config: MaskedEncoderConfig
    config_class = MaskedEncoderConfig

    def __init__(self, config: MaskedEncoderConfig) -> None:
        super().__init__()
        self.config = config
        tokens = nn.Embedding(config.source_vocabulary, config.d_model)
        embedding = self.make_embedding(config, tokens, decoder=False)
        self.encoder = self.encoder_class(config, embedding, self.encoder_layer)
        self.make_rotary_table(config)
        self.segments: nn.Parameter | None = None
        if config.segments > 1:
            self.segments = nn.Parameter(torch.empty(config.segments, config.d_model))
        self.prediction = Linear(config.d_model, config.d_model)
        self.prediction_norm = config.make_norm()
        self.prediction_bias = nn.Parameter(torch.zeros(config.source_vocabulary))
        self.pooler = Linear(config.d_model, config.d_model)
        self.next_sentence = layers.xavier(nn.Linear(config.d_model, 2))
        for parameter in (tokens.weight, embedding.positions, self.segments):
            if isinstance(parameter, nn.Parameter):
                nn.init.normal_(parameter, std=DEVIATION)

    def encode_packed(self, source: Source, *, weights: Weights = None) -> Tensor:
        self.check_length(source)
        position_M, spans = source.positions_N(), Spans.of(source)
        x_MD = self.encoder.embedding.embed(source.ids_N, position_M)
        if self.segments is not None:
            x_MD = x_MD + self.segments[source.extras.get("segments", 0)]

        def self_attention(layer: int, qkv_M3D: Tensor) -> Tensor:
            return self.packed_self_attention(
                layer, qkv_M3D, position_M, spans, causal=False, weights=weights
            )

        return self.encoder(self.encoder.embedding.finish(x_MD), self_attention)

    def forward(self, source: Source, *, want: WantedWeights = NO_WEIGHTS) -> Output:
        return Output(self.encode_packed(source))

    def readout(self, hidden_ND: Tensor) -> Tensor:
        """The logits of the tokens that were masked: [N, V]."""
        x_ND = self.prediction_norm(F.gelu(self.prediction(hidden_ND)))
        return F.linear(x_ND, self.encoder.embedding.tokens.weight, self.prediction_bias)

    def next_sentence_logits(self, first_SD: Tensor) -> Tensor:
        """Whether the second part follows the first, of the hidden state of each first token: logits [S, 2].

        The first column is for those that do.
        """
        return self.next_sentence(self.pooler(first_SD).tanh())
