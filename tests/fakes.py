"""Small stand-ins: tiny networks of every registered architecture, and a network that is only a table."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from trmt.nets.base import Linear, Memory, Output, Ragged, Rows, Seq2Seq, Source, State, Stepper
from trmt.registry import ARCHITECTURES, resolve

VOCABULARY = 23

# What keeps a registered network small in tests, wherever its config has the field.
SMALL: Mapping[str, Any] = {
    "source_vocabulary": VOCABULARY,
    "target_vocabulary": VOCABULARY,
    "width": 16,
    "feed_forward": 32,
    "heads": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "dropout": 0.0,
    "longest": 96,
    "encoder_steps": 4,
    "decoder_steps": 3,
}


def small_network(architecture: str, **options: Any) -> Seq2Seq:
    """A tiny network with random weights, in eval mode."""
    network = resolve(ARCHITECTURES, architecture)
    config = network.config_class
    known = {field.name for field in fields(config)}
    torch.manual_seed(7)
    sizes = {name: value for name, value in SMALL.items() if name in known}
    net: Seq2Seq = network(config(**{**sizes, **options})).eval()
    for name, buffer in net.named_buffers():  # statistics as if of some training
        if name.endswith("running_mean"):
            buffer.copy_(torch.rand(buffer.shape))
        elif name.endswith("running_var"):
            buffer.copy_(10 + 20 * torch.rand(buffer.shape))
    return net


def random_sentences(count: int, *, longest: int = 9, seed: int = 0) -> list[list[int]]:
    """Sentences of 1 to `longest` ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(4, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


class Table(Seq2Seq):
    """A scripted network: the scores of the next token depend on the two tokens before it, by a table."""

    def __init__(self, scores_VVV: Tensor) -> None:
        super().__init__()
        self.scores_VVV = torch.nn.Parameter(scores_VVV)

    def forward(self, source: Source, target: Ragged, *, want: Collection[str] = ()) -> Output:
        raise AssertionError("the table is only for searching")

    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        return hidden if only is None else hidden[..., only]

    def frozen(self, linear: Linear) -> Stepper:
        return TableStepper(self.scores_VVV.detach())


class TableStepper(Stepper):
    def __init__(self, scores_VVV: Tensor) -> None:
        self.scores_VVV = scores_VVV

    def start(
        self,
        source: Source,
        *,
        hypotheses: int,
        room: int,
        reorders: bool = True,
        fixed: bool = False,
    ) -> State:
        before_SK = torch.zeros((len(source), hypotheses), dtype=torch.long)
        return State(Memory({}, {}), Rows((before_SK,)), torch.zeros_like(source.lengths_S))

    def step(self, tokens_SKT: Tensor, state: State, *, want: Collection[str] = ()) -> tuple[Output, State]:
        memory, own, position_S = state.take()
        (before_SK,) = own.tensors
        scores_SKV = self.scores_VVV[before_SK, tokens_SKT[:, :, 0]]
        return Output(scores_SKV[:, :, None]), State(memory, Rows((tokens_SKT[:, :, 0],)), position_S + 1)

    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        # A copy, because the engine masks scores in place and these are the table itself.
        return hidden.clone() if only is None else hidden[..., only]
