"""A GRU encoder-decoder with additive attention (Bahdanau et al., arXiv 1409.0473).

Axes: S sentence, K hypothesis, L source position, T target position, N all tokens of a batch in a row,
D width, G the three gates of a GRU, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from trmt.arch import layers
from trmt.arch.base import Linear, Memory, Output, Ragged, Rows, Seq2Seq, Source, State, Stepper


@dataclass(frozen=True, kw_only=True)
class RNNConfig:
    """The sizes of a recurrent network with attention."""

    source_vocabulary: int
    target_vocabulary: int
    width: int = 512
    encoder_layers: int = 1  # each reads in both directions
    decoder_layers: int = 1
    dropout: float = 0.2
    tied: Literal["target", "none"] = "target"  # whether the output shares the target embedding
    longest: int = 1024  # it has no positions; the limit keeps translations from running away

    def __post_init__(self) -> None:
        layers.check_sizes(self)


class Cell(nn.Module):
    """The weights of one GRU step; `gru` is its arithmetic."""

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.input = layers.xavier(nn.Linear(inner, 3 * width), 3)
        self.recur = layers.xavier(nn.Linear(width, 3 * width), 3)


def gru(input_G: Tensor, recur_G: Tensor, state_D: Tensor) -> Tensor:
    """One GRU step from the two products; gates in the order of torch.nn.GRU: reset, update, new."""
    input_reset, input_update, input_new = input_G.chunk(3, -1)
    recur_reset, recur_update, recur_new = recur_G.chunk(3, -1)
    reset = torch.sigmoid(input_reset + recur_reset)
    update = torch.sigmoid(input_update + recur_update)
    new = torch.tanh(input_new + reset * recur_new)
    return new + update * (state_D - new)


class RNN(Seq2Seq):
    """The network as it is trained: the encoder's sequences run fused, the decoder step by step."""

    config_class = RNNConfig

    def __init__(self, config: RNNConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.source_embedding = nn.Embedding(config.source_vocabulary, width)
        self.target_embedding = nn.Embedding(config.target_vocabulary, width)
        self.output = (
            self.target_embedding
            if config.tied == "target"
            else nn.Embedding(config.target_vocabulary, width)
        )
        for embedding in (self.source_embedding, self.target_embedding, self.output):
            nn.init.normal_(embedding.weight, std=width**-0.5)
        self.encoder = nn.GRU(
            width,
            width,
            config.encoder_layers,
            batch_first=True,
            bidirectional=True,
            dropout=config.dropout if config.encoder_layers > 1 else 0.0,
        )
        self.key = layers.xavier(nn.Linear(2 * width, width, bias=False))
        self.query = layers.xavier(nn.Linear(width, width))
        self.first = layers.xavier(nn.Linear(width, config.decoder_layers * width))
        self.score = nn.Parameter(torch.randn(width) * width**-0.5)
        inner = [3 * width] + [width] * (config.decoder_layers - 1)
        self.cells = nn.ModuleList(Cell(size, width) for size in inner)
        self.readout_layer = layers.xavier(nn.Linear(4 * width, width))
        self.drop = nn.Dropout(config.dropout)

    def forward(self, source: Source, target: Ragged, *, want: Collection[str] = ()) -> Output:
        ids_SL, real_SL = source.padded(layers.key_multiple(self))
        x_SLD = self.drop(self.source_embedding(ids_SL))
        packed = pack_padded_sequence(x_SLD, source.lengths_S.cpu(), batch_first=True, enforce_sorted=False)
        states_SLD, _ = pad_packed_sequence(
            self.encoder(packed)[0], batch_first=True, total_length=ids_SL.shape[1]
        )
        memory, own = remember(self, states_SLD, real_SL, hypotheses=1)
        ids_ST, _ = target.padded()
        embedded_SKTD = self.drop(self.target_embedding(ids_ST))[:, None]
        hidden_SKTD, _, weights = decode(self, embedded_SKTD, memory, own)
        hidden_ND = hidden_SKTD.flatten(0, 2)[target.cells_N(ids_ST.shape[1])]
        return Output(hidden_ND, attention=_as_attention(weights) if "attention" in want else None)

    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        weight = self.output.weight
        return F.linear(hidden, weight if only is None else weight[only])

    def readout_matrix(self) -> Tensor:
        return self.output.weight

    def frozen(self, linear: Linear) -> Stepper:
        return RNNStepper(self, linear)


def remember(net: Any, states_SLD: Tensor, real_SL: Tensor, *, hypotheses: int) -> tuple[Memory, Rows]:
    """What the decoder starts from: the source's states, their keys, and its own first states."""
    memory = Memory(
        {"states": states_SLD, "keys": net.key(states_SLD), "mask": layers.blocked(real_SL)},
        {"states": (1, 0.0), "keys": (1, 0.0), "mask": (1, -math.inf)},
    )
    # The backward direction's state at the first word has read the whole sentence.
    backward_SD = states_SLD[:, 0, states_SLD.shape[-1] // 2 :]
    first_SD = torch.tanh(net.first(backward_SD)).chunk(len(net.cells), -1)
    return memory, Rows(tuple(x_SD[:, None].expand(-1, hypotheses, -1) for x_SD in first_SD))


def decode(net: Any, embedded_SKTD: Tensor, memory: Memory, own: Rows) -> tuple[Tensor, Rows, list[Tensor]]:
    """The decoder over T tokens, one by one, since each look at the source depends on the state before."""
    states_SLD, keys_SLD, mask_SL = memory["states"], memory["keys"], memory["mask"]
    state = list(own.tensors)
    hidden, weights = [], []
    for embedded_SKD in embedded_SKTD.unbind(2):
        energy_SKLD = torch.tanh(keys_SLD[:, None] + net.query(state[-1])[:, :, None])
        # Not a product: a matrix with one column is not row-invariant on the CPU.
        energy_SKL = (energy_SKLD * net.score).sum(-1) + mask_SL[:, None]
        weights_SKL = energy_SKL.softmax(-1)
        context_SKD = weights_SKL @ states_SLD
        x_SKD = torch.cat([embedded_SKD, context_SKD], -1)
        for index, cell in enumerate(net.cells):
            state[index] = gru(cell.input(net.drop(x_SKD)), cell.recur(state[index]), state[index])
            x_SKD = state[index]
        joined_SKD = torch.cat([x_SKD, context_SKD, embedded_SKD], -1)
        hidden.append(net.drop(torch.tanh(net.readout_layer(joined_SKD))))
        weights.append(weights_SKL)
    return torch.stack(hidden, 2), Rows(tuple(state)), weights


def _as_attention(weights_SKL: list[Tensor]) -> Tensor:
    """[1 layer, S, 1 head, K * T, L]."""
    return torch.stack(weights_SKL, 2).flatten(1, 2)[None, :, None]


class RNNStepper(Stepper):
    """The same network for translating: plain products, the encoder unrolled."""

    def __init__(self, net: RNN, linear: Linear) -> None:
        self.net = layers.freeze(net, linear)
        self.net.score = net.score.detach()
        self.source_embedding = net.source_embedding.weight.detach()
        self.target_embedding = net.target_embedding.weight.detach()
        self.encoder = [
            [_direction(net.encoder, layer, suffix, linear) for suffix in ("", "_reverse")]
            for layer in range(net.config.encoder_layers)
        ]
        self.weight_VD = net.output.weight.detach()
        self.product = linear(self.weight_VD, None)

    def start(self, source: Source, *, hypotheses: int, room: int, reorders: bool = True) -> State:
        ids_SL, real_SL = source.padded(layers.KEY_MULTIPLE)
        x_SLD = F.embedding(ids_SL, self.source_embedding)
        for forward, backward in self.encoder:
            ahead = _scan(forward, x_SLD, real_SL, steps=range(ids_SL.shape[1]))
            back = _scan(backward, x_SLD, real_SL, steps=range(ids_SL.shape[1] - 1, -1, -1))
            x_SLD = torch.cat([ahead, back], -1) * real_SL[..., None]
        memory, own = remember(self.net, x_SLD, real_SL, hypotheses=hypotheses)
        return State(memory, own, torch.zeros_like(source.lengths_S))

    def step(self, tokens_SKT: Tensor, state: State, *, want: Collection[str] = ()) -> tuple[Output, State]:
        memory, own, position_S = state.take()
        embedded_SKTD = F.embedding(tokens_SKT, self.target_embedding)
        hidden_SKTD, own, weights = decode(self.net, embedded_SKTD, memory, own)
        attention = _as_attention(weights) if "attention" in want else None
        return Output(hidden_SKTD, attention=attention), State(memory, own, position_S + tokens_SKT.shape[2])

    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        return layers.readout(self.product, self.weight_VD, hidden, only)


def _direction(encoder: nn.GRU, layer: int, suffix: str, linear: Linear) -> tuple[Any, Any]:
    """The two products of one layer of torch's GRU in one direction."""
    named = {
        name: getattr(encoder, f"{name}_l{layer}{suffix}").detach()
        for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
    }
    return linear(named["weight_ih"], named["bias_ih"]), linear(named["weight_hh"], named["bias_hh"])


def _scan(direction: tuple[Any, Any], x_SLD: Tensor, real_SL: Tensor, *, steps: range) -> Tensor:
    """The states of one direction; padding leaves a state as it is."""
    input_product, recur_product = direction
    input_SLG = input_product(x_SLD)
    state_SD = x_SLD.new_zeros(x_SLD.shape[0], input_SLG.shape[-1] // 3)
    states_SLD = x_SLD.new_zeros(*x_SLD.shape[:2], state_SD.shape[1])
    for step in steps:
        new_SD = gru(input_SLG[:, step], recur_product(state_SD), state_SD)
        state_SD = torch.where(real_SL[:, step, None], new_SD, state_SD)
        states_SLD[:, step] = state_SD
    return states_SLD
