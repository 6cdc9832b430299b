"""Recurrent encoder-decoders: from the fixed context vector to attention of every kind.

Axes: S sentence, K hypothesis, L source position, T target position, N all tokens of a batch in a row,
Q queries, H heads, D width, G the gates of a cell side by side, V vocabulary.

The encoder's states h are summed up in one vector c, from which the decoder's first states are made. With
context = "start" the decoder sees nothing else of the source (Sutskever et al., arXiv 1409.3215), with
"every" it sees c at each step (Cho et al., arXiv 1406.1078), with "attention" it looks at the states h:

    place = "before"    c_t = look(s_t-1);  s_t = cell(s_t-1, [y_t-1, c_t]);  o_t = tanh(W [s_t, c_t, y_t-1])
                        (Bahdanau et al., arXiv 1409.0473)
    place = "after"     s_t = cell(s_t-1, y_t-1);  c_t = look(s_t);  o_t = tanh(W [s_t, c_t]); with
                        input_feeding the cell also sees o_t-1 (Luong et al., arXiv 1508.04025)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.lab.reinforce import Draw, reinforced
from trmt.nets import focus, layers
from trmt.nets.base import Linear, Memory, Output, Ragged, Rows, Seq2Seq, Source, State, Stepper
from trmt.nets.focus import Attention, AttentionConfig, Glance, Look, Pooling
from trmt.nets.recurrent import STATES, Cells, Kind, Reads, Recurrent, Steps, detached, last, plain


@dataclass(frozen=True, kw_only=True)
class RNNConfig(AttentionConfig):
    """The sizes and kinds of a recurrent encoder-decoder."""

    source_vocabulary: int
    target_vocabulary: int
    cell: Kind = "gru"
    reads: Reads = "both"  # the encoder's directions; "backward" reads the source from its end
    encoder_layers: int = 1
    decoder_layers: int = 1
    residual: bool = False  # around each layer but the first
    summary: Literal["last", "mean", "max", "attention"] = "last"  # the one vector made of a source
    context: Literal["start", "every", "attention"] = "attention"
    place: Literal["before", "after"] = "before"  # of the look: before the cell's step or after it
    input_feeding: bool = False
    dropout: float = 0.2
    tied: Literal["target", "none"] = "target"  # whether the output shares the target embedding

    def __post_init__(self) -> None:
        layers.check_sizes(self, but=("temperature", "entropy"))
        self.check_attention()
        if self.reads == "both" and self.width % 2:
            raise ConfigError(f'reads = "both" halves the width, and width = {self.width} is odd; change one')
        if self.residual and max(self.encoder_layers, self.decoder_layers) < 2:
            raise ConfigError(
                "residual = true goes around each layer but the first, and encoder_layers and "
                "decoder_layers are 1; set one of them higher"
            )
        if self.context != "attention":
            self._check_without_attention()
        if self.input_feeding and self.place == "before":
            raise ConfigError(
                'input_feeding = true feeds what a look after the step found, and place = "before"; '
                'set place = "after"'
            )

    def _check_without_attention(self) -> None:
        for name, usual in (("focus", "soft"), ("static", False), ("input_feeding", False)):
            if getattr(self, name) != usual:
                value = str(getattr(self, name)).lower()
                raise ConfigError(
                    f'{name} = {value} is of attention, and context = "{self.context}" has none; '
                    'set context = "attention"'
                )

    @property
    def looks(self) -> bool:
        """Whether there is a look at the source for each target token."""
        return self.context == "attention" and not self.static

    @property
    def looks_into_cell(self) -> bool:
        """Whether what a look finds changes the decoder's states, which then go step by step."""
        return self.input_feeding or (self.looks and self.place == "before")

    @property
    def constant(self) -> bool:
        """Whether the cell sees a vector that is the same at every step."""
        return self.context == "every" or (self.static and self.place == "before")


class RNN(Seq2Seq):
    """The network as it is trained: sequences run fused wherever no look stands between two steps."""

    config_class = RNNConfig

    def __init__(self, config: RNNConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        # Torch's unit variance: gates shrink what enters them, and of vectors that begin smaller, two layers
        # of LSTMs leave so little that attention finds nothing to tell apart for hundreds of steps.
        self.source_embedding = nn.Embedding(config.source_vocabulary, width)
        self.target_embedding = nn.Embedding(config.target_vocabulary, width)
        self.output = (
            self.target_embedding
            if config.tied == "target"
            else nn.Embedding(config.target_vocabulary, width)
        )
        self.encoder = self.reader(config.encoder_layers)
        if config.summary == "attention":
            self.pooling = Pooling(width)
        states = STATES[config.cell] * config.decoder_layers
        self.first = layers.xavier(nn.Linear(width, states * width), states)
        inner = 1 + config.constant + config.looks_into_cell
        self.decoder = Recurrent(
            config.cell,
            (inner * width, width, config.decoder_layers),
            residual=config.residual,
            dropout=config.dropout,
        )
        if config.context == "attention":
            self.attention = Attention(config)
        if config.context != "start":
            parts = 2 if config.context == "attention" and config.place == "after" else 3
            self.answer = layers.xavier(nn.Linear(parts * width, width))
        if config.focus == "sampled":
            self.baseline = nn.Linear(width, 1)
        self.drop = nn.Dropout(config.dropout)

    def reader(self, count: int) -> Recurrent:
        """A stack of layers that reads the source."""
        config = self.config
        sizes = (config.width, config.width, count)
        return Recurrent(
            config.cell, sizes, reads=config.reads, residual=config.residual, dropout=config.dropout
        )

    def forward(self, source: Source, target: Ragged, *, want: Collection[str] = ()) -> Output:
        config = self.config
        memory, cells = self.read(self, config, source)
        ids_ST, _ = target.padded()
        embedded_STD = self.drop(self.target_embedding(ids_ST))
        run = self._steps if config.looks_into_cell else self._fused
        hidden_STD, glance, query_STD = run(embedded_STD, memory, cells)
        cells_N = target.cells_N(ids_ST.shape[1])
        hidden_ND = hidden_STD.flatten(0, 1)[cells_N]
        aux: Mapping[str, tuple[Tensor, Tensor]] = {}
        if glance is not None and glance.log_drawn_SQ is not None and glance.entropy_SQ is not None:
            baseline_ST = self.baseline(query_STD.detach())[..., 0]
            parts_ST = (glance.log_drawn_SQ, glance.entropy_SQ, baseline_ST)
            draw = Draw(*(part_ST.flatten()[cells_N] for part_ST in parts_ST))
            lasting = config.looks_into_cell
            aux = reinforced(self.readout, hidden_ND, target, draw, lasting=lasting, entropy=config.entropy)
        attention = _weights(memory, glance, ids_ST.shape) if "attention" in want else None
        return Output(hidden_ND, aux, attention)

    # A document is read and looked at in another way than a sentence; all else is the same.
    look = staticmethod(focus.look)

    @staticmethod
    def read(net: Any, config: Any, source: Source) -> tuple[Memory, list[Cells]]:
        """What the decoder sees of a source, and the cells it starts with."""
        ids_SL, real_SL = source.padded(layers.key_multiple(net))
        x_SLD = net.drop(F.embedding(ids_SL, net.source_embedding.weight))
        states_SLD = net.encoder.read(x_SLD, real_SL)
        tensors: dict[str, Tensor] = {}
        along: dict[str, tuple[int, float]] = {}
        if config.context == "attention":
            tensors, along = focus.prepared(net.attention, config, states_SLD, real_SL)
        return begin(net, config, focus.look, states_SLD, real_SL, Memory(tensors, along))

    def _fused(
        self, embedded_STD: Tensor, memory: Memory, cells: list[Cells]
    ) -> tuple[Tensor, Glance | None, Tensor]:
        """The decoder where no look stands between two steps: all of them at once."""
        config = self.config
        known_STD = _known(config, memory, embedded_STD[:, None])[:, 0]
        out_STD = self.decoder.whole(self.drop(known_STD), cells)
        sentences, count = out_STD.shape[:2]
        glance = None
        if config.looks:
            position_ST = torch.arange(count, device=out_STD.device).expand(sentences, -1)
            glance = self.look(self, config, out_STD, position_ST, memory)
        hidden_STD = _answer(self, config, out_STD, _context(memory, glance), embedded_STD)
        return self.drop(hidden_STD), glance, out_STD

    def _steps(
        self, embedded_STD: Tensor, memory: Memory, cells: list[Cells]
    ) -> tuple[Tensor, Glance | None, Tensor]:
        """The decoder step by step, as in translating."""
        known = self.config.width * (1 + self.config.constant)
        steps = self.decoder.steps(plain, known=known)
        own = rows(self.config, cells, hypotheses=1)
        position_S = torch.zeros(len(embedded_STD), dtype=torch.long, device=embedded_STD.device)
        hidden_SKTD, _, glances, queries = decode(
            self, self.config, steps, embedded_STD[:, None], (memory, own, position_S), self.look
        )
        return hidden_SKTD[:, 0], _together(glances), torch.cat(queries, 1) if queries else hidden_SKTD[:, 0]

    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        weight = self.output.weight
        return F.linear(hidden, weight if only is None else weight[only])

    def readout_matrix(self) -> Tensor:
        return self.output.weight

    def frozen(self, linear: Linear) -> Stepper:
        return RNNStepper(self, linear)


def begin(
    net: Any,
    config: RNNConfig,
    look: Look,
    states_SLD: Tensor,
    real_SL: Tensor,
    memory: Memory,
) -> tuple[Memory, list[Cells]]:
    """The decoder's first cells, made of the summary; what it will see at every step joins the memory."""
    summary_SD = _summary(net, config, states_SLD, real_SL)
    parts = iter(net.first(summary_SD).chunk(STATES[config.cell] * config.decoder_layers, -1))
    # An LSTM's cells are no outputs of a tanh, and may begin anywhere.
    cells = [
        (torch.tanh(next(parts)), *(next(parts) for _ in range(STATES[config.cell] - 1)))
        for _ in range(config.decoder_layers)
    ]
    if config.context == "every":
        return Memory({**memory.tensors, "context": summary_SD}, memory.along_source), cells
    if config.static:
        query_S1D = cells[-1][0][:, None]
        nowhere_S1 = torch.zeros(query_S1D.shape[:2], dtype=torch.long, device=query_S1D.device)
        glance = look(net, config, query_S1D, nowhere_S1, memory)
        # Nobody will look again: of the source only what was found stays.
        found = {"context": glance.context_SQD[:, 0], "weights": glance.weights_SHQL}
        return Memory(found, {"weights": (3, 0.0)}), cells
    return memory, cells


def _summary(net: Any, config: RNNConfig, states_SLD: Tensor, real_SL: Tensor) -> Tensor:
    lengths_S = real_SL.sum(1)
    if config.summary == "last":
        return last(states_SLD, lengths_S, config.reads)
    if config.summary == "max":
        return states_SLD.masked_fill(~real_SL[..., None], -torch.inf).amax(1)
    if config.summary == "attention":
        return focus.pooled(net.pooling, states_SLD, real_SL)
    return focus.average(real_SL / lengths_S[:, None], states_SLD)


def rows(config: RNNConfig, cells: list[Cells], *, hypotheses: int) -> Rows:
    """The decoder's own part of a state, the same for all hypotheses: cells, and what it feeds itself."""
    tensors = [cell for layer in cells for cell in layer]
    if config.input_feeding:
        tensors.append(torch.zeros_like(cells[-1][0]))
    return Rows(tuple(tensor[:, None].expand(-1, hypotheses, -1) for tensor in tensors))


def decode(
    net: Any,
    config: RNNConfig,
    steps: Steps,
    embedded_SKTD: Tensor,
    parts: tuple[Memory, Rows, Tensor],
    look: Look,
) -> tuple[Tensor, Rows, list[Glance], list[Tensor]]:
    """The decoder over T tokens, one by one; also its looks, and what they were made from."""
    memory, own, position_S = parts
    size = STATES[config.cell]
    cells = [own.tensors[at : at + size] for at in range(0, size * config.decoder_layers, size)]
    feed = own.tensors[-1] if config.input_feeding else None
    hidden, glances, queries = [], [], []
    known = steps.known(net.drop(_known(config, memory, embedded_SKTD)))

    def glance_from(query_SKD: Tensor, step: int) -> Tensor:
        position_SK = (position_S + step)[:, None].expand(query_SKD.shape[:2])
        glances.append(look(net, config, query_SKD, position_SK, memory))
        queries.append(query_SKD)
        return glances[-1].context_SQD

    for step, known_SK in enumerate(known.unbind(2)):
        context_SKD, found = _context(memory, None), feed
        if config.looks and config.place == "before":
            context_SKD = found = glance_from(cells[-1][0], step)
        out_SKD, cells = steps.step(known_SK, None if found is None else net.drop(found), cells, net.drop)
        if config.looks and config.place == "after":
            context_SKD = glance_from(out_SKD, step)
        answer_SKD = _answer(net, config, out_SKD, context_SKD, embedded_SKTD[:, :, step])
        feed = answer_SKD if config.input_feeding else None
        hidden.append(net.drop(answer_SKD))
    tensors = [cell for layer in cells for cell in layer] + ([] if feed is None else [feed])
    return torch.stack(hidden, 2), Rows(tuple(tensors)), glances, queries


def _known(config: RNNConfig, memory: Memory, embedded_SKTD: Tensor) -> Tensor:
    """What the cell sees that is known of all steps beforehand."""
    if not config.constant:
        return embedded_SKTD
    constant_SD = memory["context"]
    return torch.cat([embedded_SKTD, constant_SD[:, None, None].expand_as(embedded_SKTD)], -1)


def _context(memory: Memory, glance: Glance | None) -> Tensor | None:
    """What a look found, or what is the same at every step, if there is any of it."""
    if glance is not None:
        return glance.context_SQD
    return memory["context"][:, None] if "context" in memory.tensors else None


def _answer(
    net: Any, config: RNNConfig, out_SQD: Tensor, context: Tensor | None, embedded_SQD: Tensor
) -> Tensor:
    """The hidden state to read out from."""
    if context is None:
        return out_SQD
    parts = [out_SQD, context.expand_as(out_SQD)]
    if config.context != "attention" or config.place == "before":
        parts.append(embedded_SQD)
    return torch.tanh(net.answer(torch.cat(parts, -1)))


def _together(glances: list[Glance]) -> Glance | None:
    """The looks of all steps as one, of one hypothesis."""
    if not glances:
        return None
    drawn = [glance.log_drawn_SQ for glance in glances if glance.log_drawn_SQ is not None]
    entropy = [glance.entropy_SQ for glance in glances if glance.entropy_SQ is not None]
    return Glance(
        torch.cat([glance.context_SQD for glance in glances], 1),
        torch.cat([glance.weights_SHQL for glance in glances], 2),
        torch.cat(drawn, 1) if drawn else None,
        torch.cat(entropy, 1) if entropy else None,
    )


def _weights(memory: Memory, glance: Glance | None, sizes: Collection[int]) -> Tensor | None:
    """The weights of all queries, in the one layer there is: [1, S, H, Q, L]."""
    if glance is not None:
        return glance.weights_SHQL[None]
    if "weights" not in memory.tensors:
        return None
    *_, count = sizes
    return memory["weights"].expand(-1, -1, count, -1)[None]


class RNNStepper(Stepper):
    """The same network for translating: plain products, every sequence step by step."""

    fixes = True

    def __init__(self, net: RNN, linear: Linear) -> None:
        self.config, self.read, self.look = net.config, net.read, net.look
        self.net = layers.freeze(net, linear)
        products = detached(linear)
        for name, child in net.named_children():
            if isinstance(child, Recurrent):
                setattr(self.net, name, child.steps(products))
        self.embedding_VD = net.target_embedding.weight.detach()
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
        memory, cells = self.read(self.net, self.config, source)
        own = rows(self.config, cells, hypotheses=hypotheses)
        return State(memory, own, torch.zeros_like(source.lengths_S))

    def step(self, tokens_SKT: Tensor, state: State, *, want: Collection[str] = ()) -> tuple[Output, State]:
        memory, own, position_S = state.take()
        embedded_SKTD = F.embedding(tokens_SKT, self.embedding_VD)
        hidden_SKTD, own, glances, _ = decode(
            self.net, self.config, self.net.decoder, embedded_SKTD, (memory, own, position_S), self.look
        )
        attention = None
        if "attention" in want:
            hypotheses, count = tokens_SKT.shape[1:]
            attention = _weights(memory, _together(glances), (hypotheses * count,))
            if attention is not None and glances:  # the steps of each hypothesis stand together
                attention = attention.unflatten(3, (count, hypotheses)).transpose(3, 4).flatten(3, 4)
        return Output(hidden_SKTD, attention=attention), State(memory, own, position_S + tokens_SKT.shape[2])

    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        return layers.readout(self.product, self.weight_VD, hidden, only)

    def narrowed(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        return layers.narrowed(self.product, ids)
