"""What a search and a ranker promise.

Axes: S sentence, K hypothesis, V vocabulary, T target position, R rows (S * K).

A search gets logits and returns which hypotheses to continue with which tokens. It works on tensors of fixed
shapes and needs no value from an accelerator; the engine owns the loop, the masks (bans, prefixes) and asks
when everything is done. A search may overwrite the logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from trmt.devices.transfer import HostCopy


@dataclass(frozen=True)
class Hypothesis:
    """A translation as ids, without the end-of-sentence token."""

    ids: tuple[int, ...]
    score: float  # natural logarithm of its probability
    normalised: float  # what the search ranks by


class SearchRequest(Protocol):
    """What a search knows of a sentence."""

    @property
    def max_tokens(self) -> int:
        """A hypothesis that has so many tokens ends there, at no cost."""

    @property
    def key(self) -> int:
        """Tells sentences apart, for a search that draws random numbers."""


@dataclass(frozen=True)
class SearchState:
    """Tensors that begin with the sentence axis; subclasses add their own."""

    done_S: Tensor  # sentences whose result will not change any more
    length_S: Tensor  # tokens chosen so far

    def keep(self, sentences: Tensor) -> Self:
        """Only these sentences, in this order."""
        return self._with([getattr(self, field.name)[sentences] for field in fields(self)])

    def view(self, sentences: int) -> Self:
        """A view of the first sentences."""
        return self._with([getattr(self, field.name)[:sentences] for field in fields(self)])

    def fetched(self) -> Callable[[], Self]:
        """Start copying it to the host; what is returned waits for the copy."""
        copy = HostCopy([getattr(self, field.name) for field in fields(self)])
        return lambda: self._with(copy.wait())

    def replace(self, slots: Tensor, other: Self) -> Self:
        """The sentences of `other` in these slots; both must have space for as many tokens."""
        both = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return self._with([mine.index_copy(0, slots, theirs) for mine, theirs in both])

    def _with(self, values: list[Tensor]) -> Self:
        named: dict[str, Any] = {field.name: value for field, value in zip(fields(self), values, strict=True)}
        return replace(self, **named)


class Search(ABC):
    """A way to choose tokens."""

    hypotheses: int  # how many it follows for each sentence
    reorders: bool  # whether `advance` ever returns other parents than 0, 1, 2, ...

    @abstractmethod
    def start(
        self, requests: Sequence[SearchRequest], *, max_tokens: int, eos: int, device: torch.device
    ) -> Any:
        """The state before the first token, with space for `max_tokens`, the most that any request has."""

    @abstractmethod
    def advance(self, logits_SKV: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """From logits of any precision to (parents [S, K], tokens [S, K], state).

        The state that was given is consumed: its tensors may be written in place.
        """

    @abstractmethod
    def results(self, state: Any) -> list[list[Hypothesis]]:
        """For each sentence its hypotheses, the best first."""


class Ranker(ABC):
    """A way to choose among finished hypotheses."""

    @abstractmethod
    def pick(self, hypotheses: Sequence[Hypothesis]) -> Hypothesis:
        """The one to print."""
