"""Greedy search: always the most probable token.

Axes: S sentence, K hypothesis (one here), R rows (S * K), V vocabulary, T target position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trmt.acceleration import accelerated
from trmt.decoding.base import Hypothesis, Search, SearchRequest, SearchState
from trmt.decoding.top import top
from trmt.devices.transfer import to_device


@dataclass(frozen=True)
class LineState(SearchState):
    """Hypotheses that never meet: what greedy search and sampling keep."""

    max_tokens_S: Tensor
    eos_S: Tensor
    score_SK: Tensor
    ended_SK: Tensor
    count_SK: Tensor  # tokens up to the end
    tokens_SKT: Tensor

    @classmethod
    def empty(
        cls, requests: Sequence[SearchRequest], sizes: tuple[int, int], *, eos: int, device: torch.device
    ) -> LineState:
        """Space for `sizes` = (hypotheses, tokens) of each sentence."""
        max_tokens_S = to_device([request.max_tokens for request in requests], device)
        zero_S = torch.zeros_like(max_tokens_S)
        zero_SK = torch.zeros((len(requests), sizes[0]), dtype=torch.long, device=device)
        return cls(
            done_S=zero_S.bool(),
            length_S=zero_S.clone(),
            max_tokens_S=max_tokens_S,
            eos_S=zero_S + eos,
            score_SK=zero_SK.float(),
            ended_SK=zero_SK.bool(),
            count_SK=zero_SK,
            tokens_SKT=torch.zeros((len(requests), *sizes), dtype=torch.long, device=device),
        )

    def extended(self, tokens_SK: Tensor, log_SK: Tensor) -> LineState:
        """Each hypothesis one token longer, but those that have ended."""
        # A finished sentence stays within its space until it is removed.
        at = self.length_S.clamp(max=self.tokens_SKT.shape[2] - 1)[:, None, None]
        at = at.expand(-1, tokens_SK.shape[1], 1)
        length_S = self.length_S + 1
        over_SK = self.ended_SK | (tokens_SK == self.eos_S[:, None])
        ended_SK = over_SK | (length_S >= self.max_tokens_S)[:, None]
        return LineState(
            done_S=ended_SK.all(1),
            length_S=length_S,
            max_tokens_S=self.max_tokens_S,
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

    def start(
        self, requests: Sequence[SearchRequest], *, max_tokens: int, eos: int, device: torch.device
    ) -> LineState:
        return LineState.empty(requests, (1, max_tokens), eos=eos, device=device)

    def advance(self, logits_SKV: Tensor, state: LineState) -> tuple[Tensor, Tensor, LineState]:
        if fast := accelerated("advance"):
            found: tuple[Tensor, Tensor, LineState] | None = fast(self, logits_SKV, state)
            if found:
                return found
        logits_RV = logits_SKV.flatten(0, 1)
        best_R1, tokens_R1, sum_R1 = top(logits_RV, 1)
        log_R1 = best_R1 - sum_R1
        tokens_SK = tokens_R1.view(logits_SKV.shape[:2])
        return torch.zeros_like(tokens_SK), tokens_SK, state.extended(tokens_SK, log_R1.view_as(tokens_SK))

    def results(self, state: LineState) -> list[list[Hypothesis]]:
        return state.hypotheses()
