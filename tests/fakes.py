"""Small stand-ins: tiny networks of every registered architecture, and a network that is only a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from trmt.nets.base import (
    NO_WEIGHTS,
    Decoding,
    EncoderMemory,
    HiddenVectors,
    Output,
    Products,
    Seq2Seq,
    Stepper,
    WantedWeights,
)
from trmt.nets.ragged import Ragged, Source
from trmt.registry import ARCHITECTURES, resolve

VOCABULARY = 23

# What keeps a registered network small in tests, where its config has the field.
SMALL: Mapping[str, Any] = {
    "source_vocabulary": VOCABULARY,
    "target_vocabulary": VOCABULARY,
    "d_model": 16,
    "feed_forward": 32,
    "heads": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "dropout": 0.0,
    "max_positions": 96,
    "position_columns": 6,
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
    """A scripted network: a table has the logits of the next token, given the two tokens before it."""

    def __init__(self, logits_VVV: Tensor) -> None:
        super().__init__()
        self.logits_VVV = nn.Parameter(logits_VVV)
        self.output = nn.Embedding.from_pretrained(torch.zeros(1, 1), freeze=False)  # which is not used

    def forward(self, source: Source, target: Ragged, *, want: WantedWeights = NO_WEIGHTS) -> Output:
        raise AssertionError("the table is only for decoding")

    def start(self, source: Source, decoding: Decoding) -> tuple[EncoderMemory, HiddenVectors]:
        before_SK = torch.zeros((len(source), decoding.hypotheses), dtype=torch.long)
        return EncoderMemory({}, {}), HiddenVectors((before_SK,))

    def step(
        self, tokens_SKT: Tensor, memory: EncoderMemory, decoder: HiddenVectors, position_S: Tensor
    ) -> tuple[Tensor, HiddenVectors]:
        (before_SK,) = decoder.tensors
        logits_SKV = self.logits_VVV[before_SK, tokens_SKT[:, :, 0]]
        return logits_SKV[:, :, None], HiddenVectors((tokens_SKT[:, :, 0],))

    def frozen(self, products: Products) -> Stepper:
        return LogitStepper(self, products)


class LogitStepper(Stepper):
    """The stepper of a network whose hidden states are logits."""

    def __init__(self, net: Seq2Seq, products: Products) -> None:
        super().__init__(net, products)
        self.readout = torch.clone  # because masks change logits in place
