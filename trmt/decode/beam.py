"""Beam search with the length penalty of Wu et al. (arXiv 1609.08144, equation 14).

Axes: S sentence, K hypothesis, C candidates of one hypothesis, V vocabulary, T target position.

A hypothesis that ends keeps its place in the beam, so the beam narrows as hypotheses finish, and a beam
of one is greedy search. A sentence is done when every place is taken, or when no hypothesis that still
lives could overtake the worst one asked for, whatever it went on with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trmt.decode.base import Hypothesis, Search, SearchState, top
from trmt.errors import ConfigError

ROUNDING = 1e-6  # what normalised scores are off by, at most, relative to themselves
MAX_PENALTY = 10  # as an exponent; far larger ones overflow and make all hypotheses equal


@dataclass(frozen=True)
class BeamState(SearchState):
    """The living hypotheses, and behind them the finished ones."""

    eos_S: Tensor
    score_SK: Tensor  # minus infinity where no hypothesis lives
    tokens_SKT: Tensor
    ended_S: Tensor  # how many have finished
    ended_score_SK: Tensor
    ended_length_SK: Tensor
    ended_tokens_SKT: Tensor


@dataclass(frozen=True)
class Beam(Search):
    """Follow the `size` most probable prefixes; the defaults are those of "Attention Is All You Need"."""

    size: int = 4
    length_penalty: float = 0.6
    n_best: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.n_best < 1 or not 0 <= self.length_penalty <= MAX_PENALTY:
            raise ConfigError(
                f"a beam needs a size of at least 1, a length penalty from 0 to {MAX_PENALTY}, "
                "and at least one result"
            )
        if self.n_best > self.size:
            raise ConfigError(f"--n-best {self.n_best} needs a beam of at least that size, not {self.size}")

    @property
    def hypotheses(self) -> int:  # type: ignore[override]
        """The places of the beam."""
        return self.size

    @property
    def reorders(self) -> bool:  # type: ignore[override]
        """A beam of one never exchanges its hypothesis."""
        return self.size > 1

    def start(self, keys: Sequence[int], *, room: int, eos: int, device: torch.device) -> BeamState:
        sentences = len(keys)
        score_SK = torch.full((sentences, self.size), -torch.inf, device=device)
        score_SK[:, 0] = 0  # all places begin with the same prefix: only one may count
        empty_SKT = torch.zeros((sentences, self.size, room), dtype=torch.long, device=device)
        zero_S = torch.zeros(sentences, dtype=torch.long, device=device)
        return BeamState(
            done_S=zero_S.bool(),
            length_S=zero_S,
            eos_S=zero_S + eos,
            score_SK=score_SK,
            tokens_SKT=empty_SKT,
            ended_S=zero_S,
            ended_score_SK=torch.full_like(score_SK, -torch.inf),
            ended_length_SK=zero_S[:, None].expand(-1, self.size).clone(),
            ended_tokens_SKT=empty_SKT.clone(),
        )

    def advance(self, scores_SKV: Tensor, state: BeamState) -> tuple[Tensor, Tensor, BeamState]:
        best, ids = top(scores_SKV.flatten(0, 1), self.size)
        log_SKC = (best - scores_SKV.flatten(0, 1).logsumexp(-1, keepdim=True)).unflatten(0, (-1, self.size))
        total = (state.score_SK[:, :, None] + log_SKC).flatten(1)
        score_SK, flat_SK = total.topk(self.size, -1)
        parents_SK = flat_SK // log_SKC.shape[2]
        tokens_SK = ids.view(ids.shape[0] // self.size, -1).gather(1, flat_SK)

        place_K = torch.arange(self.size, device=score_SK.device)
        taken = place_K >= (self.size - state.ended_S)[:, None]
        score_SK = score_SK.masked_fill(taken | state.done_S[:, None], -torch.inf)
        history_SKT = state.tokens_SKT.gather(1, parents_SK[:, :, None].expand_as(state.tokens_SKT))
        at = state.length_S[:, None, None].expand(-1, self.size, 1)
        history_SKT.scatter_(2, at, tokens_SK[:, :, None])
        ends_SK = (tokens_SK == state.eos_S[:, None]) & score_SK.isfinite()
        state = self._with_ended(state, ends_SK, score_SK, history_SKT)
        return parents_SK, tokens_SK, state

    def _with_ended(
        self, state: BeamState, ends_SK: Tensor, score_SK: Tensor, history_SKT: Tensor
    ) -> BeamState:
        """Move what ended to the places behind those that ended before."""
        place_SK = state.ended_S[:, None] + ends_SK.cumsum(1) - 1
        # A spare place at the end takes what is not meant to be kept.
        place_SK = torch.where(ends_SK, place_SK, self.size)
        length_S = state.length_S + 1
        ended_S = state.ended_S + ends_SK.sum(1)
        ended_score_SK = _put(state.ended_score_SK, place_SK, score_SK)
        ended_length_SK = _put(state.ended_length_SK, place_SK, length_S[:, None].expand_as(place_SK))
        living_SK = score_SK.masked_fill(ends_SK, -torch.inf)
        worst_S = self._normalised(ended_score_SK, ended_length_SK).topk(self.n_best, 1).values[:, -1]
        # A log probability only falls and the penalty is largest at full length: more is out of reach.
        hope_S = self._normalised(living_SK, torch.full_like(ended_length_SK, history_SKT.shape[2])).amax(1)
        hope_S = hope_S * (1 - ROUNDING)
        return BeamState(
            done_S=state.done_S | (ended_S >= self.size) | (worst_S >= hope_S),
            length_S=length_S,
            eos_S=state.eos_S,
            score_SK=living_SK,
            tokens_SKT=history_SKT,
            ended_S=ended_S,
            ended_score_SK=ended_score_SK,
            ended_length_SK=ended_length_SK,
            ended_tokens_SKT=_put(state.ended_tokens_SKT, place_SK, history_SKT),
        )

    def _normalised(self, score: Tensor, length: Tensor) -> Tensor:
        return score / ((5 + length) / 6) ** self.length_penalty

    def results(self, state: BeamState) -> list[list[Hypothesis]]:
        rows = zip(
            state.ended_S.tolist(),
            state.ended_score_SK.tolist(),
            state.ended_length_SK.tolist(),
            state.ended_tokens_SKT.tolist(),
            strict=True,
        )
        return [
            self._ranked(scores[:ended], lengths[:ended], tokens) for ended, scores, lengths, tokens in rows
        ]

    def _ranked(self, scores: list[float], lengths: list[int], tokens: list[list[int]]) -> list[Hypothesis]:
        # In Python: a tensor's powers differ in the last bit with the place of a number in it.
        found = [
            Hypothesis(tuple(ids[: length - 1]), score, score / ((5 + length) / 6) ** self.length_penalty)
            for score, length, ids in zip(scores, lengths, tokens, strict=False)
        ]
        return sorted(found, key=lambda each: -each.normalised)[: self.n_best]


def _put(kept: Tensor, place_SK: Tensor, new: Tensor) -> Tensor:
    """`new` written to its places along axis 1; place K is thrown away."""
    spare = torch.cat([kept, torch.zeros_like(kept[:, :1])], 1)
    index = place_SK if new.dim() == 2 else place_SK[:, :, None].expand_as(new)
    return spare.scatter(1, index, new)[:, :-1]
