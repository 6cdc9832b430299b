"""The Transformer of "Attention Is All You Need" (arXiv 1706.03762) and the options people use today.

Axes: S sentence, K hypothesis, L source position, T target position, Q queries (K * T of them when
decoding), N target tokens of a batch in a row, M source tokens in a row, H heads, P width of one head,
D width, V vocabulary, A layers, C columns and J slots of what is cached.

Its layers are in transformer_layers.py; here they are put together, for training and for translating.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.lab import hard
from trmt.lab.hard import FocusConfig
from trmt.native import reading, stepping
from trmt.nets import attention, fixed_stores, fused, layers, positions, stores
from trmt.nets.attention import Spans
from trmt.nets.base import Linear, Memory, Output, Ragged, Seq2Seq, Source, State, Stepper, narrowed, stacked
from trmt.nets.positions import PositionConfig
from trmt.nets.transformer_layers import (
    Encoder,
    Layer,
    attend_around,
    attend_in_row,
    check_length,
    cross_query,
    decode,
    embed,
    feed,
    make_memories,
    memorised,
    own_parts,
    piece_vectors,
)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(PositionConfig, FocusConfig):
    """The sizes and options of a Transformer; the defaults are the paper's base model."""

    source_vocabulary: int
    target_vocabulary: int
    feed_forward: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.1
    norm_place: Literal["post", "pre"] = "post"
    norm: Literal["layer", "rms", "batch"] = "layer"
    epsilon: float = 0.0  # of the norms; 0 takes what is usual for them
    residual: bool = True  # whether what goes into a sublayer is added to what comes out of it
    score_scale: bool = True  # whether scores of attention are divided by the square root of a head's width
    cross_source: Literal["last", "same"] = "last"  # the encoder's layer that a decoder's layer looks at
    embedding_norm: bool = False  # a norm behind the embeddings, as BERT has it
    embedding_scale: bool = True  # embeddings are multiplied by the square root of the width
    segments: int = 1  # kinds of source tokens, each of which adds a vector of its own if there are several
    activation: Literal["relu", "gelu", "swish", "swiglu"] = "relu"
    tied: Literal["all", "target", "none"] = "all"  # which embeddings share the output's matrix
    output_bias: bool = False  # a bias for each piece of the vocabulary, as Marian has it

    def __post_init__(self) -> None:
        layers.check_sizes(self, but=("temperature", "entropy"))
        self.check_positions()
        self.check_focus()
        if self.tied == "all" and self.source_vocabulary != self.target_vocabulary:
            raise ConfigError(
                'tied = "all" needs a joint tokenizer; set network.tied = "target" or train one'
            )
        if self.cross_source == "same" and self.encoder_layers != self.decoder_layers:
            raise ConfigError(
                f'cross_source = "same" needs as many layers on both sides, and encoder_layers = '
                f"{self.encoder_layers}, decoder_layers = {self.decoder_layers}; change one"
            )

    @property
    def usual(self) -> bool:
        """Whether the layers are those of the paper, but for what stands where and the kind of norm."""
        return (
            self.norm in ("layer", "rms")
            and self.residual
            and self.score_scale
            and self.cross_source == "last"
            and self.cross_focus == "soft"
            and self.position_join == "add"
        )


class Transformer(Encoder, Seq2Seq):
    """The network as it is trained."""

    config_class = TransformerConfig
    begins_with_encoder = True
    in_row = True
    layers_called_once = True

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        # Where positions have columns of their own, only the output has a use for the others of a piece.
        written = config.piece_width if config.tied == "none" else width
        self.target_embedding = piece_vectors(config.target_vocabulary, written)
        source_embedding = (
            self.target_embedding
            if config.tied == "all"
            else piece_vectors(config.source_vocabulary, config.piece_width)
        )
        self.source_embedding = source_embedding  # the second of the names, whatever is made next
        self.output = (
            piece_vectors(config.target_vocabulary, width) if config.tied == "none" else self.target_embedding
        )
        self.output_bias = nn.Parameter(torch.zeros(config.target_vocabulary)) if config.output_bias else None
        self.make_encoder(config, source_embedding, sides=2)
        self.decoder = nn.ModuleList(Layer(config, cross=True) for _ in range(config.decoder_layers))
        if config.cross_source == "last":
            # Keys and values of the source for every decoder layer, from one product.
            parts = 2 * config.decoder_layers
            self.memory = layers.xavier(fused.Linear(width, parts * width), parts)
        else:
            make_memories(self, config)
        if config.cross_focus == "sampled":
            self.baseline = nn.Linear(width, 1)
        if config.norm_place == "pre":
            self.decoder_norm = layers.norm(config.norm, width, config.epsilon)

    @property
    def counts_tokens(self) -> bool:
        return self.couples_batch or self.config.cross_focus == "sampled"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        # What `to` and its kind come down to.
        net: Transformer = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.target_embedding.weight.is_cuda:
            attention.load_varlen()
        return net

    def forward(self, source: Source, target: Ragged, *, want: Collection[str] = ()) -> Output:
        config = self.config
        spans, over = Spans.of(target), Spans.of(source)
        position_N = target.positions_N()
        dropout = config.attention_dropout if self.training else 0.0
        weights: list[Tensor] = []
        shown, heads = narrowed(want, config.decoder_layers)
        around: list[Tensor] | None = [] if "encoder_attention" in want else None
        back: list[Tensor] | None = [] if "decoder_attention" in want else None
        glances = hard.Glances(self, spans, over) if config.cross_focus != "soft" else None

        def look_back(index: int, merged_N3D: Tensor) -> Tensor:
            return attend_in_row(self, index, merged_N3D, position_N, spans, side=1, weights=back)

        def look_over(index: int, query_ND: Tensor) -> Tensor:
            if glances:
                return glances.over_row(query_ND, memory_M2D[index])
            if index in shown:
                key_MD = memory_M2D[index].chunk(2, -1)[0]
                weights.append(
                    attention.attention_weights(query_ND, key_MD, spans, over, config.heads, only=heads)
                )
            return attention.attend_over(
                query_ND, memory_M2D[index], spans, over, config.heads, dropout=dropout
            )

        read = self.read(source, through=memorised, weights=around)
        memory_M2D = read.chunk(config.decoder_layers, -1)
        x_ND = embed(self, config, target.ids_N, position_N, side=1)
        hidden_ND = decode(self, config, x_ND, look_back, look_over)
        aux = glances.losses(self.readout, hidden_ND, target) if glances else {}
        weights = glances.weights if glances and "attention" in want else weights
        return Output(hidden_ND, aux, stacked(weights), stacked(around or ()), stacked(back or ()))

    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        return _readout(hidden, self.output.weight, self.output_bias, only)

    def readout_matrix(self) -> Tensor | None:
        return self.output.weight if self.output_bias is None else None

    def frozen(self, linear: Linear) -> Stepper:
        return TransformerStepper(self, linear)


def _readout(hidden: Tensor, weight_VD: Tensor, bias_V: Tensor | None, only: Tensor | None) -> Tensor:
    if only is not None:
        weight_VD, bias_V = weight_VD[only], None if bias_V is None else bias_V[only]
    return F.linear(hidden, weight_VD, bias_V)


def remember(net: Any, config: TransformerConfig, source: Source) -> Memory:
    """Read the source for decoding: keys and values for every decoder layer, and the mask over them."""
    check_length(config, source)
    ids_SL, real_SL = source.padded(layers.KEY_MULTIPLE)
    mask = layers.blocked(real_SL, net.source_embedding.weight.dtype)[:, None, None]
    position_L = positions.grid(config, ids_SL)

    def look_around(index: int, merged_SLD: Tensor) -> Tensor:
        return attend_around(net, config, index, merged_SLD, mask)

    x_SLD = embed(net, config, ids_SL, position_L, side=0)
    both_SLAHP = memorised(net, config, x_SLD, look_around).unflatten(
        -1, (2 * config.decoder_layers, config.heads, -1)
    )
    # Each contiguous: attention walks along the source.
    tensors = {
        name: part_SLHP.transpose(1, 2).contiguous()
        for name, part_SLHP in zip(_memory_names(config), both_SLAHP.unbind(2), strict=True)
    }
    along = dict.fromkeys(tensors, (2, 0.0))
    return Memory({**tensors, "mask": mask}, {**along, "mask": (3, -math.inf)})


def _memory_names(config: TransformerConfig) -> list[str]:
    return [f"{part}{layer}" for layer in range(config.decoder_layers) for part in ("key", "value")]


# What the frozen network has from the other one as it is; names that are tied would be there once otherwise.
SHARED = ("source_embedding", "target_embedding", "source_turns", "target_turns", "table")


class TransformerStepper(Stepper):
    """The Transformer for translating: cached keys and values, one call for any number of new tokens.

    A step does what `decode` does, once more in other words: at a few rows a time, every call that is saved
    counts.
    """

    def __init__(self, net: Transformer, linear: Linear) -> None:
        self.config = config = net.config
        self.net = layers.freeze(net, linear)
        for name in SHARED:
            setattr(self.net, name, getattr(net, name, None))
        self.weight_VD = net.output.weight.detach()
        self.bias_V = None if net.output_bias is None else net.output_bias.detach()
        self.product = linear(self.weight_VD, self.bias_V)
        self.stepwise = stepping.suits(self.config, self.product)
        self.fixes = not self.stepwise
        self.reader: reading.Reader | None = None
        if self.stepwise:
            stepping.round_once(net, self.net)
            self.kernel = stepping.kernel_for(net, self.net)
            self.reader = reading.reader_for(net, self.net)
        self.embedding_VD = net.target_embedding.weight.detach()
        self.scale = math.sqrt(config.width) if config.embedding_scale else 1.0
        self.post = config.norm_place == "post"
        hard_look = functools.partial(hard.over_grid, config)
        self.look_over = layers.attend if config.cross_focus == "soft" else hard_look
        norms = [
            norm for layer in self.net.decoder for norm in (layer.own_norm, layer.cross_norm, layer.feed_norm)
        ]
        if not self.post:
            norms.append(self.net.decoder_norm)
        self.first_norm = None if self.post else norms.pop(0)
        self.norms = [norms[3 * index : 3 * index + 3] for index in range(config.decoder_layers)]
        names = _memory_names(config)
        self.names = list(zip(names[::2], names[1::2], strict=True))

    def start(
        self,
        source: Source,
        *,
        hypotheses: int,
        room: int,
        reorders: bool = True,
        fixed: bool = False,
    ) -> State:
        if room > self.config.limit:
            raise ConfigError(
                f"{room} target positions are asked for, the network has {self.config.limit}; "
                "lower --max-length"
            )
        position_S = torch.zeros_like(source.lengths_S)
        if self.stepwise:
            read = self.reader.read if self.reader else partial(reading.remember, self.net, self.config)
            cache = stepping.Cache.empty(
                (len(source), hypotheses), layers=self.config.decoder_layers, width=self.config.width
            )
            return State(read(source), cache, position_S)
        memory = remember(self.net, self.config, source)
        store = (fixed_stores if fixed else stores).key_value_store(
            memory["key0"],
            (len(source), hypotheses),
            reorders=reorders,
            layers=self.config.decoder_layers,
            heads=self.config.heads,
            width=self.config.width,
            room=room,
        )
        return State(memory, store, position_S)

    def step(self, tokens_SKT: Tensor, state: State, *, want: Collection[str] = ()) -> tuple[Output, State]:
        if self.stepwise:
            return self._stepwise(tokens_SKT, state, want=want)
        memory, store, position_S = state.take()
        config = self.config
        sentences, hypotheses, count = tokens_SKT.shape
        position = self._positions(store, position_S, tokens_SKT)
        mask, over = store.advance(count), memory["mask"]
        looks = self._looks(store, mask)
        x_SQD = self._embedded(tokens_SKT.view(sentences, -1), position)
        inner_SQD = x_SQD if self.first_norm is None else self.first_norm(x_SQD)
        weights: list[Tensor] = []
        for index, layer in enumerate(self.net.decoder):
            own_norm, cross_norm, feed_norm = self.norms[index]
            key_SHLP, value_SHLP = (memory[name] for name in self.names[index])
            query_SHQP, both_2SHQP = self._split(own_parts(layer, config, inner_SQD), position, store)
            found_SQD = store.attend(index, query_SHQP, both_2SHQP, mask, looks(index))
            x_SQD, inner_SQD = self._add(x_SQD, layer.own_out(found_SQD), own_norm)
            query_SHQP = layers.heads(cross_query(layer, config, inner_SQD), config.heads)
            if "attention" in want:
                weights.append(hard.weights_over(config, query_SHQP, key_SHLP, over))
            found_SQD = self.look_over(query_SHQP, key_SHLP, value_SHLP, over)
            x_SQD, inner_SQD = self._add(x_SQD, layer.cross_out(found_SQD), cross_norm)
            x_SQD, inner_SQD = self._add(x_SQD, feed(layer, config, inner_SQD), feed_norm)
        hidden_SKTD = inner_SQD.view(sentences, hypotheses, count, -1)
        attention = torch.stack(weights) if weights else None
        return Output(hidden_SKTD, attention=attention), State(memory, store, position_S + count)

    def _stepwise(
        self, tokens_SKT: Tensor, state: State, *, want: Collection[str] = ()
    ) -> tuple[Output, State]:
        """The same one token after the other, in the arithmetic of `stepping`."""
        memory, cache, position_S = state.take()
        assert isinstance(memory, stepping.Remembered)
        count = tokens_SKT.shape[2]
        cache.go_on(position_S, count)
        hidden, weights = [], []
        for tokens_SK in tokens_SKT.unbind(2):
            if self.kernel and "attention" not in want:
                one_SKD = self.kernel.step(tokens_SK, position_S, cache, memory)
            else:
                memory = memory.gathered()
                one_SKD, looked = self._one_token(tokens_SK, position_S, cache, memory)
                weights.append(torch.stack(looked))  # [A, S, H, K, L]
            hidden.append(one_SKD)
            position_S.add_(1)  # in place: the kernel knows where it lies
        attention = torch.stack(weights, 4).flatten(3, 4) if "attention" in want else None
        hidden_SKTD = hidden[0][:, :, None] if count == 1 else torch.stack(hidden, 2)
        return Output(hidden_SKTD, attention=attention), State(memory, cache, position_S)

    def _one_token(
        self, tokens_SK: Tensor, position_S: Tensor, cache: stepping.Cache, memory: Memory
    ) -> tuple[Tensor, list[Tensor]]:
        """What the kernel does, in plain PyTorch, and the weights of attention over the source."""
        config, both_SALD = self.config, memory["both"]
        columns = int(position_S.max()) + 1
        past_SC = torch.arange(columns) <= position_S[:, None]
        past = layers.blocked(past_SC)[:, None, None]
        cache.mark(position_S)
        weights: list[Tensor] = []

        def look_back(index: int, merged_SKD: Tensor) -> Tensor:
            query_SKD, key_SKD, value_SKD = merged_SKD.chunk(3, -1)
            cache.put(index, key_SKD, value_SKD, position_S)
            return stepping.attend(query_SKD, *cache.histories(index, columns), past, config.heads)

        def look_over(index: int, query_SKD: Tensor) -> Tensor:
            key, value = both_SALD[:, 2 * index, None], both_SALD[:, 2 * index + 1, None]
            query_SHKP, key_SHLP = (layers.heads(x, config.heads) for x in (query_SKD, key[:, 0]))
            weights.append(layers.attention_weights(query_SHKP, key_SHLP, memory["mask"]))
            return stepping.attend(query_SKD, key, value, memory["mask"], config.heads)

        position_SK = position_S[:, None].expand(tokens_SK.shape)
        x_SKD = embed(self.net, config, tokens_SK, position_SK, side=1)
        return decode(self.net, config, x_SKD, look_back, look_over), weights

    def _looks(self, store: Any, mask: Tensor) -> Callable[[int], layers.Look]:
        """How each layer looks at what went before."""
        if not positions.by_distance(self.config):
            return lambda _: layers.attend
        distance_SQJ = store.distances(mask)
        return lambda index: positions.look(self.net, self.config, index, distance_SQJ, side=1, steady=True)

    def _positions(self, store: Any, position_S: Tensor, tokens_SKT: Tensor) -> Any:
        """Of each query: a number if it is the same for all, or a tensor [S or 1, Q]."""
        _, hypotheses, count = tokens_SKT.shape
        if store.even and count == 1:
            return store.columns
        step_T = torch.arange(count, device=position_S.device)
        return (position_S[:, None] + step_T).repeat(1, hypotheses)

    def _embedded(self, ids_SQ: Tensor, position: Any) -> Tensor:
        x_SQD = F.embedding(ids_SQ, self.embedding_VD).mul_(self.scale)
        x_SQD = positions.placed(self.net, self.config, x_SQD, ids_SQ, position, side=1)
        return self.net.embedding_norms[1](x_SQD) if self.config.embedding_norm else x_SQD

    def _add(self, x_SQD: Tensor, y_SQD: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        added_SQD = y_SQD.add_(x_SQD) if self.config.residual else y_SQD
        inner_SQD = norm(added_SQD)
        return (inner_SQD if self.post else added_SQD), inner_SQD

    def _split(self, merged_SQD: Tensor, position: Any, store: Any) -> tuple[Tensor, Tensor]:
        """Queries [S, H, Q, P] from their merged product, and keys and values [2, S, H, Q, P]."""
        sentences, queries, _ = merged_SQD.shape
        parts = merged_SQD.view(sentences, queries, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        if self.config.positions != "rotary":
            return parts[0], parts[1:]
        angle = positions.angles(self.net, position, upto=store.columns)
        angle = angle[:, None] if angle.dim() == 3 else angle
        query, key = layers.rotated(parts[0], angle), layers.rotated(parts[1], angle)
        return query, torch.stack([key, parts[2]])

    def mixes_ages(self, hypotheses: int, room: int) -> bool:
        return self.stepwise or stores.mixes_ages(hypotheses, room)

    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        return layers.readout(self.product, self.weight_VD, hidden, only, self.bias_V)

    def narrowed(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        return layers.narrowed(self.product, ids)
