"""The Transformer of "Attention Is All You Need" (arXiv 1706.03762), with what people change about it today.

Axes: S sentence, K hypothesis, L source position, T target position, Q queries (K * T when decoding),
N target tokens of a batch in a row, M source tokens in a row, H heads, P head dimension, D hidden size
(d_model), A layers.

The layers are written once, for any layout of the tokens, and get their attention as functions (layer index,
queries...) -> output. `forward` trains on packed tokens; `start` and `step` decode in grids, with a KV cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.devices import varlen
from trmt.errors import ConfigError
from trmt.nets import kv_cache, layers
from trmt.nets.base import (
    NO_WEIGHTS,
    UNLIMITED,
    DecoderState,
    Decoding,
    EncoderMemory,
    Network,
    Output,
    Products,
    Seq2Seq,
    WantedWeights,
    frozen_copy,
    stack_weights,
)
from trmt.nets.kv_cache import KVCache
from trmt.nets.layers import FeedForward, Linear, Spans, Sublayer, split_heads
from trmt.nets.ragged import Ragged, Source

SelfAttention = Callable[[int, Tensor], Tensor]  # (layer, merged queries, keys, values [.., 3D]) -> [.., D]
CrossAttention = Callable[[int, Tensor], Tensor]  # (layer, queries [.., D]) -> [.., D]
Weights = list[Tensor] | None  # where attention weights are collected, if anybody wants them


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The sizes and options of a Transformer's encoder; the defaults are the paper's base model."""

    source_vocabulary: int  # source tokens, set from the tokenizer
    d_model: int = 512  # the hidden size
    feed_forward: int = 2048  # the inner size of the feed-forward layers
    heads: int = 8  # attention heads of each layer
    encoder_layers: int = 6  # layers of the encoder
    dropout: float = 0.1  # of embeddings and of the output of each sublayer
    attention_dropout: float = 0.0  # of attention weights
    norm_position: Literal["post", "pre"] = "post"  # norms after residual connections or before sublayers
    norm: Literal["layer", "rms"] = "layer"  # LayerNorm or RMSNorm
    norm_epsilon: float = 0.0  # added to the variance; 0 takes what is usual for the norm
    embedding_norm: bool = False  # a norm behind the embeddings, as BERT and BART have it
    embedding_scale: bool = True  # embeddings are multiplied by the square root of d_model
    activation: Literal["relu", "gelu", "swish", "swiglu"] = "relu"  # of the feed-forward layers
    positions: Literal["sinusoidal", "learned", "rotary"] = "sinusoidal"  # how tokens know their positions
    position_offset: int = 0  # rows of the sinusoidal table before that of position 0, for imported models
    max_positions: int = 1024  # the longest sentence in tokens; rotary positions have no limit

    not_rates: ClassVar[tuple[str, ...]] = ()  # fields that `check_sizes` does not check

    def __post_init__(self) -> None:
        layers.check_sizes(self, except_for=self.not_rates, from_zero=("position_offset",))
        if self.d_model % self.heads:
            raise ConfigError(
                f"d_model = {self.d_model} cannot be divided into heads = {self.heads}; change one"
            )
        if self.positions == "rotary" and self.d_model // self.heads % 2:
            raise ConfigError('positions = "rotary" rotates pairs of columns: d_model / heads must be even')

    @property
    def head_dim(self) -> int:
        """The head dimension."""
        return self.d_model // self.heads

    def make_norm(self) -> nn.Module:
        """A norm as all layers have it."""
        return layers.norm_layer(self.norm, self.d_model, self.norm_epsilon)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(EncoderConfig):
    """The sizes and options of a Transformer; the defaults are the paper's base model."""

    target_vocabulary: int  # target tokens, set from the tokenizer
    decoder_layers: int = 6  # layers of the decoder
    tied: Literal["all", "target", "none"] = "all"  # which embeddings share the output's matrix
    output_bias: bool = False  # a bias for each token of the vocabulary, as Marian has it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tied == "all" and self.source_vocabulary != self.target_vocabulary:
            raise ConfigError(
                'tied = "all" needs a joint tokenizer; set network.tied = "target" or train one'
            )


class TokenEmbedding(nn.Module):
    """Scaled embeddings of tokens, with their positions added."""

    positions: Tensor | None
    keeps_fp32 = ("positions",)

    def __init__(self, config: EncoderConfig, tokens: nn.Embedding) -> None:
        super().__init__()
        self.tokens = tokens
        self.dropout = config.dropout
        self.scale = math.sqrt(config.d_model) if config.embedding_scale else 1.0
        self.norm = config.make_norm() if config.embedding_norm else None
        if config.positions == "learned":  # an axis more: int8 quantises matrices, too coarse for positions
            learned = torch.randn(1, config.max_positions, config.d_model) * config.d_model**-0.5
            self.positions = nn.Parameter(learned)
        else:
            rows, offset = config.max_positions, config.position_offset
            has_table = config.positions == "sinusoidal"
            table = layers.sinusoids(rows, config.d_model, offset=offset)[None] if has_table else None
            self.register_buffer("positions", table, persistent=False)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        return self.finish(self.embed(ids, position))

    def embed(self, ids: Tensor, position: Tensor) -> Tensor:
        """Scaled embeddings with positions."""
        x = F.embedding(ids, self.tokens.weight) * self.scale
        return x if self.positions is None else (x + self.positions[0, position]).to(x.dtype)

    def finish(self, x: Tensor) -> Tensor:
        """The norm behind the embeddings, and dropout."""
        if self.norm is not None:
            x = self.norm(x)
        return layers.dropout(x, self.dropout if self.training else 0.0)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward layer."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        d_model = config.d_model
        self.self_qkv = Linear(d_model, 3 * d_model, merged=3)
        self.self_out = Linear(d_model, d_model)
        self.self_norm = config.make_norm()
        self.feed_forward = FeedForward(d_model, config.feed_forward, config.activation)
        self.feed_forward_norm = config.make_norm()

    def self_sublayer(self, attention: Callable[[Tensor], Tensor]) -> Sublayer:
        """Self-attention with its projections."""
        return self.self_norm, lambda x: self.self_out(attention(self.self_qkv(x)))

    def feed_forward_sublayer(self) -> Sublayer:
        """The feed-forward layer."""
        return self.feed_forward_norm, self.feed_forward


class DecoderLayer(EncoderLayer):
    """Self-attention, cross-attention and a feed-forward layer."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.cross_query = Linear(config.d_model, config.d_model)
        self.cross_out = Linear(config.d_model, config.d_model)
        self.cross_norm = config.make_norm()

    def cross_sublayer(self, attention: Callable[[Tensor], Tensor]) -> Sublayer:
        """Cross-attention with its projections; keys and values are projected for all layers at once."""
        return self.cross_norm, lambda x: self.cross_out(attention(self.cross_query(x)))


class Encoder(nn.Module):
    """From embedded source tokens to the encoder output, on any layout."""

    def __init__(self, config: EncoderConfig, embedding: TokenEmbedding, layer: type[EncoderLayer]) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = layers.module_list(layer(config) for _ in range(config.encoder_layers))
        self.norm = config.make_norm() if config.norm_position == "pre" else None
        self.dropout = config.dropout
        self.add_norm = layers.add_norm

    def forward(self, x: Tensor, self_attention: SelfAttention) -> Tensor:
        sublayers: list[Sublayer] = []
        for index, layer in enumerate(self.layers):
            sublayers.append(layer.self_sublayer(partial(self_attention, index)))
            sublayers.append(layer.feed_forward_sublayer())
        p = self.dropout if self.training else 0.0
        return layers.residual(x, sublayers, self.norm, p, self.add_norm)


class Decoder(nn.Module):
    """From target tokens to hidden states, on any layout."""

    def __init__(
        self, config: TransformerConfig, embedding: TokenEmbedding, layer: type[DecoderLayer]
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = layers.module_list(layer(config) for _ in range(config.decoder_layers))
        self.norm = config.make_norm() if config.norm_position == "pre" else None
        self.dropout = config.dropout
        self.add_norm = layers.add_norm

    def forward(
        self, ids: Tensor, position: Tensor, self_attention: SelfAttention, cross_attention: CrossAttention
    ) -> Tensor:
        sublayers: list[Sublayer] = []
        for index, layer in enumerate(self.layers):
            sublayers.append(layer.self_sublayer(partial(self_attention, index)))
            sublayers.append(layer.cross_sublayer(partial(cross_attention, index)))
            sublayers.append(layer.feed_forward_sublayer())
        x = self.embedding(ids, position)
        p = self.dropout if self.training else 0.0
        return layers.residual(x, sublayers, self.norm, p, self.add_norm)


class TransformerEncoder(Network):
    """A network with a Transformer's encoder, whether a decoder follows or not (BERT)."""

    config: EncoderConfig
    encoder: Encoder
    encoder_class = Encoder
    encoder_layer = EncoderLayer
    rotary_table: Tensor | None
    attends_packed = packs_tokens = layers_called_once = pays_to_compile = True
    keeps_fp32 = ("rotary_table",)
    exact = False  # whether a frozen copy computes attention in double precision, rounded once (for int8)

    def make_embedding(self, config: EncoderConfig, tokens: nn.Embedding, *, decoder: bool) -> TokenEmbedding:
        """The embedding of one side."""
        return TokenEmbedding(config, tokens)

    def make_rotary_table(self, config: EncoderConfig) -> None:
        """The sines and cosines of rotary positions, if the config asks for them."""
        rotary = config.positions == "rotary"
        table = layers.sinusoids(config.max_positions, config.head_dim) if rotary else None
        self.register_buffer("rotary_table", table, persistent=False)

    def packs_attention(self, device: torch.device, dtype: torch.dtype) -> bool:
        return not self.config.attention_dropout and varlen.serves(device, dtype, self.config.head_dim)

    @property
    def max_positions(self) -> int:
        return UNLIMITED if self.encoder.embedding.positions is None else self.config.max_positions

    def encode_packed(self, source: Source, *, weights: Weights = None) -> Tensor:
        """The encoder output of packed tokens [M, D]."""
        self.check_length(source)
        position_M, spans = source.positions_N(), Spans.of(source)

        def self_attention(layer: int, qkv_M3D: Tensor) -> Tensor:
            return self.packed_self_attention(
                layer, qkv_M3D, position_M, spans, causal=False, weights=weights
            )

        return self.encoder(self.encoder.embedding(source.ids_N, position_M), self_attention)

    def packed_self_attention(
        self,
        layer: int,
        qkv_N3D: Tensor,
        position_N: Tensor,
        spans: Spans,
        *,
        causal: bool,
        weights: Weights,
    ) -> Tensor:
        """Self-attention of packed tokens: of a layer of the encoder or, causal, of the decoder."""
        heads, dropout = self.config.heads, self.config.attention_dropout if self.training else 0.0
        qkv_N3D = self.rotate(qkv_N3D, position_N, longest=spans.longest)
        if weights is not None:
            query_ND, key_ND, _ = qkv_N3D.chunk(3, -1)
            weights.append(layers.packed_weights(query_ND, key_ND, spans, spans, heads, causal=causal))
        return layers.packed_self_attention(qkv_N3D, spans, heads, causal=causal, dropout=dropout)

    def rotate(self, qkv: Tensor, position: Tensor, *, longest: int) -> Tensor:
        """Queries and keys with rotary positions, if the network has these; no position exceeds `longest`."""
        table = self.rotary_table
        if table is None:
            return qkv
        if longest <= len(table):
            rows = table[position.clamp(max=len(table) - 1)]
        else:
            rows = layers.sinusoids_at(position, table.shape[1]).to(table.dtype)
        query, key, value = qkv.unflatten(-1, (3, self.config.heads, -1)).unbind(-3)
        rows = rows[..., None, :]  # the same for all heads
        return torch.stack([layers.rotary(query, rows), layers.rotary(key, rows), value], -3).flatten(-3)

    def grid_attention(self) -> layers.GridAttention:
        """Scaled dot-product attention in a grid."""
        return layers.attend_exactly if self.exact else layers.attend

    def frozen_as(self, products: Products) -> Self:
        """For inference."""
        copy = frozen_copy(self, products)
        copy.exact = products.precision == "int8"
        return copy


class Transformer(TransformerEncoder, Seq2Seq):
    """The Transformer, for training and decoding."""

    config: TransformerConfig
    config_class: ClassVar[type] = TransformerConfig
    decoder_layer = DecoderLayer
    cross_kv: nn.Module
    takes_encoder = True

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        d_model, width = config.d_model, 2 * config.decoder_layers
        target_tokens = layers.embedding(config.target_vocabulary, d_model)
        source_tokens = (
            target_tokens if config.tied == "all" else layers.embedding(config.source_vocabulary, d_model)
        )
        self.output = (
            layers.embedding(config.target_vocabulary, d_model) if config.tied == "none" else target_tokens
        )
        if config.output_bias:
            self.output_bias = nn.Parameter(torch.zeros(config.target_vocabulary))
        source_embedding = self.make_embedding(config, source_tokens, decoder=False)
        self.encoder = self.encoder_class(config, source_embedding, self.encoder_layer)
        target_embedding = self.make_embedding(config, target_tokens, decoder=True)
        self.decoder = Decoder(config, target_embedding, self.decoder_layer)
        # Cross-attention keys and values of all decoder layers, from one product.
        self.cross_kv = Linear(d_model, width * d_model, merged=width)
        self.make_rotary_table(config)

    # Training

    def forward(self, source: Source, target: Ragged, *, want: WantedWeights = NO_WEIGHTS) -> Output:
        spans, source_spans, position_N = Spans.of(target), Spans.of(source), target.positions_N()
        cross: list[Tensor] = []
        encoder: Weights = [] if want.encoder else None
        decoder: Weights = [] if want.decoder else None
        wanted = want.cross_layers(self.config.decoder_layers)
        encoded_MD = self.encode_packed(source, weights=encoder)
        kv_M2D = self.cross_kv(encoded_MD).chunk(self.config.decoder_layers, -1)

        def self_attention(layer: int, qkv_N3D: Tensor) -> Tensor:
            return self.packed_self_attention(layer, qkv_N3D, position_N, spans, causal=True, weights=decoder)

        def cross_attention(layer: int, query_ND: Tensor) -> Tensor:
            heads, dropout = self.config.heads, self.config.attention_dropout if self.training else 0.0
            if layer in wanted:
                key_MD = kv_M2D[layer].chunk(2, -1)[0]
                both, only = (spans, source_spans), want.cross_heads(heads)
                cross.append(layers.packed_weights(query_ND, key_MD, *both, heads, only=only))
            return layers.packed_cross_attention(
                query_ND, kv_M2D[layer], spans, source_spans, heads, dropout=dropout
            )

        hidden_ND = self.decoder(target.ids_N, position_N, self_attention, cross_attention)
        weights = (stack_weights(each or ()) for each in (cross, encoder, decoder))
        return Output(hidden_ND, {}, *weights)

    # Decoding

    def start(self, source: Source, decoding: Decoding) -> tuple[EncoderMemory, DecoderState]:
        memory = self.encode(source)
        sizes = (self.config.decoder_layers, self.config.heads, self.config.head_dim)
        return memory, kv_cache.make_cache(memory["key0"], len(source), decoding, sizes)

    def encode(self, source: Source) -> EncoderMemory:
        """Cross-attention keys and values of every decoder layer [S, H, L, P], and the mask of the source."""
        self.check_length(source)
        ids_SL, real_SL = source.padded(layers.KEY_MULTIPLE)  # for the same bits in any batch
        mask = layers.additive_mask(real_SL, self.output.weight.dtype)[:, None, None]
        position_L = torch.arange(ids_SL.shape[1], device=ids_SL.device).clamp(max=self.max_positions - 1)

        def self_attention(layer: int, qkv_SL3D: Tensor) -> Tensor:
            return self.grid_self_attention(layer, qkv_SL3D, position_L, mask)

        kv_SLD = self.grid_cross_kv(ids_SL, position_L, self_attention)
        kv_SLAHP = kv_SLD.unflatten(-1, (2 * self.config.decoder_layers, self.config.heads, -1))
        # Each contiguous: attention walks along the source.
        names = [f"{name}{layer}" for layer in range(self.config.decoder_layers) for name in ("key", "value")]
        tensors = {
            name: kv_SLHP.transpose(1, 2).contiguous()
            for name, kv_SLHP in zip(names, kv_SLAHP.unbind(2), strict=True)
        }
        axes = dict.fromkeys(tensors, (2, 0.0))
        return EncoderMemory({**tensors, "mask": mask}, {**axes, "mask": (3, -math.inf)})

    def grid_cross_kv(self, ids_SL: Tensor, position_L: Tensor, self_attention: SelfAttention) -> Tensor:
        """Cross-attention keys and values of all decoder layers, side by side [S, L, ..]."""
        return self.cross_kv(self.encoder(self.encoder.embedding(ids_SL, position_L), self_attention))

    def step(
        self, tokens_SKT: Tensor, memory: EncoderMemory, decoder: Any, position_S: Tensor
    ) -> tuple[Tensor, DecoderState]:
        decoder.advance(position_S, tokens_SKT.shape[2])

        def self_attention(layer: int, qkv_SQ3D: Tensor, position_SQ: Tensor) -> Tensor:
            return self.cached_self_attention(layer, qkv_SQ3D, position_SQ, decoder)

        return self.decode(tokens_SKT, memory, position_S, self_attention), decoder

    def decode(
        self,
        tokens_SKT: Tensor,
        memory: EncoderMemory,
        position_S: Tensor,
        self_attention: Callable[[int, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The hidden states [S, K, T, D] of tokens in a grid, with cross-attention to the memory."""
        hypotheses, count = tokens_SKT.shape[1:]
        step_T = torch.arange(count, device=position_S.device)
        position_SQ = (position_S[:, None] + step_T).repeat(1, hypotheses)

        def self_sublayer(layer: int, qkv_SQ3D: Tensor) -> Tensor:
            return self_attention(layer, qkv_SQ3D, position_SQ)

        def cross_attention(layer: int, query_SQD: Tensor) -> Tensor:
            query_SHQP = split_heads(query_SQD, self.config.heads)
            kv = memory[f"key{layer}"], memory[f"value{layer}"]
            return self.grid_cross_attention(query_SHQP, *kv, memory["mask"])

        hidden_SQD = self.decoder(tokens_SKT.flatten(1), position_SQ, self_sublayer, cross_attention)
        return hidden_SQD.view(*tokens_SKT.shape, -1)

    def grid_self_attention(self, layer: int, qkv_SL3D: Tensor, position_L: Tensor, mask: Tensor) -> Tensor:
        """Self-attention of the encoder over padded sources."""
        qkv_SL3D = self.rotate(qkv_SL3D, position_L, longest=qkv_SL3D.shape[1])
        query, key, value = (split_heads(x, self.config.heads) for x in qkv_SL3D.chunk(3, -1))
        return self.grid_attention()(query, key, value, mask)

    def cached_self_attention(
        self, layer: int, qkv_SQ3D: Tensor, position_SQ: Tensor, cache: KVCache
    ) -> Tensor:
        """Self-attention of the decoder over the KV cache, to which the newest tokens are added."""
        qkv_SQ3D = self.rotate(qkv_SQ3D, position_SQ, longest=cache.columns)
        qkv_3SHQP = qkv_SQ3D.unflatten(-1, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
        return cache.attend(layer, qkv_3SHQP[0], qkv_3SHQP[1:], self.grid_attention())

    def grid_cross_attention(self, query_SHQP: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Cross-attention of the decoder."""
        return self.grid_attention()(query_SHQP, key, value, mask)

    def same_beside_others(self, decoding: Decoding) -> bool:
        return self.exact or kv_cache.same_beside_others(decoding)
