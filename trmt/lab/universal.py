"""The Universal Transformer (Dehghani et al., arXiv 1807.03819): one layer, again and again.

Encoder and decoder have a single layer each, whose weights all steps share. Before every step a position is
told where it stands and which step it is. With adaptive computation time (Graves, arXiv 1603.08983) each
position decides for itself after how many steps it has seen enough: a step's state counts with the
probability of halting there, and one that has halted stays as it is while others go on and look at it.

Axes: S sentence, K hypothesis, L source position, Q queries (K * T of them when decoding), N target tokens of
a batch in a row, M source tokens in a row, H heads, P width of one head, D width, V vocabulary, A steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.nets import attention, fixed_stores, fused, layers, stores
from trmt.nets.attention import Spans
from trmt.nets.base import Linear, Memory, Output, Product, Ragged, Seq2Seq, Source, State, Stepper, stacked
from trmt.nets.transformer_layers import Layer

Sublayer = tuple[Any, Callable[[Tensor], Tensor]]  # with the norm that belongs to it


OUTPUTS = 16  # of a product that torch makes like larger ones


@dataclass(frozen=True, kw_only=True)
class UniversalConfig:
    """The sizes and options of a Universal Transformer; the defaults are the paper's base model."""

    source_vocabulary: int
    target_vocabulary: int
    width: int = 512
    feed_forward: int = 2048
    heads: int = 8
    encoder_steps: int = 6  # with halting = "adaptive" the most there are
    decoder_steps: int = 6
    halting: Literal["adaptive", "fixed"] = "adaptive"
    threshold: float = 0.99  # of the probability of having halted; what is left of it goes to the last step
    ponder: float = 0.01  # what a step of one position costs, beside the loss of one target token
    dropout: float = 0.1
    attention_dropout: float = 0.0
    norm_place: Literal["post", "pre"] = "post"
    norm: Literal["layer", "rms"] = "layer"
    epsilon: float = 0.0  # of the norms; 0 takes what is usual for them
    activation: Literal["relu", "gelu", "swiglu"] = "relu"
    tied: Literal["all", "target", "none"] = "all"  # which embeddings share the output's matrix
    longest: int = 1024  # positions there are

    def __post_init__(self) -> None:
        layers.check_sizes(self)
        if self.width % self.heads:
            raise ConfigError(f"width = {self.width} cannot be divided into heads = {self.heads}; change one")
        if self.tied == "all" and self.source_vocabulary != self.target_vocabulary:
            raise ConfigError(
                'tied = "all" needs a joint tokenizer; set network.tied = "target" or train one'
            )


class Universal(Seq2Seq):
    """The network as it is trained.

    It computes no padding, but counts the steps of all positions it is given, so batches are not filled up.
    """

    config_class = UniversalConfig

    def __init__(self, config: UniversalConfig) -> None:
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
        self.encoder_layer = Layer(config, cross=False)
        self.decoder_layer = Layer(config, cross=True)
        self.memory = layers.xavier(fused.Linear(width, 2 * width), 2)
        if config.halting == "adaptive":
            self.encoder_halt, self.decoder_halt = _halting(width), _halting(width)
        if config.norm_place == "pre":
            self.encoder_norm = layers.norm(config.norm, width, config.epsilon)
            self.decoder_norm = layers.norm(config.norm, width, config.epsilon)
        places = max(config.longest, config.encoder_steps, config.decoder_steps)
        self.register_buffer("table", layers.sinusoids(places, width), persistent=False)

    def forward(self, source: Source, target: Ragged, *, want: Collection[str] = ()) -> Output:
        config = self.config
        _check_length(config, source)
        spans, over = Spans.of(target), Spans.of(source)
        weights: list[Tensor] = []
        around: list[Tensor] | None = [] if "encoder_attention" in want else None
        back: list[Tensor] = []
        hidden_MD, read = encode(
            self,
            config,
            source.ids_N,
            source.positions_N(),
            _around(self, over, around),
            all_steps=around is not None,
        )
        memory_M2D = self.memory(hidden_MD)
        dropout = config.attention_dropout if self.training else 0.0

        def look_back(_: int, merged_N3D: Tensor) -> Tensor:
            if "decoder_attention" in want:
                back.append(attention.own_weights(merged_N3D, spans, config.heads, causal=True))
            return attention.attend_own(merged_N3D, spans, config.heads, causal=True, dropout=dropout)

        def look_over(query_ND: Tensor) -> Tensor:
            if "attention" in want:
                key_MD = memory_M2D.chunk(2, -1)[0]
                weights.append(attention.attention_weights(query_ND, key_MD, spans, over, config.heads))
            return attention.attend_over(query_ND, memory_M2D, spans, over, config.heads, dropout=dropout)

        hidden_ND, written = decode(
            self,
            config,
            target.ids_N,
            target.positions_N(),
            look_back,
            look_over,
            all_steps="attention" in want or "decoder_attention" in want,
        )
        aux = {}
        if config.halting == "adaptive":
            aux["ponder"] = (
                config.ponder * (read + written),
                source.lengths_S.sum() + target.lengths_S.sum(),
            )
        return Output(hidden_ND, aux, stacked(weights), stacked(around or ()), stacked(back))

    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        weight = self.output.weight
        return F.linear(hidden, weight if only is None else weight[only])

    def readout_matrix(self) -> Tensor:
        return self.output.weight

    def frozen(self, linear: Linear) -> Stepper:
        return UniversalStepper(self, linear)


def _embedding(vocabulary: int, width: int) -> nn.Embedding:
    embedding = nn.Embedding(vocabulary, width)
    nn.init.normal_(embedding.weight, std=width**-0.5)
    return embedding


def _halting(width: int) -> nn.Linear:
    """The probability of halting, as a logit; high at first, because long thoughts are hard to learn."""
    linear = layers.xavier(nn.Linear(width, 1))
    nn.init.ones_(linear.bias)
    return linear


def _check_length(config: UniversalConfig, source: Source) -> None:
    if source.longest > config.longest:
        raise ConfigError(f"a source has {source.longest} pieces, the network positions for {config.longest}")


def _around(net: Universal, over: Spans, weights: list[Tensor] | None) -> Callable[[int, Tensor], Tensor]:
    """Attention of the source to itself; `weights` gets those of each step."""
    heads, dropout = net.config.heads, net.config.attention_dropout if net.training else 0.0

    def look_around(_: int, merged_M3D: Tensor) -> Tensor:
        if weights is not None:
            weights.append(attention.own_weights(merged_M3D, over, heads, causal=False))
        return attention.attend_own(merged_M3D, over, heads, causal=False, dropout=dropout)

    return look_around


def encode(
    net: Any,
    config: UniversalConfig,
    ids: Tensor,
    position: Tensor,
    look_around: Callable[[int, Tensor], Tensor],
    *,
    all_steps: bool = False,
) -> tuple[Tensor, Tensor]:
    """The encoder on any layout, and the steps of all its positions."""
    layer, dropout = net.encoder_layer, _dropout(net, config)

    def transition(step: int, x: Tensor) -> Tensor:
        own = (layer.own_norm, lambda x: layer.own_out(look_around(step, layer.own(x))))
        return _through([own, (layer.feed_norm, lambda x: _feed(layer, config, x))], config, x, dropout)

    x = fused.drop(F.embedding(ids, net.source_embedding.weight) * math.sqrt(config.width), dropout)
    course = Course(net.table, position, config.encoder_steps, getattr(net, "encoder_halt", None), all_steps)
    x, spent = pondered(course, config.threshold, x, transition)
    return (net.encoder_norm(x) if config.norm_place == "pre" else x), spent


def decode(
    net: Any,
    config: UniversalConfig,
    ids: Tensor,
    position: Tensor,
    look_back: Callable[[int, Tensor], Tensor],
    look_over: Callable[[Tensor], Tensor],
    *,
    all_steps: bool,
) -> tuple[Tensor, Tensor]:
    """The decoder on any layout, and the steps of all its positions.

    `look_back(step, merged queries, keys, values)` is attention to the same step of what went before;
    `all_steps` are taken where somebody will want to look at those that change nothing.
    """
    layer, dropout = net.decoder_layer, _dropout(net, config)

    def transition(step: int, x: Tensor) -> Tensor:
        own = (layer.own_norm, lambda x: layer.own_out(look_back(step, layer.own(x))))
        cross = (layer.cross_norm, lambda x: layer.cross_out(look_over(layer.query(x))))
        feed = (layer.feed_norm, lambda x: _feed(layer, config, x))
        return _through([own, cross, feed], config, x, dropout)

    x = fused.drop(F.embedding(ids, net.target_embedding.weight) * math.sqrt(config.width), dropout)
    course = Course(net.table, position, config.decoder_steps, getattr(net, "decoder_halt", None), all_steps)
    x, spent = pondered(course, config.threshold, x, transition)
    return (net.decoder_norm(x) if config.norm_place == "pre" else x), spent


@dataclass(frozen=True)
class Course:
    """The steps ahead of some positions."""

    table: Tensor  # sinusoids, of positions and of steps
    position: Tensor
    steps: int
    halt: Any = None  # from a state to the logit of halting there; None: nobody halts before the end
    all_steps: bool = False

    def told(self, step: int, x: Tensor) -> Tensor:
        """The states, told where they stand and which step it is."""
        return x + self.table[self.position] + self.table[step]


def pondered(
    course: Course, threshold: float, x: Tensor, transition: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """What the states become, and the steps of all of them with their remainders, which have a gradient."""
    if course.halt is None:
        for step in range(course.steps):
            x = transition(step, course.told(step, x))
        return x, x.new_full((), float(course.steps * x.shape[:-1].numel()))
    # Shares are added up in full precision, whatever the states have.
    out, halted = torch.zeros_like(x), torch.zeros(x.shape[:-1], device=x.device)
    running = torch.ones_like(halted, dtype=torch.bool)
    spent = x.new_zeros(())
    for step in range(course.steps):
        told = course.told(step, x)
        chance = course.halt(told).float().sigmoid().squeeze(-1)
        ends = halted + chance > threshold if step + 1 < course.steps else torch.ones_like(running)
        ends = ends & running
        weight = (1 - halted).where(ends, chance).where(running, 0.0)
        new = transition(step, told)
        out = out + weight[..., None].to(x.dtype) * new
        spent = spent + running.sum() + weight.where(ends, 0.0).sum()
        halted = halted + weight
        # One that has halted stays as it is; the others look at it as it was then.
        x = new.where(running[..., None], x)
        running = running & ~ends
        if not course.all_steps and not bool(running.any()):
            break
    return out, spent


def _through(steps: Sequence[Sublayer], config: UniversalConfig, x: Tensor, dropout: float) -> Tensor:
    """Sublayers in turn, each with its residual connection and its norm."""
    for norm, sublayer in steps:
        if config.norm_place == "post":
            x = fused.add_norm(x, sublayer(x), norm, dropout)[1]
        else:
            x = x + fused.drop(sublayer(norm(x)), dropout)
    return x


def _feed(layer: Any, config: UniversalConfig, x: Tensor) -> Tensor:
    inner = layer.feed.inner(x)
    if config.activation == "swiglu":
        gate, value = inner.chunk(2, -1)
        inner = F.silu(gate) * value
    elif config.activation == "gelu":
        inner = F.gelu(inner)
    return layer.feed.outer(inner)


def _dropout(net: Any, config: UniversalConfig) -> float:
    return config.dropout if getattr(net, "training", False) else 0.0


def remember(net: Any, config: UniversalConfig, source: Source) -> Memory:
    """Read the source for decoding: keys and values, which all steps share, and the mask over them."""
    _check_length(config, source)
    ids_SL, real_SL = source.padded(layers.KEY_MULTIPLE)
    mask = layers.blocked(real_SL, net.source_embedding.weight.dtype)[:, None, None]
    position_L = torch.arange(ids_SL.shape[1], device=ids_SL.device).clamp(max=config.longest - 1)

    def look_around(_: int, merged_SLD: Tensor) -> Tensor:
        return layers.attend(*_split(config, merged_SLD), mask)

    hidden_SLD, _ = encode(net, config, ids_SL, position_L, look_around)
    key_SHLP, value_SHLP = (layers.heads(part, config.heads) for part in net.memory(hidden_SLD).chunk(2, -1))
    return Memory(
        {"key": key_SHLP.contiguous(), "value": value_SHLP.contiguous(), "mask": mask},
        {"key": (2, 0.0), "value": (2, 0.0), "mask": (3, -math.inf)},
    )


def _split(config: UniversalConfig, merged_SQD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [S, H, Q, P] from their merged product."""
    query, key, value = (layers.heads(part, config.heads) for part in merged_SQD.chunk(3, -1))
    return query, key, value


def _steady(halt: nn.Linear, linear: Linear) -> Product:
    """The product with one output, whose bits do not depend on how many rows there are.

    On the CPU, torch makes products with one output in another way than larger ones; outputs of zeros make
    it large enough.
    """
    weight, bias = (
        F.pad(halt.weight.detach(), (0, 0, 0, OUTPUTS - 1)),
        F.pad(halt.bias.detach(), (0, OUTPUTS - 1)),
    )
    product = linear(weight, bias)
    return lambda x: product(x)[..., :1]


class UniversalStepper(Stepper):
    """The Universal Transformer for translating: cached keys and values of every step.

    Also one that halts early leaves keys and values for all steps: those after it may take longer.
    """

    fixes = True

    def __init__(self, net: Universal, linear: Linear) -> None:
        self.config = net.config
        self.net = layers.freeze(net, linear)
        for name in ("source_embedding", "target_embedding"):
            setattr(self.net, name, getattr(net, name))
        self.net.table = net.table
        for name in ("encoder_halt", "decoder_halt"):
            if halt := getattr(net, name, None):
                setattr(self.net, name, _steady(halt, linear))
        self.weight_VD = net.output.weight.detach()
        self.product = linear(self.weight_VD, None)

    def start(
        self,
        source: Source,
        *,
        hypotheses: int,
        room: int,
        reorders: bool = True,
        fixed: bool = False,
    ) -> State:
        if room > self.config.longest:
            raise ConfigError(
                f"{room} target positions are asked for, the network has {self.config.longest}; "
                "lower --max-length"
            )
        memory = remember(self.net, self.config, source)
        store = (fixed_stores if fixed else stores).key_value_store(
            memory["key"],
            (len(source), hypotheses),
            reorders=reorders,
            layers=self.config.decoder_steps,
            heads=self.config.heads,
            width=self.config.width,
            room=room,
        )
        return State(memory, store, torch.zeros_like(source.lengths_S))

    def step(self, tokens_SKT: Tensor, state: State, *, want: Collection[str] = ()) -> tuple[Output, State]:
        memory, store, position_S = state.take()
        config = self.config
        sentences, hypotheses, count = tokens_SKT.shape
        mask = store.advance(count)
        step_T = torch.arange(count, device=tokens_SKT.device)
        position_SQ = (position_S[:, None] + step_T).repeat(1, hypotheses)
        weights: list[Tensor] = []

        def look_back(step: int, merged_SQD: Tensor) -> Tensor:
            query_SHQP, key_SHQP, value_SHQP = _split(config, merged_SQD)
            return store.attend(step, query_SHQP, torch.stack([key_SHQP, value_SHQP]), mask)

        def look_over(query_SQD: Tensor) -> Tensor:
            query_SHQP = layers.heads(query_SQD, config.heads)
            key_SHLP, value_SHLP = memory["key"], memory["value"]
            if "attention" in want:
                weights.append(layers.attention_weights(query_SHQP, key_SHLP, memory["mask"]))
            return layers.attend(query_SHQP, key_SHLP, value_SHLP, memory["mask"])

        x_SQD, _ = decode(
            self.net, config, tokens_SKT.flatten(1), position_SQ, look_back, look_over, all_steps=True
        )
        attention = torch.stack(weights) if weights else None
        hidden_SKTD = x_SQD.view(sentences, hypotheses, count, -1)
        return Output(hidden_SKTD, attention=attention), State(memory, store, position_S + count)

    def mixes_ages(self, hypotheses: int, room: int) -> bool:
        return stores.mixes_ages(hypotheses, room)

    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        return self.product(hidden) if only is None else F.linear(hidden, self.weight_VD[only])

    def narrowed(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        return layers.narrowed(self.product, ids)
