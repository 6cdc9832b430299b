"""Recurrent layers: torch's own over whole sequences, and the same arithmetic a step at a time.

Axes: S sentence, L source position, T target position, D width, G the gates of a cell side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from trmt.nets.base import Linear, Product

Kind = Literal["rnn", "gru", "lstm"]
Reads = Literal["forward", "backward", "both"]
Cells = tuple[Tensor, ...]  # the hidden vectors of a layer, and for an LSTM its cells

MODULES: dict[Kind, Any] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
STATES: dict[Kind, int] = {"rnn": 1, "gru": 1, "lstm": 2}


def rnn(input_G: Tensor, recur_G: Tensor, cells: Cells) -> Cells:
    """One step of the plain network (Elman 1990): h = tanh(W x + U h)."""
    return (torch.tanh(input_G + recur_G),)


def gru(input_G: Tensor, recur_G: Tensor, cells: Cells) -> Cells:
    """One step of a GRU (Cho et al., arXiv 1406.1078); torch's gates: reset, update, new."""
    input_reset, input_update, input_new = input_G.chunk(3, -1)
    recur_reset, recur_update, recur_new = recur_G.chunk(3, -1)
    reset = torch.sigmoid(input_reset + recur_reset)
    update = torch.sigmoid(input_update + recur_update)
    new = torch.tanh(input_new + reset * recur_new)
    return (new + update * (cells[0] - new),)


def lstm(input_G: Tensor, recur_G: Tensor, cells: Cells) -> Cells:
    """One step of an LSTM (Hochreiter and Schmidhuber 1997); torch's gates: input, forget, new, output."""
    enter, forget, new, leave = (input_G + recur_G).chunk(4, -1)
    cell = torch.sigmoid(forget) * cells[1] + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(cell), cell


STEPS: dict[Kind, Callable[[Tensor, Tensor, Cells], Cells]] = {"rnn": rnn, "gru": gru, "lstm": lstm}


def plain(weight: Tensor, bias: Tensor | None) -> Product:
    """The product through which gradients flow, for steps in training."""
    return lambda x: F.linear(x, weight, bias)


@dataclass(frozen=True)
class Direction:
    """One direction of one layer as its products, for going step by step.

    The input's product comes in two: what is known of all steps beforehand, and what each step finds.
    """

    kind: Kind
    known: Product
    found: Product | None
    recur: Product

    def step(self, input_G: Tensor, cells: Cells) -> Cells:
        """What follows `cells`, from the input's product."""
        return STEPS[self.kind](input_G, self.recur(cells[0]), cells)


class Recurrent(nn.Module):
    """A stack of torch's layers, each a module of its own: what stands between them is ours.

    With both directions, each has half of the width. Residual connections begin at the second layer, the
    first one that gives what it takes in size.
    """

    def __init__(
        self,
        kind: Kind,
        sizes: tuple[int, int, int],
        *,
        reads: Reads = "forward",
        residual: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """`sizes` are the widths of input and output, and the number of layers."""
        super().__init__()
        inner, width, count = sizes
        self.kind, self.reads, self.residual = kind, reads, residual
        both = reads == "both"
        self.width = width // 2 if both else width  # of each direction
        self.layers = nn.ModuleList(
            MODULES[kind](width if index else inner, self.width, batch_first=True, bidirectional=both)
            for index in range(count)
        )
        for layer in self.layers:
            _begin(layer, kind)
        self.drop = nn.Dropout(dropout)

    def whole(self, x_STD: Tensor, cells: list[Cells] | None = None) -> Tensor:
        """All steps at once, fused; behind a sentence comes what nobody will look at."""
        for index, layer in enumerate(self.layers):
            began: Any = None
            if cells is not None:
                first = tuple(cell[None].to(x_STD.dtype).contiguous() for cell in cells[index])
                began = first if self.kind == "lstm" else first[0]
            x_STD = self._joined(index, x_STD, layer(self.drop(x_STD) if index else x_STD, began)[0])
        return x_STD

    def read(self, x_SLD: Tensor, real_SL: Tensor) -> Tensor:
        """All steps of the real places, in the directions that this stack reads; zeros elsewhere."""
        lengths_S = real_SL.sum(1)
        turned = self.reads == "backward"
        if turned:
            x_SLD = _turned(x_SLD, lengths_S)
        lengths, width = lengths_S.cpu(), x_SLD.shape[1]
        for index, layer in enumerate(self.layers):
            inner = self.drop(x_SLD) if index else x_SLD
            packed = pack_padded_sequence(inner, lengths, batch_first=True, enforce_sorted=False)
            y_SLD, _ = pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=width)
            x_SLD = self._joined(index, x_SLD, y_SLD)
        return _turned(x_SLD, lengths_S) if turned else x_SLD

    def _joined(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.residual and index else y

    def steps(self, linear: Linear, *, known: int | None = None) -> Steps:
        """The same stack step by step; of the first layer's input, `known` columns are multiplied beforehand.

        By default none are: halves of a matrix would not be rounded to int8 as the whole is.
        """
        directions = [
            [
                _direction(layer, self.kind, suffix, linear, known=None if index else known)
                for suffix in (("", "_reverse") if self.reads == "both" else ("",))
            ]
            for index, layer in enumerate(self.layers)
        ]
        return Steps(directions, self.reads, self.residual, self.width, known is not None)


@dataclass(frozen=True)
class Steps:
    """A stack step by step: the directions of each layer."""

    directions: list[list[Direction]]
    reads: Reads
    residual: bool
    width: int  # of each direction
    ahead: bool  # whether what is known beforehand is multiplied beforehand

    def known(self, x: Tensor) -> Tensor:
        """What `step` wants of the input that is known of all steps beforehand."""
        return self.directions[0][0].known(x) if self.ahead else x

    def step(
        self, known: Tensor, found: Tensor | None, cells: list[Cells], drop: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, list[Cells]]:
        """One step of all layers, from what was known and what this step found: the output, the new cells."""
        after: list[Cells] = []
        x = known
        for index, [direction] in enumerate(self.directions):
            input_G = direction.known(drop(x)) if index else self._input(direction, known, found)
            after.append(direction.step(input_G, cells[index]))
            x = x + after[-1][0] if self.residual and index else after[-1][0]
        return x, after

    def _input(self, first: Direction, known: Tensor, found: Tensor | None) -> Tensor:
        """The first layer's product."""
        if not self.ahead:
            return first.known(known if found is None else torch.cat([known, found], -1))
        return known if found is None or first.found is None else known + first.found(found)

    def read(self, x_SLD: Tensor, real_SL: Tensor) -> Tensor:
        """What `Recurrent.read` does, but the same bits for a sentence whatever stands beside it."""
        ahead, back = range(x_SLD.shape[1]), range(x_SLD.shape[1] - 1, -1, -1)
        order = {"forward": [ahead], "backward": [back], "both": [ahead, back]}[self.reads]
        for index, layer in enumerate(self.directions):
            parts = [
                self._scan(direction, x_SLD, real_SL, each)
                for direction, each in zip(layer, order, strict=True)
            ]
            y_SLD = torch.cat(parts, -1) * real_SL[..., None]
            x_SLD = x_SLD + y_SLD if self.residual and index else y_SLD
        return x_SLD

    def _scan(self, direction: Direction, x_SLD: Tensor, real_SL: Tensor, order: range) -> Tensor:
        """One direction; padding leaves the cells as they are."""
        input_SLG = direction.known(x_SLD)
        blank_SD = x_SLD.new_zeros(x_SLD.shape[0], self.width)
        cells: Cells = (blank_SD,) * STATES[direction.kind]
        out_SLD = x_SLD.new_zeros(*x_SLD.shape[:2], self.width)
        for place in order:
            new = direction.step(input_SLG[:, place], cells)
            real_S1 = real_SL[:, place, None]
            cells = tuple(torch.where(real_S1, now, before) for now, before in zip(new, cells, strict=True))
            out_SLD[:, place] = cells[0]
        return out_SLD


def last(states_SLD: Tensor, lengths_S: Tensor, reads: Reads) -> Tensor:
    """What each direction of the last layer had read at its end."""
    first_SD = states_SLD[:, 0]
    if reads == "backward":
        return first_SD
    sentence_S = torch.arange(len(lengths_S), device=lengths_S.device)
    last_SD = states_SLD[sentence_S, lengths_S - 1]
    if reads == "forward":
        return last_SD
    half = states_SLD.shape[-1] // 2
    return torch.cat([last_SD[:, :half], first_SD[:, half:]], -1)


def _turned(x_SLD: Tensor, lengths_S: Tensor) -> Tensor:
    """Each sentence from its end to its beginning; padding stays behind."""
    place_L = torch.arange(x_SLD.shape[1], device=x_SLD.device)
    from_SL = lengths_S[:, None] - 1 - place_L
    from_SL = torch.where(from_SL >= 0, from_SL, place_L)
    return x_SLD.gather(1, from_SL[..., None].expand_as(x_SLD))


def detached(linear: Linear) -> Linear:
    """Products that no gradient flows through."""
    return lambda weight, bias: linear(weight.detach().contiguous(), None if bias is None else bias.detach())


def _direction(layer: Any, kind: Kind, suffix: str, linear: Linear, *, known: int | None) -> Direction:
    weight, bias, recur, recur_bias = (
        getattr(layer, f"{name}_l0{suffix}") for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
    )
    found = None
    if known is not None and known < weight.shape[1]:
        found = linear(weight[:, known:], None)
        weight = weight[:, :known]
    return Direction(kind, linear(weight, bias), found, linear(recur, recur_bias))


def _begin(layer: nn.Module, kind: Kind) -> None:
    """Glorot for inputs, orthogonal for states, gate by gate; an LSTM begins by keeping what it has."""
    gates = {"rnn": 1, "gru": 3, "lstm": 4}[kind]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("bias"):
                parameter.zero_()
                if kind == "lstm" and name.startswith("bias_ih"):
                    parameter.chunk(4)[1].fill_(1.0)
                continue
            for gate in parameter.chunk(gates):
                (nn.init.xavier_uniform_ if "_ih_" in name else nn.init.orthogonal_)(gate)
