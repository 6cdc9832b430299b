"""What an objective promises: it turns examples into tensors, and a network's answer into sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trmt.nets.base import Network, Seq2Seq
from trmt.sets.batches import Batches, BatchShape, RaggedBatch
from trmt.text.subwords import WORD_MARK
from trmt.text.tokenizer import Side


@dataclass(frozen=True)
class Loss:
    """Sums over the tokens of a batch; they add up over any split of it and are divided once, at the end."""

    total: Tensor  # what is minimised
    nll: Tensor  # negative log likelihood without smoothing, in nats; carries no gradient
    tokens: int
    # Of the questions that are not for a token, such as whether a text goes on: the number answered rightly.
    right: Tensor | None = None
    questions: int = 0


@dataclass(frozen=True)
class Specials:
    """The ids that mean something to an objective; they come from the tokenizer."""

    bos: int
    eos: int
    unk: int = 1  # also what stands for a piece that is masked
    first: int = 4  # the first id that is no special one
    vocabulary: int = 0
    begins_word: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool), repr=False)

    @classmethod
    def of(cls, side: Side) -> Specials:
        """Those of one side of a tokenizer."""
        pieces = side.pieces(range(side.vocabulary))
        begins = np.array([piece.startswith(WORD_MARK) for piece in pieces])
        return cls(side.bos, side.eos, side.unk, 4, side.vocabulary, begins)


class Objective(ABC):
    """A way to learn from examples."""

    config_class: ClassVar[type]
    networks: ClassVar[tuple[type[Network], ...]] = (Seq2Seq,)  # what can learn this

    @classmethod
    def batches(cls, config: Any) -> Callable[..., Batches]:
        """What makes the batches that it learns from: called as `Batches` is."""
        return Batches

    @abstractmethod
    def __init__(self, config: Any, specials: Specials) -> None: ...

    def told(self) -> dict[str, Any]:
        """What a bundle should know of what its network was taught."""
        return {}

    @abstractmethod
    def tokens(self, examples: RaggedBatch) -> int:
        """How many tokens the loss of these examples will be a sum over."""

    @abstractmethod
    def collate(self, examples: RaggedBatch, device: torch.device, *, shape: BatchShape | None = None) -> Any:
        """The examples as tensors on a device; padded to `shape` if they fit into it."""

    @abstractmethod
    def loss(self, net: Any, batch: Any) -> Loss:
        """The network's loss on a batch, summed."""
