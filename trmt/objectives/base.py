"""What an objective promises: it turns examples into tensors, and a network's answer into sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trmt.arch.base import Seq2Seq
from trmt.batches import Examples, Room


@dataclass(frozen=True)
class Loss:
    """Sums over the tokens of a batch; they add up over any split of it and are divided once, at the end."""

    total: Tensor  # what is minimised
    nll: Tensor  # negative log likelihood without smoothing, in nats; carries no gradient
    tokens: int


@dataclass(frozen=True)
class Specials:
    """The ids that mean something to an objective; they come from the tokenizer."""

    bos: int
    eos: int


class Objective(ABC):
    """A way to learn from examples."""

    config_class: ClassVar[type]

    @abstractmethod
    def __init__(self, config: Any, specials: Specials) -> None: ...

    @abstractmethod
    def tokens(self, examples: Examples) -> int:
        """How many tokens the loss of these examples will be a sum over."""

    @abstractmethod
    def collate(self, examples: Examples, device: torch.device, *, room: Room | None = None) -> Any:
        """The examples as tensors on a device; given a room they fit into, filled up to its shape."""

    @abstractmethod
    def loss(self, net: Seq2Seq, batch: Any) -> Loss:
        """The network's loss on a batch, summed."""
