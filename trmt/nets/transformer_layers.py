"""The layers of a Transformer, and the half of it that reads, which is all of BERT.

Axes: S sentence, L source position, Q queries, N tokens of a batch in a row, M source tokens in a row,
H heads, P width of one head, D width.

The arithmetic is written once, as functions of a layer whose fields are modules in training and plain
products in decoding (`layers.freeze`), and of the attention, which depends on how tokens are laid out: in
training in a row without padding [N, D], in decoding in a grid [S, Q, D] beside what was cached.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.nets import attention, fused, layers, positions
from trmt.nets.attention import Spans
from trmt.nets.base import Source

Steps = Sequence[tuple[Any, Callable[[Tensor], Tensor]]]
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
    """The half of a Transformer that reads; BERT is nothing else (trmt/lab/masked_encoder.py).

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
        positions.make(self, config, decodes=sides > 1)

    @property
    def couples_batch(self) -> bool:
        return self.config.norm == "batch"

    @property
    def most_tokens(self) -> int:
        return self.config.limit

    def read(self, source: Source, *, through: Any = None, weights: list[Tensor] | None = None) -> Tensor:
        """The source as the encoder sees it, in a row [M, D], or what else is made `through` its layers.

        `weights` gets those of each layer.
        """
        check_length(self.config, source)
        position_M, over = source.positions_N(), Spans.of(source)

        def look_around(index: int, merged_M3D: Tensor) -> Tensor:
            return attend_in_row(self, index, merged_M3D, position_M, over, side=0, weights=weights)

        segment_M = source.extras.get("segments")
        x_MD = embed(self, self.config, source.ids_N, position_M, side=0, segment=segment_M)
        return (through or encode)(self, self.config, x_MD, look_around)


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
    x = positions.placed(net, config, x, ids, position, side=side)
    if config.segments > 1 and not side:
        x = x + net.segments[0 if segment is None else segment]
    if config.embedding_norm:
        x = net.embedding_norms[side](x)
    return fused.drop(x, _dropout(net, config))


def _dropout(net: Any, config: Any) -> float:
    return config.dropout if getattr(net, "training", False) else 0.0


def check_length(config: Any, source: Source) -> None:
    """Refuse a source that is longer than there are positions."""
    if source.longest > config.limit:
        raise ConfigError(f"a source has {source.longest} pieces, the network positions for {config.longest}")


def own_parts(layer: Any, config: Any, x: Tensor) -> Tensor:
    """Queries, keys and values of a layer's look at its own side, merged.

    Attention divides scores by the square root of the head's width. Where it shall not, queries are that
    much longer, so that every way to attend is one for both.
    """
    merged = layer.own(x)
    if config.score_scale:
        return merged
    longer, rest = merged.split([config.width, 2 * config.width], -1)
    return torch.cat([longer * _unscaled(config), rest], -1)


def cross_query(layer: Any, config: Any, x: Tensor) -> Tensor:
    """The queries of a layer's look at the source."""
    return layer.query(x) if config.score_scale else layer.query(x) * _unscaled(config)


def _unscaled(config: Any) -> float:
    return math.sqrt(config.width // config.heads)


def encode(net: Any, config: Any, x: Tensor, look_around: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The encoder's layers, on any layout.

    `look_around(layer index, merged queries, keys, values)` is attention to the whole sentence.
    """
    return _last(_encoded(net, config, x, look_around))


def encode_each(
    net: Any, config: Any, x: Tensor, look_around: Callable[[int, Tensor], Tensor]
) -> list[Tensor]:
    """What comes out of each of the encoder's layers; with norms before sublayers, each has its own."""
    found = [*_encoded(net, config, x, look_around)][1::2]
    if config.norm_place == "post":
        return [inner for _, inner in found]
    lower = [norm(x) for norm, (x, _) in zip(net.lower_norms, found[:-1], strict=True)]
    return [*lower, found[-1][1]]


def make_memories(net: nn.Module, config: Any) -> None:
    """Keys and values of each encoder layer for the decoder's layer beside it."""
    width = config.width
    net.memories = nn.ModuleList(
        layers.xavier(fused.Linear(width, 2 * width), 2) for _ in range(config.decoder_layers)
    )
    if config.norm_place == "pre":  # the last layer's is the encoder's own
        lower = range(config.encoder_layers - 1)
        net.lower_norms = nn.ModuleList(layers.norm(config.norm, width, config.epsilon) for _ in lower)


def memorised(net: Any, config: Any, x: Tensor, look_around: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Keys and values of the source for every decoder layer, side by side, on any layout."""
    if config.cross_source == "last":
        return net.memory(encode(net, config, x, look_around))
    states = encode_each(net, config, x, look_around)
    return torch.cat([memory(x) for memory, x in zip(net.memories, states, strict=True)], -1)


def _encoded(
    net: Any, config: Any, x: Tensor, look_around: Callable[[int, Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    def sublayers(index: int, layer: Any) -> Sublayers:
        yield layer.own_norm, lambda x: layer.own_out(look_around(index, own_parts(layer, config, x)))
        yield layer.feed_norm, lambda x: feed(layer, config, x)

    steps = [step for index, layer in enumerate(net.encoder) for step in sublayers(index, layer)]
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
        yield layer.own_norm, lambda x: layer.own_out(look_back(index, own_parts(layer, config, x)))
        yield layer.cross_norm, lambda x: layer.cross_out(look_over(index, cross_query(layer, config, x)))
        yield layer.feed_norm, lambda x: feed(layer, config, x)

    steps = [step for index, layer in enumerate(net.decoder) for step in sublayers(index, layer)]
    last_norm = getattr(net, "decoder_norm", None)
    return _last(_through(steps, config, x, last_norm, _dropout(net, config)))


def _through(
    steps: Steps, config: Any, x: Tensor, last_norm: Any, dropout: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Sublayers in turn, each with its residual connection and its norm, which stands after it or before.

    A norm before a sublayer follows the residual connection of the one before that, so that both kinds
    are a chain of the same step: add, then norm. After each step come its sum and the norm of that.
    """
    norms = [norm for norm, _ in steps]
    post = config.norm_place == "post"
    inner = x if post else norms[0](x)
    for (_, sublayer), norm in zip(steps, norms if post else [*norms[1:], last_norm], strict=True):
        if config.residual:
            x, inner = fused.add_norm(x, sublayer(inner), norm, dropout)
        else:
            x = fused.drop(sublayer(inner), dropout)
            inner = norm(x)
        if post:
            x = inner
        yield x, inner


def _last(steps: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """What comes out in the end; what is on the way is let go at once."""
    [(_, inner)] = deque(steps, maxlen=1)
    return inner


def attend_in_row(
    net: Any,
    layer: int,
    merged_N3D: Tensor,
    position_N: Tensor,
    spans: Spans,
    *,
    side: int,
    weights: list[Tensor] | None = None,
) -> Tensor:
    """Attention of sentences in a row to themselves, in training: of the source, or of the target's past.

    `weights` gets those of the layer: [S, H, L, L].
    """
    config = net.config
    dropout, causal = config.attention_dropout if net.training else 0.0, bool(side)
    if positions.by_distance(config):
        return _by_distance(net, layer, merged_N3D, spans, side=side, dropout=dropout, weights=weights)
    if config.positions == "rotary":
        query_NHP, key_NHP, value_NHP = merged_N3D.unflatten(-1, (3, config.heads, -1)).unbind(1)
        angle_N1P = positions.angles(net, position_N, upto=spans.longest)[:, None]
        query_NHP, key_NHP = (layers.rotated(x, angle_N1P) for x in (query_NHP, key_NHP))
        merged_N3D = torch.stack([query_NHP, key_NHP, value_NHP], 1).flatten(1)
    if weights is not None:
        weights.append(attention.own_weights(merged_N3D, spans, config.heads, causal=causal))
    return attention.attend_own(merged_N3D, spans, config.heads, causal=causal, dropout=dropout)


def _by_distance(
    net: Any,
    layer: int,
    merged_N3D: Tensor,
    spans: Spans,
    *,
    side: int,
    dropout: float,
    weights: list[Tensor] | None,
) -> Tensor:
    parts = merged_N3D.unflatten(-1, (3, net.config.heads, -1)).unbind(1)

    def look(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        if weights is not None:
            weights.append(positions.weights(net, net.config, layer, query, key, mask, side=side))
        distance = positions.distances(query.shape[2], key.shape[2], query.device)
        found = positions.look(net, net.config, layer, distance, side=side, dropout=dropout)
        return found(query, key, value, mask)

    # Weights are wanted in one grid.
    attend = attention.attend_padded if weights is None else attention.attend_in_grid
    return attend(parts, spans, spans, causal=bool(side), look=look)


def attend_around(net: Any, config: Any, layer: int, merged_SLD: Tensor, mask: Tensor) -> Tensor:
    """Attention of sources in a grid to themselves, in translating."""
    query_SHLP, key_SHLP, value_SHLP = (layers.heads(part, config.heads) for part in merged_SLD.chunk(3, -1))
    count = merged_SLD.shape[1]
    if positions.by_distance(config):
        distance = positions.distances(count, count, merged_SLD.device)
        look = positions.look(net, config, layer, distance, side=0, steady=True)
        return look(query_SHLP, key_SHLP, value_SHLP, mask)
    if config.positions == "rotary":
        position_L = torch.arange(count, device=merged_SLD.device)
        angle_LP = positions.angles(net, position_L, upto=count)
        query_SHLP, key_SHLP = (layers.rotated(x, angle_LP) for x in (query_SHLP, key_SHLP))
    return layers.attend(query_SHLP, key_SHLP, value_SHLP, mask)
