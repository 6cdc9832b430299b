"""The Transformer of "Attention Is All You Need" (arXiv 1706.03762) and the options people use today.

Axes: S sentence, K hypothesis, L source position, T target position, Q queries (K * T of them when
decoding), N all tokens of a batch in a row, H heads, P width of one head, D width, V vocabulary, A layers.

The arithmetic is written once, as functions of a layer whose fields are modules in training and plain
products in decoding (`layers.freeze`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.arch import layers
from trmt.arch.base import Linear, Memory, Output, Ragged, Seq2Seq, Source, State, Stepper
from trmt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The sizes and options of a Transformer; the defaults are the paper's base model."""

    source_vocabulary: int
    target_vocabulary: int
    width: int = 512
    feed_forward: int = 2048
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.1
    attention_dropout: float = 0.0
    norm_place: Literal["post", "pre"] = "post"
    norm: Literal["layer", "rms"] = "layer"
    activation: Literal["relu", "gelu", "swiglu"] = "relu"
    positions: Literal["sinusoidal", "learned", "rotary"] = "sinusoidal"
    tied: Literal["all", "target", "none"] = "all"  # which embeddings share the output's matrix
    longest: int = 1024  # positions there are

    def __post_init__(self) -> None:
        layers.check_sizes(self)
        if self.width % self.heads:
            raise ConfigError(f"width = {self.width} cannot be divided into heads = {self.heads}; change one")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ConfigError('positions = "rotary" turns pairs of columns: width / heads must be even')
        if self.tied == "all" and self.source_vocabulary != self.target_vocabulary:
            raise ConfigError(
                'tied = "all" needs a joint tokenizer; set network.tied = "target" or train one'
            )


class Feed(nn.Module):
    """The position-wise feed-forward layer; SwiGLU (arXiv 2002.05202) has a gate beside the inner product."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        gated = config.activation == "swiglu"
        self.inner = layers.xavier(nn.Linear(config.width, config.feed_forward * (1 + gated)), 1 + gated)
        self.outer = layers.xavier(nn.Linear(config.feed_forward, config.width))


class Layer(nn.Module):
    """One layer; `cross` adds the decoder's look at the source."""

    def __init__(self, config: TransformerConfig, *, cross: bool) -> None:
        super().__init__()
        width = config.width
        self.own = layers.xavier(nn.Linear(width, 3 * width), 3)
        self.own_out = layers.xavier(nn.Linear(width, width))
        self.own_norm = layers.norm(config.norm, width)
        if cross:
            self.query = layers.xavier(nn.Linear(width, width))
            self.cross_out = layers.xavier(nn.Linear(width, width))
            self.cross_norm = layers.norm(config.norm, width)
        self.feed = Feed(config)
        self.feed_norm = layers.norm(config.norm, width)
        self.drop = nn.Dropout(config.dropout)


class Transformer(Seq2Seq):
    """The network as it is trained."""

    config_class = TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.target_embedding = _embedding(config.target_vocabulary, width)
        self.source_embedding = (
            self.target_embedding if config.tied == "all" else _embedding(config.source_vocabulary, width)
        )
        self.output = (
            _embedding(config.target_vocabulary, width) if config.tied == "none" else self.target_embedding
        )
        self.encoder = nn.ModuleList(Layer(config, cross=False) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(Layer(config, cross=True) for _ in range(config.decoder_layers))
        # Keys and values of the source for every decoder layer, from one product.
        parts = 2 * config.decoder_layers
        self.memory = layers.xavier(nn.Linear(width, parts * width), parts)
        if config.norm_place == "pre":
            self.encoder_norm = layers.norm(config.norm, width)
            self.decoder_norm = layers.norm(config.norm, width)
        self.drop = nn.Dropout(config.dropout)
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.randn(2, config.longest, width) * width**-0.5)
        else:
            table_width = width if config.positions == "sinusoidal" else width // config.heads
            self.register_buffer("table", layers.sinusoids(config.longest, table_width), persistent=False)

    def forward(self, source: Source, target: Ragged, *, want: Collection[str] = ()) -> Output:
        memory = encode(self, self.config, source)
        ids_ST, _ = target.padded()
        sentences, width = ids_ST.shape
        position_T = torch.arange(width, device=ids_ST.device)
        x_STD = embed(self, self.config, ids_ST, position_T, side=1)
        dropout = self.config.attention_dropout if self.training else 0.0

        def own(index: int, query_SHQP: Tensor, key_SHQP: Tensor, value_SHQP: Tensor) -> Tensor:
            return layers.attend(query_SHQP, key_SHQP, value_SHQP, causal=True, dropout=dropout)

        x_STD, attention = decode(self, self.config, x_STD, position_T, memory, own, want=want)
        # Rows behind a sentence's end hold nothing real: leaving them out here saves the loss their cost.
        hidden_ND = x_STD.reshape(sentences * width, -1)[target.cells_N(width)]
        return Output(hidden_ND, attention=attention)

    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        weight = self.output.weight
        return F.linear(hidden, weight if only is None else weight[only])

    def frozen(self, linear: Linear) -> Stepper:
        return TransformerStepper(self, linear)


def _embedding(vocabulary: int, width: int) -> nn.Embedding:
    embedding = nn.Embedding(vocabulary, width)
    nn.init.normal_(embedding.weight, std=width**-0.5)
    return embedding


def _residual(layer: Any, place: str, norm: Any, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
    if place == "post":
        return norm(x + layer.drop(sublayer(x)))
    return x + layer.drop(sublayer(norm(x)))


def _feed(layer: Any, config: TransformerConfig, x_SQD: Tensor) -> Tensor:
    inner = layer.feed.inner(x_SQD)
    if config.activation == "swiglu":
        gate, value = inner.chunk(2, -1)
        inner = F.silu(gate) * value
    else:
        inner = F.relu(inner) if config.activation == "relu" else F.gelu(inner)
    return layer.feed.outer(inner)


def embed(net: Any, config: TransformerConfig, ids: Tensor, position: Tensor, *, side: int) -> Tensor:
    """Scaled embeddings with positions added; `side` is 0 for the source, 1 for the target."""
    weight = (net.target_embedding if side else net.source_embedding).weight
    x = F.embedding(ids, weight) * math.sqrt(config.width)
    if config.positions == "sinusoidal":
        x = x + net.table[position]
    elif config.positions == "learned":
        x = x + net.positions[side, position]
    return net.drop(x)


def _split(net: Any, config: TransformerConfig, merged_SQD: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [S, H, Q, P] from their merged product."""
    query, key, value = (layers.heads(part, config.heads) for part in merged_SQD.chunk(3, -1))
    if config.positions == "rotary":
        query, key = (layers.rotated(part, net.table, position) for part in (query, key))
    return query, key, value


def encode(net: Any, config: TransformerConfig, source: Source) -> Memory:
    """Read the source: keys and values for every decoder layer, and the mask over them."""
    if source.longest > config.longest:
        raise ConfigError(f"a source has {source.longest} pieces, the network positions for {config.longest}")
    ids_SL, real_SL = source.padded(layers.key_multiple(net))
    mask = layers.blocked(real_SL)[:, None, None]
    position_L = torch.arange(ids_SL.shape[1], device=ids_SL.device).clamp(max=config.longest - 1)
    x_SLD = embed(net, config, ids_SL, position_L, side=0)
    dropout = config.attention_dropout if getattr(net, "training", False) else 0.0

    for layer in net.encoder:

        def own(x_SLD: Tensor, layer: Any = layer) -> Tensor:
            query, key, value = _split(net, config, layer.own(x_SLD), position_L)
            return layer.own_out(layers.attend(query, key, value, mask, dropout=dropout))

        def feed(x_SLD: Tensor, layer: Any = layer) -> Tensor:
            return _feed(layer, config, x_SLD)

        x_SLD = _residual(layer, config.norm_place, layer.own_norm, x_SLD, own)
        x_SLD = _residual(layer, config.norm_place, layer.feed_norm, x_SLD, feed)
    if config.norm_place == "pre":
        x_SLD = net.encoder_norm(x_SLD)
    both_SAHLP = net.memory(x_SLD).unflatten(-1, (2 * config.decoder_layers, config.heads, -1))
    both_SAHLP = both_SAHLP.permute(0, 2, 3, 1, 4)
    return Memory({"both": both_SAHLP, "mask": mask}, {"both": (3, 0.0), "mask": (3, -math.inf)})


def decode(
    net: Any,
    config: TransformerConfig,
    x_SQD: Tensor,
    position: Tensor,
    memory: Memory,
    own: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    *,
    want: Collection[str] = (),
) -> tuple[Tensor, Tensor | None]:
    """The decoder's layers; `own(layer index, query, key, value)` is attention to what went before."""
    both_SAHLP, mask = memory["both"], memory["mask"]
    dropout = config.attention_dropout if getattr(net, "training", False) else 0.0
    weights_ASHQL: list[Tensor] = []

    for index, layer in enumerate(net.decoder):

        def look_back(x_SQD: Tensor, index: int = index, layer: Any = layer) -> Tensor:
            return layer.own_out(own(index, *_split(net, config, layer.own(x_SQD), position)))

        def look_over(x_SQD: Tensor, index: int = index, layer: Any = layer) -> Tensor:
            query_SHQP = layers.heads(layer.query(x_SQD), config.heads)
            key_SHLP, value_SHLP = both_SAHLP[:, 2 * index], both_SAHLP[:, 2 * index + 1]
            if "attention" in want:
                weights_ASHQL.append(layers.attention_weights(query_SHQP, key_SHLP, mask))
            found_SQD = layers.attend(query_SHQP, key_SHLP, value_SHLP, mask, dropout=dropout)
            return layer.cross_out(found_SQD)

        def feed(x_SQD: Tensor, layer: Any = layer) -> Tensor:
            return _feed(layer, config, x_SQD)

        x_SQD = _residual(layer, config.norm_place, layer.own_norm, x_SQD, look_back)
        x_SQD = _residual(layer, config.norm_place, layer.cross_norm, x_SQD, look_over)
        x_SQD = _residual(layer, config.norm_place, layer.feed_norm, x_SQD, feed)
    if config.norm_place == "pre":
        x_SQD = net.decoder_norm(x_SQD)
    return x_SQD, torch.stack(weights_ASHQL) if weights_ASHQL else None


class TransformerStepper(Stepper):
    """The Transformer for translating: cached keys and values, one call for any number of new tokens."""

    def __init__(self, net: Transformer, linear: Linear) -> None:
        self.config = net.config
        self.net = layers.freeze(net, linear)
        for name in ("source_embedding", "target_embedding"):
            setattr(self.net, name, getattr(net, name))
        self.net.table = getattr(net, "table", None)
        self.net.positions = getattr(net, "positions", None)
        self.weight_VD = net.output.weight.detach()
        self.product = linear(self.weight_VD, None)

    def start(self, source: Source, *, hypotheses: int, room: int, reorders: bool = True) -> State:
        if room > self.config.longest:
            raise ConfigError(
                f"{room} target positions are asked for, the network has {self.config.longest}; "
                "lower --max-length"
            )
        memory = encode(self.net, self.config, source)
        store = layers.key_value_store(
            memory["both"],
            (len(source), hypotheses),
            reorders=reorders,
            layers=self.config.decoder_layers,
            heads=self.config.heads,
            width=self.config.width,
            room=room,
        )
        return State(memory, store, torch.zeros_like(source.lengths_S))

    def step(self, tokens_SKT: Tensor, state: State, *, want: Collection[str] = ()) -> tuple[Output, State]:
        memory, store, position_S = state.take()
        sentences, hypotheses, count = tokens_SKT.shape
        mask = store.advance(count)
        step_T = torch.arange(count, device=tokens_SKT.device)
        position_SQ = (position_S[:, None] + step_T).repeat(1, hypotheses)
        x_SQD = embed(self.net, self.config, tokens_SKT.flatten(1), position_SQ, side=1)

        def own(index: int, query_SHQP: Tensor, key_SHQP: Tensor, value_SHQP: Tensor) -> Tensor:
            return store.attend(index, query_SHQP, key_SHQP, value_SHQP, mask)

        x_SQD, attention = decode(self.net, self.config, x_SQD, position_SQ, memory, own, want=want)
        hidden_SKTD = x_SQD.view(sentences, hypotheses, count, -1)
        return Output(hidden_SKTD, attention=attention), State(memory, store, position_S + count)

    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        return self.product(hidden) if only is None else F.linear(hidden, self.weight_VD[only])
