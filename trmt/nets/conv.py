"""ConvS2S: gated convolutions with attention in every decoder layer (Gehring et al., arXiv 1705.03122).

Axes: S sentence, K hypothesis, L source position, T target position, N target tokens of a batch in a row,
W inputs that a convolution covers, Q queries (K * T of them), H heads (one here), D hidden size (d_model).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.nets import layers
from trmt.nets.base import (
    NO_WEIGHTS,
    Decoding,
    EncoderMemory,
    HiddenVectors,
    Output,
    Seq2Seq,
    WantedWeights,
    stack_weights,
)
from trmt.nets.layers import KEY_MULTIPLE, Linear, module_list
from trmt.nets.ragged import Ragged, Source

HALF = 0.5**0.5  # keeps the variance of a sum of two
EMBEDDING_STD = 0.1  # section 4.2 of the paper; attention has no scaling, so larger ones would saturate it


@dataclass(frozen=True, kw_only=True)
class ConvS2SConfig:
    """The sizes of a convolutional network."""

    source_vocabulary: int  # source tokens, set from the tokenizer
    target_vocabulary: int  # target tokens, set from the tokenizer
    d_model: int = 512  # the hidden size
    encoder_layers: int = 8  # layers of the encoder
    decoder_layers: int = 8  # layers of the decoder
    kernel: int = 3  # tokens that a convolution covers
    dropout: float = 0.2  # of embeddings and of the inputs of convolutions
    tied: Literal["target", "none"] = "target"  # whether the output shares the target embedding
    max_positions: int = 1024  # the longest sentence in tokens

    def __post_init__(self) -> None:
        layers.check_sizes(self)
        if self.kernel % 2 == 0:
            raise ConfigError(f"kernel = {self.kernel} has no middle; choose an odd number")


class ConvLayer(nn.Module):
    """A gated convolution as one product over a window of inputs."""

    def __init__(self, config: ConvS2SConfig) -> None:
        super().__init__()
        self.kernel, inputs = config.kernel, config.kernel * config.d_model
        self.convolution = nn.Linear(inputs, 2 * config.d_model)
        # Section 3.5 of the paper: the gate halves the variance, dropout raises it.
        nn.init.normal_(self.convolution.weight, std=(4 * (1 - config.dropout) / inputs) ** 0.5)
        nn.init.zeros_(self.convolution.bias)
        self.dropout = nn.Dropout(config.dropout)

    def convolve(self, x_WD: Tensor) -> Tensor:
        """The convolution over the axis before the last, which comes out `kernel` - 1 shorter."""
        windows = self.dropout(x_WD).unfold(-2, self.kernel, 1).flatten(-2)
        return F.glu(self.convolution(windows), -1)

    def encode(self, x_SLD: Tensor, real_SL: Tensor) -> Tensor:
        """The layer of an encoder, with padding on both sides."""
        # Padding is zeroed before each layer: what lies behind a sentence must not leak into it.
        padding = [0, 0, self.kernel // 2, self.kernel // 2]
        return (x_SLD + self.convolve(F.pad(x_SLD * real_SL[..., None], padding))) * HALF


class DecoderConvLayer(ConvLayer):
    """A gated convolution and attention to the source."""

    def __init__(self, config: ConvS2SConfig) -> None:
        super().__init__(config)
        self.cross_query = Linear(config.d_model, config.d_model)
        self.cross_out = Linear(config.d_model, config.d_model)

    def decode(
        self, x_SKTD: Tensor, window_SKWD: Tensor, embedded_SKTD: Tensor, memory: EncoderMemory
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The layer of a decoder behind a window of earlier inputs: output, new window, and queries."""
        inputs_SKWD = torch.cat([window_SKWD, x_SKTD], 2)
        h_SKTD = self.convolve(inputs_SKWD)
        query_SKTD = (self.cross_query(h_SKTD) + embedded_SKTD) * HALF
        # The paper does not scale scores: of inputs as small as its embeddings nothing would be left.
        query_SHQD = query_SKTD.flatten(1, 2)[:, None] * x_SKTD.shape[-1] ** 0.5
        out_SQD = (
            layers.attend(query_SHQD, memory["keys"], memory["values"], memory["mask"]) * memory["scale"]
        )
        h_SKTD = (h_SKTD + self.cross_out(out_SQD.view_as(h_SKTD))) * HALF
        window_SKWD = inputs_SKWD[:, :, inputs_SKWD.shape[2] - window_SKWD.shape[2] :]
        return (x_SKTD + h_SKTD) * HALF, window_SKWD, query_SHQD


class ConvS2S(Seq2Seq):
    """A convolutional encoder-decoder."""

    config: ConvS2SConfig
    config_class = ConvS2SConfig
    encoder_layer: type[ConvLayer] = ConvLayer
    layers_called_once = True
    pays_to_compile = True

    def __init__(self, config: ConvS2SConfig) -> None:
        super().__init__()
        self.config = config
        d_model, positions = config.d_model, (1, config.max_positions, config.d_model)
        self.source_embedding = nn.Embedding(config.source_vocabulary, d_model)
        self.target_embedding = nn.Embedding(config.target_vocabulary, d_model)
        tied = config.tied == "target"
        self.output = self.target_embedding if tied else nn.Embedding(config.target_vocabulary, d_model)
        for embedding in (self.source_embedding, self.target_embedding, self.output):
            nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
        self.source_positions = nn.Parameter(torch.randn(positions) * EMBEDDING_STD)
        self.target_positions = nn.Parameter(torch.randn(positions) * EMBEDDING_STD)
        self.encoder = module_list(self.encoder_layer(config) for _ in range(config.encoder_layers))
        self.decoder = module_list(DecoderConvLayer(config) for _ in range(config.decoder_layers))
        self.encoder_out = Linear(d_model, d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, source: Source, target: Ragged, *, want: WantedWeights = NO_WEIGHTS) -> Output:
        encoder_weights: list[Tensor] = []
        memory = self.encode(source, encoder_weights if want.encoder else None)
        ids_ST, _ = target.padded()
        weights: list[Tensor] = []
        hidden_SKTD, _ = self.decode(
            ids_ST[:, None],
            memory,
            self.first_windows(memory, len(target), 1),
            torch.zeros_like(target.lengths_S),
            weights if want.cross else None,
        )
        hidden_ND = hidden_SKTD.flatten(0, 2)[target.cells_N(ids_ST.shape[1])]
        return Output(
            hidden_ND,
            cross_attention=stack_weights(weights),
            encoder_attention=stack_weights(encoder_weights),
        )

    def encode(self, source: Source, weights: list[Tensor] | None = None) -> EncoderMemory:
        """Keys and values of a source, and what scales the sum of values.

        Keys are the outputs of the last layer; values have the embeddings added. Self-attention weights of
        the encoder, if it has any, are appended to `weights`.
        """
        self.check_length(source)
        ids_SL, real_SL = source.padded(1 if self.training else KEY_MULTIPLE)
        position_L = torch.arange(ids_SL.shape[1], device=ids_SL.device).clamp(max=self.max_positions - 1)
        embedded_SLD = self.dropout(self.source_embedding(ids_SL) + self.source_positions[0, position_L])
        mask = layers.additive_mask(real_SL, embedded_SLD.dtype)[:, None, None]
        x_SLD = self.encoder_out(self.encode_layers(embedded_SLD, real_SL, mask, weights))
        # The sum of m values weighted about evenly shrinks like 1/sqrt(m); the paper scales it back up.
        scale_S11 = source.lengths_S[:, None, None].to(x_SLD.dtype).sqrt()
        values_SLD = (x_SLD + embedded_SLD) * HALF
        tensors = {"keys": x_SLD[:, None], "values": values_SLD[:, None], "mask": mask, "scale": scale_S11}
        return EncoderMemory(tensors, {"keys": (2, 0.0), "values": (2, 0.0), "mask": (3, -math.inf)})

    def encode_layers(
        self, x_SLD: Tensor, real_SL: Tensor, mask: Tensor, weights: list[Tensor] | None
    ) -> Tensor:
        """The layers of the encoder."""
        for layer in self.encoder:
            x_SLD = layer.encode(x_SLD, real_SL)
        return x_SLD

    def first_windows(self, memory: EncoderMemory, sentences: int, hypotheses: int) -> HiddenVectors:
        """Zeros for the inputs before the first token, in each layer of the decoder."""
        shape = (sentences, hypotheses, self.config.kernel - 1, self.config.d_model)
        return HiddenVectors((memory["keys"].new_zeros(shape),) * self.config.decoder_layers)

    def start(self, source: Source, decoding: Decoding) -> tuple[EncoderMemory, HiddenVectors]:
        memory = self.encode(source)
        return memory, self.first_windows(memory, len(source), decoding.hypotheses)

    def step(
        self, tokens_SKT: Tensor, memory: EncoderMemory, decoder: HiddenVectors, position_S: Tensor
    ) -> tuple[Tensor, HiddenVectors]:
        return self.decode(tokens_SKT, memory, decoder, position_S)

    def decode(
        self,
        tokens_SKT: Tensor,
        memory: EncoderMemory,
        decoder: HiddenVectors,
        position_S: Tensor,
        weights: list[Tensor] | None = None,
    ) -> tuple[Tensor, HiddenVectors]:
        """T tokens at once: hidden states [S, K, T, D] and new windows; `weights` gets cross-attention."""
        step_T = torch.arange(tokens_SKT.shape[2], device=tokens_SKT.device)
        position_SKT = (position_S[:, None] + step_T)[:, None].expand(tokens_SKT.shape)
        positions_SKTD = self.target_positions[0, position_SKT]
        embedded_SKTD = x_SKTD = self.dropout(self.target_embedding(tokens_SKT) + positions_SKTD)
        windows = []
        for layer, window_SKWD in zip(self.decoder, decoder.tensors, strict=True):
            x_SKTD, window_SKWD, query_SHQD = layer.decode(x_SKTD, window_SKWD, embedded_SKTD, memory)
            windows.append(window_SKWD)
            if weights is not None:
                weights.append(layers.attention_weights(query_SHQD, memory["keys"], memory["mask"]))
        # Everything inside is as small as the embeddings; logits need unit variance to begin with.
        return self.dropout(x_SKTD) / EMBEDDING_STD, HiddenVectors(tuple(windows))
