"""Recurrent encoder-decoders: from a fixed context vector to attention.

Axes: S sentence, K hypothesis, L source position, T target position, N target tokens of a batch in a row,
Q queries, H heads, P head dimension, D hidden size (d_model), G the gates of a cell side by side.

The encoder's states h are summarised in a vector c, of which the decoder's first state is made. With context
"start" the decoder gets nothing else of the source (Sutskever et al., arXiv 1409.3215), with "every" c at
each step (Cho et al., arXiv 1406.1078), with "attention" it attends to h, before a step (Bahdanau et al.,
arXiv 1409.0473) or after it (Luong et al., arXiv 1508.04025; with input_feeding the cell also gets o_t-1):

    before   c_t = attention(s_t-1, h);  s_t = cell(s_t-1, [y_t-1, c_t]);  o_t = tanh(W [s_t, c_t, y_t-1])
    after    s_t = cell(s_t-1, y_t-1);  c_t = attention(s_t, h);  o_t = tanh(W [s_t, c_t])

The weights are the softmax of scores of a decoder state q with the encoder states k, in each head:

    additive: v . tanh(W q + U k)    general: q . W k    dot: q . k    scaled: q . k / sqrt(P)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.nets import base, layers
from trmt.nets.base import NO_WEIGHTS, EncoderMemory, HiddenVectors, Output, Seq2Seq, WantedWeights
from trmt.nets.layers import KEY_MULTIPLE, module_list, split_heads, xavier
from trmt.nets.ragged import Ragged, Source

Cell = Literal["rnn", "gru", "lstm"]
CellState = tuple[Tensor, ...]  # the hidden vectors of a layer, and for an LSTM its cells
Encoded = tuple[EncoderMemory, list[CellState]]


@dataclass(frozen=True, kw_only=True)
class RNNConfig:
    """The sizes and options of a recurrent encoder-decoder."""

    source_vocabulary: int  # source tokens, set from the tokenizer
    target_vocabulary: int  # target tokens, set from the tokenizer
    d_model: int = 512  # the hidden size
    cell: Cell = "gru"  # the recurrent unit
    encoder_direction: Literal["forward", "backward", "both"] = "both"  # in which it goes over the source
    encoder_layers: int = 1  # layers of the encoder
    decoder_layers: int = 1  # layers of the decoder
    residual: bool = False  # residual connections around each layer but the first
    summary: Literal["last", "mean", "max", "attention"] = "last"  # how the one vector of a source is made
    context: Literal["start", "every", "attention"] = "attention"  # what the decoder gets of the source
    attention_step: Literal["before", "after"] = "before"  # attention before a step or after it
    input_feeding: bool = False  # whether the cell gets the last output, too
    score: Literal["additive", "general", "dot", "scaled"] = "additive"  # the scores of attention
    heads: int = 1  # attention heads
    dropout: float = 0.2  # of embeddings, between layers and of outputs
    tied: Literal["target", "none"] = "target"  # whether the output shares the target embedding
    max_positions: int = 1024  # the longest translation in tokens

    not_rates: ClassVar[tuple[str, ...]] = ()  # fields that `check_sizes` does not check

    def __post_init__(self) -> None:
        layers.check_sizes(self, except_for=self.not_rates)
        if self.d_model % self.heads:
            raise ConfigError(f"d_model = {self.d_model} is no multiple of heads = {self.heads}; change one")
        if self.encoder_direction == "both" and self.d_model % 2:
            raise ConfigError(
                f'd_model = {self.d_model} is odd, encoder_direction = "both" halves it; change one'
            )
        if self.residual and max(self.encoder_layers, self.decoder_layers) < 2:
            raise ConfigError(
                "residual = true needs encoder_layers or decoder_layers = 2 or more; change one"
            )
        if self.input_feeding and (self.context != "attention" or self.attention_step == "before"):
            raise ConfigError('input_feeding = true needs context = "attention" and attention_step = "after"')

    @property
    def attends(self) -> bool:
        """Whether there is attention for each target token."""
        return self.context == "attention"

    @property
    def constant_context(self) -> bool:
        """Whether the cell gets a vector that is the same at every step."""
        return self.context == "every"

    @property
    def stepwise(self) -> bool:
        """Whether a step of the decoder needs attention that depends on the step before."""
        return self.input_feeding or (self.attends and self.attention_step == "before")


def gru_step(input_G: Tensor, recurrent_G: Tensor, state: CellState) -> CellState:
    """One step of a GRU (Cho et al., arXiv 1406.1078); PyTorch's gates: reset, update, new."""
    input_reset, input_update, input_new = input_G.chunk(3, -1)
    recurrent_reset, recurrent_update, recurrent_new = recurrent_G.chunk(3, -1)
    reset = torch.sigmoid(input_reset + recurrent_reset)
    update = torch.sigmoid(input_update + recurrent_update)
    new = torch.tanh(input_new + reset * recurrent_new)
    return (new + update * (state[0] - new),)


def lstm_step(input_G: Tensor, recurrent_G: Tensor, state: CellState) -> CellState:
    """One step of an LSTM (Hochreiter and Schmidhuber 1997); PyTorch's gates: input, forget, new, output."""
    input_gate, forget, new, output = (input_G + recurrent_G).chunk(4, -1)
    cell = torch.sigmoid(forget) * state[1] + torch.sigmoid(input_gate) * torch.tanh(new)
    return torch.sigmoid(output) * torch.tanh(cell), cell


# PyTorch's layer, a step of it, the number of gates, and the number of tensors of its state
CELLS: dict[Cell, tuple[Any, Callable[[Tensor, Tensor, CellState], CellState], int, int]] = {
    "rnn": (nn.RNN, lambda input_G, recurrent_G, _: (torch.tanh(input_G + recurrent_G),), 1, 1),  # Elman 1990
    "gru": (nn.GRU, gru_step, 3, 1),
    "lstm": (nn.LSTM, lstm_step, 4, 2),
}


class RecurrentLayer(nn.Module):
    """A recurrent layer in one direction, by PyTorch's fused kernels over whole sequences."""

    def __init__(self, cell: Cell, inputs: int, size: int) -> None:
        super().__init__()
        self.cell: Cell = cell
        module, self.gates, gates, _ = CELLS[cell]
        self.fused: nn.RNNBase = module(inputs, size, batch_first=True)
        with torch.no_grad():
            for name, parameter in self.fused.named_parameters():
                for gate in parameter.chunk(gates):
                    matrix = nn.init.xavier_uniform_ if "_ih_" in name else nn.init.orthogonal_
                    (nn.init.zeros_ if "bias" in name else matrix)(gate)
                if cell == "lstm" and name.startswith("bias_ih"):
                    nn.init.ones_(parameter.chunk(4)[1])  # the forget gate begins open

    def forward(self, x_STD: Tensor, state: CellState | None = None) -> Tensor:
        """The outputs of all steps, from this state or from zeros."""
        first = tuple(each[None].to(x_STD.dtype).contiguous() for each in state or ())
        return self.fused(x_STD, first if self.cell == "lstm" and first else next(iter(first), None))[0]

    def step(self, x: Tensor, state: CellState) -> CellState:
        """The next state."""
        weight, recurrent, bias, recurrent_bias = self.fused.parameters()
        return self.gates(F.linear(x, weight, bias), F.linear(state[0], recurrent, recurrent_bias), state)

    def frozen_as(self, products: base.Products) -> FrozenRecurrentLayer:
        return FrozenRecurrentLayer(self, products)


class FrozenRecurrentLayer(nn.Module):
    """The same in inference, step by step: a sentence gets the same bits beside any others."""

    def __init__(self, layer: RecurrentLayer, products: base.Products) -> None:
        super().__init__()
        weight, recurrent, bias, recurrent_bias = (each.detach() for each in layer.fused.parameters())
        self.input, self.recurrent = products(weight, bias), products(recurrent, recurrent_bias)
        _, self.gates, _, self.states = CELLS[layer.cell]
        self.size = layer.fused.hidden_size

    def forward(self, x_STD: Tensor, state: CellState | None = None) -> Tensor:
        state, outputs = state or (x_STD.new_zeros(len(x_STD), self.size),) * self.states, []
        for input_SG in self.input(x_STD).unbind(1):
            state = self.gates(input_SG, self.recurrent(state[0]), state)
            outputs.append(state[0])
        return torch.stack(outputs, 1)

    def step(self, x: Tensor, state: CellState) -> CellState:
        return self.gates(self.input(x), self.recurrent(state[0]), state)


class RecurrentStack(nn.Module):
    """Recurrent layers with dropout and residual connections between them; two directions have half each."""

    def __init__(self, config: RNNConfig, inputs: int, count: int, direction: str = "forward") -> None:
        super().__init__()
        self.residual = config.residual
        size = config.d_model // 2 if direction == "both" else config.d_model
        sizes = [(config.d_model if index else inputs, size) for index in range(count)]
        ahead, back = direction != "backward", direction != "forward"
        self.layers = module_list(RecurrentLayer(config.cell, *each) for each in sizes * ahead)
        self.backward_layers = module_list(RecurrentLayer(config.cell, *each) for each in sizes * back)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_STD: Tensor, states: Sequence[CellState]) -> Tensor:
        """All steps at once, from these states."""
        for index, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            y_STD = layer(self.dropout(x_STD) if index else x_STD, state)
            x_STD = x_STD + y_STD if self.residual and index else y_STD
        return x_STD

    def encode(self, x_SLD: Tensor, real_SL: Tensor) -> Tensor:
        """The states of all positions, computed in each direction; zeros behind a sentence."""
        for index in range(max(len(self.layers), len(self.backward_layers))):
            inputs_SLD = self.dropout(x_SLD) if index else x_SLD
            outputs = [layer(inputs_SLD) for layer in self.layers[index : index + 1]]
            for layer in self.backward_layers[index : index + 1]:
                outputs.append(reverse(layer(reverse(inputs_SLD, real_SL)), real_SL))
            y_SLD = torch.cat(outputs, -1) * real_SL[..., None]
            x_SLD = x_SLD + y_SLD if self.residual and index else y_SLD
        return x_SLD

    def last_states(self, states_SLD: Tensor, real_SL: Tensor) -> Tensor:
        """The state of each direction after its last step."""
        sentence_S = torch.arange(len(real_SL), device=real_SL.device)
        last_SD, first_SD = states_SLD[sentence_S, real_SL.sum(1) - 1], states_SLD[:, 0]
        ahead = last_SD.shape[1] // (1 + bool(self.backward_layers)) if self.layers else 0
        return torch.cat([last_SD[:, :ahead], first_SD[:, ahead:]], -1)

    def step(self, x: Tensor, states: Sequence[CellState]) -> tuple[Tensor, list[CellState]]:
        """One step of the layers: the output and the new states."""
        new: list[CellState] = []
        for index, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            new.append(layer.step(self.dropout(x) if index else x, state))
            x = x + new[-1][0] if self.residual and index else new[-1][0]
        return x, new


def reverse(x_SLD: Tensor, real_SL: Tensor) -> Tensor:
    """Each sentence from its end to its beginning; padding stays behind it."""
    position_L = torch.arange(x_SLD.shape[1], device=x_SLD.device)
    from_SL = real_SL.sum(1, keepdim=True) - 1 - position_L
    from_SL = torch.where(from_SL >= 0, from_SL, position_L)
    return x_SLD.gather(1, from_SL[..., None].expand_as(x_SLD))


@dataclass(frozen=True)
class Attended:
    """What attention returns."""

    context_SQD: Tensor
    weights_SHQL: Tensor


class Attention(nn.Module):
    """Attention of decoder states to encoder states."""

    def __init__(self, config: RNNConfig) -> None:
        super().__init__()
        d_model, head_dim = config.d_model, config.d_model // config.heads
        self.score, self.heads = str(config.score), config.heads
        if config.score in ("general", "additive"):
            self.key = xavier(nn.Linear(d_model, d_model, bias=False))
        if config.score == "additive":
            self.query = xavier(nn.Linear(d_model, d_model))
            self.vector = nn.Parameter(torch.randn(config.heads, 1, 1, head_dim) * head_dim**-0.5)
        if config.heads > 1:
            self.value = xavier(nn.Linear(d_model, d_model))

    def prepare(self, states_SLD: Tensor, real_SL: Tensor) -> EncoderMemory:
        """Keys, values and mask of a source."""
        key_SLD = self.key(states_SLD) if hasattr(self, "key") else states_SLD
        value_SLD = self.value(states_SLD) if hasattr(self, "value") else states_SLD
        # Contiguous, as products of views by heads round differently for one sentence and for several.
        keys, values = (split_heads(each, self.heads).contiguous() for each in (key_SLD, value_SLD))
        mask = layers.additive_mask(real_SL)[:, None, None]
        axes = {"keys": (2, 0.0), "values": (2, 0.0), "mask": (3, -math.inf)}
        return EncoderMemory({"keys": keys, "values": values, "mask": mask}, axes)

    def scores(self, query_SQD: Tensor, key_SHLP: Tensor) -> Tensor:
        """The score of each query with each key: [S, H, Q, L]."""
        if self.score == "additive":
            query_SHQP = split_heads(self.query(query_SQD), self.heads)
            # Not a product: a matrix with one column is not row-invariant on the CPU.
            return (torch.tanh(query_SHQP[..., None, :] + key_SHLP[:, :, None]) * self.vector).sum(-1)
        query_SHQP = split_heads(query_SQD, self.heads)
        if self.score == "scaled":
            query_SHQP = query_SHQP / math.sqrt(query_SHQP.shape[-1])
        return query_SHQP @ key_SHLP.transpose(-2, -1)

    def attend(self, query_SQD: Tensor, position_SQ: Tensor, memory: EncoderMemory) -> Attended:
        """The attention of queries at these target positions."""
        weights_SHQL = (self.scores(query_SQD, memory["keys"]) + memory["mask"]).softmax(-1)
        return Attended(weighted_values(weights_SHQL, memory), weights_SHQL)

    def forward(self, query_SQD: Tensor, position_SQ: Tensor, memory: EncoderMemory) -> Attended:
        """The same; in inference a query gets the same bits whatever its source is padded to."""
        count = query_SQD.shape[1]
        missing = min_rows(query_SQD.shape[-1] // self.heads) - count
        if self.training or missing <= 0:
            return self.attend(query_SQD, position_SQ, memory)
        query_SQD, position_SQ = F.pad(query_SQD, (0, 0, 0, missing)), F.pad(position_SQ, (0, missing))
        attended = self.attend(query_SQD, position_SQ, memory)
        return Attended(attended.context_SQD[:, :count], attended.weights_SHQL[:, :, :count])


def weighted_values(weights_SHQL: Tensor, memory: EncoderMemory) -> Tensor:
    """The sum of the values with these weights, heads joined: [S, Q, D]."""
    return (weights_SHQL.to(memory["values"].dtype) @ memory["values"]).transpose(1, 2).flatten(2)


def weighted_mean(weights_SL: Tensor, states_SLD: Tensor) -> Tensor:
    """The sum of the states with these weights: [S, D]."""
    weights_SQL = weights_SL[:, None].to(states_SLD.dtype).expand(-1, min_rows(states_SLD.shape[-1]), -1)
    return (weights_SQL @ states_SLD)[:, 0]


def min_rows(columns: int) -> int:
    """So many rows make a product larger than torch 2.13 treats as small on the CPU, 400 multiplications."""
    return -(-400 // (KEY_MULTIPLE * min(columns, KEY_MULTIPLE)))


class Pooling(nn.Module):
    """Many vectors in one by attention with a learned query (Yang et al., NAACL 2016)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.key = xavier(nn.Linear(d_model, d_model))
        self.query = nn.Parameter(torch.randn(d_model) * d_model**-0.5)

    def forward(self, states_SLD: Tensor, real_SL: Tensor) -> Tensor:
        score_SL = (torch.tanh(self.key(states_SLD)) * self.query).sum(-1) + layers.additive_mask(real_SL)
        return weighted_mean(score_SL.softmax(-1), states_SLD)


class RNN(Seq2Seq):
    """A recurrent encoder-decoder."""

    config: RNNConfig
    config_class = RNNConfig
    attention_class: type[Attention] = Attention

    def __init__(self, config: RNNConfig) -> None:
        super().__init__()
        self.config = config
        d_model = config.d_model
        # PyTorch's unit variance: gates shrink their inputs, and of smaller ones two layers of LSTMs leave so
        # little that for hundreds of steps attention has nothing to tell apart.
        self.source_embedding = nn.Embedding(config.source_vocabulary, d_model)
        self.target_embedding = nn.Embedding(config.target_vocabulary, d_model)
        tied = config.tied == "target"
        self.output = self.target_embedding if tied else nn.Embedding(config.target_vocabulary, d_model)
        self.encoder = RecurrentStack(config, d_model, config.encoder_layers, config.encoder_direction)
        if config.summary == "attention":
            self.pooling = Pooling(d_model)
        self.states = CELLS[config.cell][3]  # tensors of a layer's state
        self.tensors = self.states * config.decoder_layers
        self.initial_state = xavier(nn.Linear(d_model, self.tensors * d_model), self.tensors)
        inputs = (1 + config.constant_context + config.stepwise) * d_model
        self.decoder = RecurrentStack(config, inputs, config.decoder_layers)
        if config.context == "attention":
            self.attention = self.attention_class(config)
        self.combines_embedding = config.context == "every" or config.attention_step == "before"
        if config.context != "start":
            self.combine = xavier(nn.Linear((2 + self.combines_embedding) * d_model, d_model))
        self.dropout = nn.Dropout(config.dropout)

    def encode(self, source: Source) -> Encoded:
        """What the decoder gets of a source, and its first states."""
        ids_SL, real_SL = source.padded(1 if self.training else KEY_MULTIPLE)
        states_SLD = self.encoder.encode(self.dropout(self.source_embedding(ids_SL)), real_SL)
        attends = self.config.context == "attention"
        memory = self.attention.prepare(states_SLD, real_SL) if attends else EncoderMemory({}, {})
        return self.begin(states_SLD, real_SL, memory)

    def begin(self, states_SLD: Tensor, real_SL: Tensor, memory: EncoderMemory) -> Encoded:
        """The decoder's first states; the memory gets the context that is the same at every step, if any."""
        summary_SD = self.summarise(states_SLD, real_SL)
        parts = self.initial_state(summary_SD).chunk(self.tensors, -1)
        firsts = range(0, self.tensors, self.states)  # each begins with hidden vectors, outputs of a tanh
        states = [(torch.tanh(parts[first]), *parts[first + 1 : first + self.states]) for first in firsts]
        if self.config.context == "every":
            memory = EncoderMemory({"context": summary_SD}, {})
        return memory, states

    def summarise(self, states_SLD: Tensor, real_SL: Tensor) -> Tensor:
        """The vector c of each source."""
        if self.config.summary == "last":
            return self.encoder.last_states(states_SLD, real_SL)
        if self.config.summary == "max":
            return states_SLD.masked_fill(~real_SL[..., None], -torch.inf).amax(1)
        if self.config.summary == "attention":
            return self.pooling(states_SLD, real_SL)
        return weighted_mean(real_SL / real_SL.sum(1, keepdim=True), states_SLD)

    def forward(self, source: Source, target: Ragged, *, want: WantedWeights = NO_WEIGHTS) -> Output:
        hidden_ND, attended, _ = self.teacher_forced(source, target)
        weights = [each.weights_SHQL for each in attended] if want.cross else []
        return Output(hidden_ND, cross_attention=torch.cat(weights, 2)[None] if weights else None)

    def teacher_forced(self, source: Source, target: Ragged) -> tuple[Tensor, list[Attended], EncoderMemory]:
        """The hidden states [N, D], attention (of all steps or of each), and the memory of the source."""
        memory, states = self.encode(source)
        ids_ST, _ = target.padded()
        embedded_STD = self.dropout(self.target_embedding(ids_ST))
        if self.config.stepwise:
            decoder, position_S = self.hidden_vectors(states, 1), torch.zeros_like(target.lengths_S)
            hidden_SKTD, _, attended = self.decode(embedded_STD[:, None], memory, decoder, position_S)
            hidden_STD = hidden_SKTD[:, 0]
        else:
            inputs_STD = self.dropout(self.inputs(embedded_STD[:, None], memory)[:, 0])
            out_STD = self.decoder(inputs_STD, states)
            position_ST = torch.arange(ids_ST.shape[1], device=ids_ST.device).expand_as(ids_ST)
            attended = [self.attention(out_STD, position_ST, memory)] if self.config.attends else []
            hidden_STD = self.dropout(self.combined(out_STD, memory, attended[-1:], embedded_STD))
        return hidden_STD.flatten(0, 1)[target.cells_N(ids_ST.shape[1])], attended, memory

    def inputs(self, embedded_SKTD: Tensor, memory: EncoderMemory) -> Tensor:
        """The inputs of the decoder that are known for all steps."""
        if not self.config.constant_context:
            return embedded_SKTD
        return torch.cat([embedded_SKTD, memory["context"][:, None, None].expand_as(embedded_SKTD)], -1)

    def combined(
        self, out_SQD: Tensor, memory: EncoderMemory, attended: list[Attended], embedded_SQD: Tensor
    ) -> Tensor:
        """The hidden state that logits are made of."""
        if self.config.context == "start":
            return out_SQD
        context_SQD = attended[0].context_SQD if attended else memory["context"][:, None].expand_as(out_SQD)
        embedded = [embedded_SQD] if self.combines_embedding else []
        return torch.tanh(self.combine(torch.cat([out_SQD, context_SQD, *embedded], -1)))

    def hidden_vectors(self, states: list[CellState], hypotheses: int) -> HiddenVectors:
        """The decoder's first state, the same for all hypotheses; last the output that is fed back."""
        fed = [torch.zeros_like(states[-1][0])] if self.config.input_feeding else []
        return HiddenVectors(tuple(x[:, None].expand(-1, hypotheses, -1) for x in (*chain(*states), *fed)))

    def start(self, source: Source, decoding: base.Decoding) -> tuple[EncoderMemory, HiddenVectors]:
        memory, states = self.encode(source)
        return memory, self.hidden_vectors(states, decoding.hypotheses)

    def step(
        self, tokens_SKT: Tensor, memory: EncoderMemory, decoder: HiddenVectors, position_S: Tensor
    ) -> tuple[Tensor, HiddenVectors]:
        return self.decode(self.target_embedding(tokens_SKT), memory, decoder, position_S)[:2]

    def decode(
        self, embedded_SKTD: Tensor, memory: EncoderMemory, decoder: HiddenVectors, position_S: Tensor
    ) -> tuple[Tensor, HiddenVectors, list[Attended]]:
        """The tokens one by one: hidden states [S, K, T, D], the new state, the attention of each step."""
        config, tensors = self.config, decoder.tensors
        states = [tensors[first : first + self.states] for first in range(0, self.tensors, self.states)]
        found = tensors[-1] if config.input_feeding else None
        hidden, attended = [], []
        for step, input_SKD in enumerate(self.inputs(embedded_SKTD, memory).unbind(2)):
            position_SK = (position_S + step)[:, None].expand(input_SKD.shape[:2])
            if config.attends and config.attention_step == "before":
                attended.append(self.attention(states[-1][0], position_SK, memory))
                found = attended[-1].context_SQD
            x_SKD = input_SKD if found is None else torch.cat([input_SKD, found], -1)
            out_SKD, states = self.decoder.step(self.dropout(x_SKD), states)
            if config.attends and config.attention_step == "after":
                attended.append(self.attention(out_SKD, position_SK, memory))
            combined_SKD = self.combined(out_SKD, memory, attended[-1:], embedded_SKTD[:, :, step])
            found = combined_SKD if config.input_feeding else None
            hidden.append(self.dropout(combined_SKD))
        fed = [] if found is None else [found]
        return torch.stack(hidden, 2), HiddenVectors((*chain(*states), *fed)), attended
