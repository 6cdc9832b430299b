"""What a search and a ranker promise.

Axes: S sentence, K hypothesis, V vocabulary, T target position, R rows (S * K).

A search sees scores and returns which hypotheses to continue with which tokens. It runs on tensors of
fixed shapes without asking an accelerator for a value; the engine owns the loop, the masks (bans, prefixes)
and the moment of looking whether everything is done. Scores that a search was given it may overwrite.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from trmt.devices.transfer import HostCopy

CHUNK = 128  # of the vocabulary, in the first stage of `top`
BLOCK = 16  # rows whose exponentials stay in a processor's cache


@dataclass(frozen=True)
class Hypothesis:
    """A translation as ids, without the end-of-sentence token."""

    ids: tuple[int, ...]
    score: float  # natural logarithm of its probability
    normalised: float  # what the search ranks by


class Sentence(Protocol):
    """What a search is told of a sentence."""

    @property
    def limit(self) -> int:
        """So many tokens at most: a hypothesis that has them ends there, at no cost."""

    @property
    def key(self) -> int:
        """Names the sentence for those who draw lots."""


@dataclass(frozen=True)
class SearchState:
    """Tensors that begin with the sentence axis; subclasses add their own."""

    done_S: Tensor  # sentences whose result will not change any more
    length_S: Tensor  # tokens chosen so far

    def keep(self, sentences: Tensor) -> Self:
        """Only these sentences, in this order."""
        return self._with([getattr(self, field.name)[sentences] for field in fields(self)])

    def front(self, sentences: int) -> Self:
        """A view of the first sentences."""
        return self._with([getattr(self, field.name)[:sentences] for field in fields(self)])

    def fetched(self) -> Callable[[], Self]:
        """Begin to fetch it from its device; the state on the host, for whoever waits for it."""
        way = HostCopy([getattr(self, field.name) for field in fields(self)])
        return lambda: self._with(way.wait())

    def join(self, other: Self) -> Self:
        """The sentences of both, these first; both must have the same room."""
        both = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return self._with([torch.cat(pair) for pair in both])

    def replace(self, places: Tensor, other: Self) -> Self:
        """The sentences of `other` instead of those at `places`; both must have the same room."""
        both = [(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)]
        return self._with([mine.index_copy(0, places, theirs) for mine, theirs in both])

    def _with(self, values: list[Tensor]) -> Self:
        named: dict[str, Any] = {field.name: value for field, value in zip(fields(self), values, strict=True)}
        return replace(self, **named)


@dataclass(frozen=True)
class Compiled:
    """`Search.advance` as a kernel, and the state that it writes to in place."""

    function: Any
    state: ctypes.Structure

    def advance(self, scores_SKV: Tensor) -> tuple[Tensor, Tensor]:
        """(parents [S, K], tokens [S, K])"""
        scores_SKV = scores_SKV.float().contiguous()
        parents_SK = torch.empty(scores_SKV.shape[:2], dtype=torch.long)
        tokens_SK = torch.empty_like(parents_SK)
        self.function(
            ctypes.addressof(self.state),
            scores_SKV.data_ptr(),
            scores_SKV.shape[2],
            parents_SK.data_ptr(),
            tokens_SK.data_ptr(),
        )
        return parents_SK, tokens_SK


class Search(ABC):
    """A way to choose tokens."""

    hypotheses: int  # how many it follows for each sentence
    reorders: bool  # whether `advance` ever returns other parents than 0, 1, 2, ...

    @abstractmethod
    def start(self, sentences: Sequence[Sentence], *, room: int, eos: int, device: torch.device) -> Any:
        """The state before the first token; `room` is at least the highest limit."""

    @abstractmethod
    def advance(self, scores_SKV: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        """From unnormalised scores of any precision to (parents [S, K], tokens [S, K], state).

        The state that was given is consumed: its tensors may be written in place.
        """

    def compiled(self, state: Any, vocabulary: int) -> Compiled | None:
        """The kernel that does the same as `advance` on scores [S, K, vocabulary], if there is one."""
        return None

    @abstractmethod
    def results(self, state: Any) -> list[list[Hypothesis]]:
        """For each sentence its hypotheses, the best first."""


class Ranker(ABC):
    """A way to choose among finished hypotheses."""

    @abstractmethod
    def pick(self, hypotheses: Sequence[Hypothesis]) -> Hypothesis:
        """The one to print."""


def top(scores_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest scores of each row and where they are; exactly torch.topk, but faster.

    The maxima of chunks say which chunks can hold one of the highest; only those are looked at again.
    """
    vocabulary = scores_RV.shape[1]
    chunks = vocabulary // CHUNK
    if chunks <= count:
        best = scores_RV.topk(min(count, vocabulary), -1)
        return best.values, best.indices
    even = chunks * CHUNK
    grid = scores_RV[:, :even].unflatten(1, (chunks, CHUNK))
    # In ascending order, so that equal scores are met in the order of their ids.
    chosen = grid.amax(-1).topk(count, -1).indices.sort(-1).values
    near = grid.gather(1, chosen[:, :, None].expand(-1, -1, CHUNK)).flatten(1)
    ids = (chosen[:, :, None] * CHUNK + torch.arange(CHUNK, device=chosen.device)).flatten(1)
    if even < vocabulary:
        near = torch.cat([near, scores_RV[:, even:]], 1)
        rest = torch.arange(even, vocabulary, device=ids.device)
        ids = torch.cat([ids, rest.expand(ids.shape[0], -1)], 1)
    best = near.topk(count, -1)
    return best.values, ids.gather(1, best.indices)


def log_sums(scores_RV: Tensor, most_R1: Tensor) -> Tensor:
    """The logarithm of the sum of exponentials of each row [R, 1], whose greatest score is given.

    The scores are lost: at the size of a vocabulary, memory for the exponentials costs more than they do.
    """
    sums = []
    for scores, most in zip(scores_RV.split(BLOCK), most_R1.split(BLOCK), strict=True):
        sums.append(scores.sub_(most).exp_().sum(-1, keepdim=True))
    return (torch.cat(sums) if len(sums) > 1 else sums[0]).log_().add_(most_R1)
