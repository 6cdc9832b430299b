"""The layers of a Transformer, and the half of it that reads, which is all of BERT.

Axes: S sentence, L source position, Q queries, N tokens of a batch in a row, M source tokens in a row,
H heads, P width of one head, D width.

The arithmetic is written once, as functions of a layer whose fields are modules in training and plain
products in decoding (`layers.freeze`), and of the attention, which depends on how tokens are laid out: in
training in a row without padding [N, D], in decoding in a grid [S, Q, D] beside what was cached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.arch import attention, fused, layers
from trmt.arch.attention import Spans
from trmt.arch.base import Source
from trmt.errors import ConfigError

Sublayers = Iterator[tuple[Any, Callable[[Tensor], Tensor]]]  # each with the norm that belongs to it


class Feed(nn.Module):
    """The position-wise feed-forward layer; SwiGLU (arXiv 2002.05202) has a gate beside the inner product."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        gated = config.activation == "swiglu"
        relu = config.activation == "relu"
        inner = fused.Linear(config.width, config.feed_forward * (1 + gated), relu=relu)
        self.inner = layers.xavier(inner, 1 + gated)
        self.outer = layers.xavier(fused.Linear(config.feed_forward, config.width))


class Layer(nn.Module):
    """One layer; `cross` adds the decoder's look at the source."""

    def __init__(self, config: Any, *, cross: bool) -> None:
        super().__init__()
        width = config.width
        self.own = layers.xavier(fused.Linear(width, 3 * width), 3)
        self.own_out = layers.xavier(fused.Linear(width, width))
        self.own_norm = layers.norm(config.norm, width, config.epsilon)
        if cross:
            self.query = layers.xavier(fused.Linear(width, width))
            self.cross_out = layers.xavier(fused.Linear(width, width))
            self.cross_norm = layers.norm(config.norm, width, config.epsilon)
        self.feed = Feed(config)
        self.feed_norm = layers.norm(config.norm, width, config.epsilon)


class Encoder(nn.Module):
    """The half of a Transformer that reads; BERT is nothing else (trmt/arch/masked_encoder.py).

    Networks that have one name its tensors alike, so that one can begin with what another has learned.
    """

    config: Any

    def make_encoder(self, config: Any, embedding: nn.Embedding, *, sides: int) -> None:
        """The modules; `sides` is 2 where a decoder shares the table of positions."""
        width = config.width
        self.source_embedding = embedding
        self.encoder = nn.ModuleList(Layer(config, cross=False) for _ in range(config.encoder_layers))
        if config.norm_place == "pre":
            self.encoder_norm = layers.norm(config.norm, width, config.epsilon)
        if config.embedding_norm:
            self.embedding_norms = nn.ModuleList(
                layers.norm(config.norm, width, config.epsilon) for _ in range(sides)
            )
        if config.segments > 1:
            self.segments = nn.Parameter(torch.randn(config.segments, width) * width**-0.5)
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.randn(sides, config.longest, width) * width**-0.5)
        else:
            table_width = width if config.positions == "sinusoidal" else width // config.heads
            self.register_buffer("table", layers.sinusoids(config.longest, table_width), persistent=False)

    def read(self, source: Source, *, weights: list[Tensor] | None = None) -> Tensor:
        """The source as the encoder sees it, in a row [M, D]; `weights` gets those of each layer."""
        check_length(self.config, source)
        position_M, over = source.positions_N(), Spans.of(source)

        def look_around(merged_M3D: Tensor) -> Tensor:
            return attend_in_row(self, merged_M3D, position_M, over, causal=False, weights=weights)

        segment_M = source.extras.get("segments")
        x_MD = embed(self, self.config, source.ids_N, position_M, side=0, segment=segment_M)
        return encode(self, self.config, x_MD, look_around)


def piece_vectors(vocabulary: int, width: int) -> nn.Embedding:
    """A vector for each piece, drawn so that scaled by the square root of the width it has unit variance."""
    table = nn.Embedding(vocabulary, width)
    nn.init.normal_(table.weight, std=width**-0.5)
    return table


def feed(layer: Any, config: Any, x_SQD: Tensor) -> Tensor:
    """The feed-forward layer, on any layout."""
    inner = layer.feed.inner(x_SQD)
    if config.activation == "swiglu":
        gate, value = inner.chunk(2, -1)
        inner = F.silu(gate) * value
    elif config.activation == "gelu":
        inner = F.gelu(inner)
    elif config.activation == "swish":
        inner = F.silu(inner)
    return layer.feed.outer(inner)


def embed(
    net: Any,
    config: Any,
    ids: Tensor,
    position: Tensor,
    *,
    side: int,
    segment: Tensor | None = None,
) -> Tensor:
    """Scaled embeddings with positions added; `side` is 0 for the source, 1 for the target.

    `segment` says of what kind each token of the source is; by itself all are of the first.
    """
    weight = (net.target_embedding if side else net.source_embedding).weight
    x = F.embedding(ids, weight)
    if config.embedding_scale:
        x = x * math.sqrt(config.width)
    if config.positions == "sinusoidal":
        x = x + net.table[position]
    elif config.positions == "learned":
        x = x + net.positions[side, position]
    if config.segments > 1 and not side:
        x = x + net.segments[0 if segment is None else segment]
    if config.embedding_norm:
        x = net.embedding_norms[side](x)
    return fused.drop(x, _dropout(net, config))


def _dropout(net: Any, config: Any) -> float:
    return config.dropout if getattr(net, "training", False) else 0.0


def check_length(config: Any, source: Source) -> None:
    """Refuse a source that is longer than there are positions."""
    if source.longest > config.longest:
        raise ConfigError(f"a source has {source.longest} pieces, the network positions for {config.longest}")


def encode(net: Any, config: Any, x: Tensor, look_around: Callable[[Tensor], Tensor]) -> Tensor:
    """The encoder's layers, on any layout; `look_around` is attention from merged queries, keys, values."""

    def sublayers(layer: Any) -> Sublayers:
        yield layer.own_norm, lambda x: layer.own_out(look_around(layer.own(x)))
        yield layer.feed_norm, lambda x: feed(layer, config, x)

    steps = [step for layer in net.encoder for step in sublayers(layer)]
    return _through(steps, config, x, getattr(net, "encoder_norm", None), _dropout(net, config))


def decode(
    net: Any,
    config: Any,
    x: Tensor,
    look_back: Callable[[int, Tensor], Tensor],
    look_over: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """The decoder's layers, on any layout.

    `look_back(layer index, merged queries, keys, values)` is attention to what went before, and
    `look_over(layer index, query)` attention to the source.
    """

    def sublayers(index: int, layer: Any) -> Sublayers:
        yield layer.own_norm, lambda x: layer.own_out(look_back(index, layer.own(x)))
        yield layer.cross_norm, lambda x: layer.cross_out(look_over(index, layer.query(x)))
        yield layer.feed_norm, lambda x: feed(layer, config, x)

    steps = [step for index, layer in enumerate(net.decoder) for step in sublayers(index, layer)]
    return _through(steps, config, x, getattr(net, "decoder_norm", None), _dropout(net, config))


def _through(
    steps: list[tuple[Any, Callable[[Tensor], Tensor]]],
    config: Any,
    x: Tensor,
    last_norm: Any,
    dropout: float,
) -> Tensor:
    """Sublayers in turn, each with its residual connection and its norm, which stands after it or before.

    A norm before a sublayer follows the residual connection of the one before that, so that both kinds
    are a chain of the same step: add, then norm.
    """
    norms = [norm for norm, _ in steps]
    post = config.norm_place == "post"
    inner = x if post else norms[0](x)
    for (_, sublayer), norm in zip(steps, norms if post else [*norms[1:], last_norm], strict=True):
        x, inner = fused.add_norm(x, sublayer(inner), norm, dropout)
        if post:
            x = inner
    return inner


def attend_in_row(
    net: Any,
    merged_N3D: Tensor,
    position_N: Tensor,
    spans: Spans,
    *,
    causal: bool,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """Attention of sentences in a row to themselves, in training; `weights` gets [S, H, L, L]."""
    config = net.config
    dropout = config.attention_dropout if net.training else 0.0
    if config.positions == "rotary":
        query_NHP, key_NHP, value_NHP = merged_N3D.unflatten(-1, (3, config.heads, -1)).unbind(1)
        query_NHP, key_NHP = (layers.rotated(x, net.table[position_N][:, None]) for x in (query_NHP, key_NHP))
        merged_N3D = torch.stack([query_NHP, key_NHP, value_NHP], 1).flatten(1)
    if weights is not None:
        weights.append(attention.own_weights(merged_N3D, spans, config.heads, causal=causal))
    return attention.attend_own(merged_N3D, spans, config.heads, causal=causal, dropout=dropout)


def split(net: Any, config: Any, merged_SQD: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [S, H, Q, P] from their merged product; `position` is [Q] or [S, Q]."""
    query, key, value = (layers.heads(part, config.heads) for part in merged_SQD.chunk(3, -1))
    if config.positions == "rotary":
        angle = net.table[position]
        angle = angle[:, None] if position.dim() == 2 else angle
        query, key = (layers.rotated(part, angle) for part in (query, key))
    return query, key, value
