"""Greedy search: always the most probable token.

Axes: S sentence, K hypothesis (one here), R rows (S * K), V vocabulary, T target position.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trmt.decoding.base import Compiled, Hypothesis, Search, SearchState, Sentence
from trmt.decoding.choosing import highest, library_for
from trmt.devices.transfer import to_device


class _Lines(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sentences", "room")),
        *(
            (name, ctypes.c_void_p)
            for name in ("limit", "eos", "length", "count", "tokens", "score", "ended", "done")
        ),
    )


@dataclass(frozen=True)
class LineState(SearchState):
    """Hypotheses that never meet: what greedy search and sampling keep."""

    limit_S: Tensor
    eos_S: Tensor
    score_SK: Tensor
    ended_SK: Tensor
    count_SK: Tensor  # tokens up to the end
    tokens_SKT: Tensor

    @classmethod
    def empty(
        cls, sentences: Sequence[Sentence], sizes: tuple[int, int], *, eos: int, device: torch.device
    ) -> LineState:
        """Room for `sizes` = (hypotheses, tokens) of each sentence."""
        limit_S = to_device([sentence.limit for sentence in sentences], device)
        zero_S = torch.zeros_like(limit_S)
        zero_SK = torch.zeros((len(sentences), sizes[0]), dtype=torch.long, device=device)
        return cls(
            done_S=zero_S.bool(),
            length_S=zero_S.clone(),
            limit_S=limit_S,
            eos_S=zero_S + eos,
            score_SK=zero_SK.float(),
            ended_SK=zero_SK.bool(),
            count_SK=zero_SK,
            tokens_SKT=torch.zeros((len(sentences), *sizes), dtype=torch.long, device=device),
        )

    @cached_property
    def for_kernel(self) -> Any:
        """These tensors as the kernel takes them, which writes to them in place."""
        written = (self.length_S, self.count_SK, self.tokens_SKT, self.score_SK, self.ended_SK, self.done_S)
        tensors = (self.limit_S, self.eos_S, *written)
        assert all(tensor.is_contiguous() for tensor in tensors)
        rows, _, room = self.tokens_SKT.shape
        return _Lines(rows, room, *(tensor.data_ptr() for tensor in tensors))

    def extended(self, tokens_SK: Tensor, log_SK: Tensor) -> LineState:
        """Each hypothesis one token longer, but those that have ended."""
        # A sentence that waits to be taken away stays in its room.
        at = self.length_S.clamp(max=self.tokens_SKT.shape[2] - 1)[:, None, None]
        at = at.expand(-1, tokens_SK.shape[1], 1)
        length_S = self.length_S + 1
        over_SK = self.ended_SK | (tokens_SK == self.eos_S[:, None])
        ended_SK = over_SK | (length_S >= self.limit_S)[:, None]
        return LineState(
            done_S=ended_SK.all(1),
            length_S=length_S,
            limit_S=self.limit_S,
            eos_S=self.eos_S,
            score_SK=self.score_SK + log_SK.masked_fill(self.ended_SK, 0),
            ended_SK=ended_SK,
            count_SK=self.count_SK + ~over_SK,
            tokens_SKT=self.tokens_SKT.scatter_(2, at, tokens_SK[:, :, None]),
        )

    def hypotheses(self) -> list[list[Hypothesis]]:
        """The hypotheses of each sentence in their own order; scores are normalised by length."""
        rows = zip(self.tokens_SKT.tolist(), self.count_SK.tolist(), self.score_SK.tolist(), strict=True)
        return [
            [
                Hypothesis(tuple(line[:count]), score, score / (count + 1))
                for line, count, score in zip(tokens, counts, scores, strict=True)
            ]
            for tokens, counts, scores in rows
        ]


@dataclass(frozen=True)
class Greedy(Search):
    """One hypothesis, always the most probable token."""

    hypotheses: int = 1
    reorders: bool = False

    def start(self, sentences: Sequence[Sentence], *, room: int, eos: int, device: torch.device) -> LineState:
        return LineState.empty(sentences, (1, room), eos=eos, device=device)

    def advance(self, scores_SKV: Tensor, state: LineState) -> tuple[Tensor, Tensor, LineState]:
        if compiled := self.compiled(state, scores_SKV.shape[2]):
            return (*compiled.advance(scores_SKV), state)
        scores_RV = scores_SKV.flatten(0, 1)
        best_R1, tokens_R1, sum_R1 = highest(scores_RV, 1)
        log_R1 = best_R1 - sum_R1
        tokens_SK = tokens_R1.view(scores_SKV.shape[:2])
        return torch.zeros_like(tokens_SK), tokens_SK, state.extended(tokens_SK, log_R1.view_as(tokens_SK))

    def compiled(self, state: LineState, vocabulary: int) -> Compiled | None:
        library = library_for(state.score_SK, vocabulary, 1)
        return Compiled(library.trmt_advance_lines, state.for_kernel) if library else None

    def results(self, state: LineState) -> list[list[Hypothesis]]:
        return state.hypotheses()
