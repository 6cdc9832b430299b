"""Beam search with the length penalty of Wu et al. (arXiv 1609.08144, equation 14).

Axes: S sentence, K hypothesis, R rows (S * K), C candidates of one of them, V vocabulary, T target
position.

A hypothesis that ends keeps its slot in the beam, so the beam narrows as hypotheses finish, and a beam
of one is greedy search. A sentence is done when every slot is taken, or when no hypothesis that still
lives could overtake the worst one asked for, whatever it went on with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trmt.acceleration import accelerated
from trmt.config import MAX_BEAM
from trmt.decoding.base import Hypothesis, Search, SearchRequest, SearchState
from trmt.decoding.top import top
from trmt.devices.transfer import to_device
from trmt.errors import ConfigError

ROUNDING = 1e-6  # what normalised scores are off by, at most, relative to themselves
MAX_PENALTY = 10  # as an exponent; far larger ones overflow and make all hypotheses equal


@dataclass(frozen=True)
class BeamState(SearchState):
    """The living hypotheses, the finished ones, and of each step who went on from where with what."""

    max_tokens_S: Tensor
    eos_S: Tensor
    score_SK: Tensor  # minus infinity where no hypothesis lives
    parents_STK: Tensor
    tokens_STK: Tensor
    ended_S: Tensor  # how many have finished
    ended_score_SK: Tensor
    ended_length_SK: Tensor  # with the end
    ended_index_SK: Tensor  # of the last token before the end among the hypotheses


@dataclass(frozen=True)
class Beam(Search):
    """Follow the `size` most probable prefixes; the defaults are those of "Attention Is All You Need"."""

    size: int = 4
    length_penalty: float = 0.6
    n_best: int = 1

    def __post_init__(self) -> None:
        if self.size > MAX_BEAM:
            raise ConfigError(f"a beam has a size of at most {MAX_BEAM:,}; choose a smaller --beam")
        if self.size < 1 or self.n_best < 1 or not 0 <= self.length_penalty <= MAX_PENALTY:
            raise ConfigError(
                f"a beam needs a size of at least 1, a length penalty from 0 to {MAX_PENALTY}, "
                "and at least one result"
            )
        if self.n_best > self.size:
            raise ConfigError(f"--n-best {self.n_best} needs a beam of at least that size, not {self.size}")

    @property
    def hypotheses(self) -> int:  # type: ignore[override]
        """The slots of the beam."""
        return self.size

    @property
    def reorders(self) -> bool:  # type: ignore[override]
        """A beam of one never exchanges its hypothesis."""
        return self.size > 1

    def start(
        self, requests: Sequence[SearchRequest], *, max_tokens: int, eos: int, device: torch.device
    ) -> BeamState:
        max_tokens_S = to_device([request.max_tokens for request in requests], device)
        zero_S = torch.zeros_like(max_tokens_S)
        score_SK = torch.full((len(requests), self.size), -torch.inf, device=device)
        score_SK[:, 0] = 0  # all slots begin with the same prefix: only one may count
        history_STK = torch.zeros((len(requests), max_tokens, self.size), dtype=torch.long, device=device)
        return BeamState(
            done_S=zero_S.bool(),
            length_S=zero_S.clone(),
            max_tokens_S=max_tokens_S,
            eos_S=zero_S + eos,
            score_SK=score_SK,
            parents_STK=history_STK,
            tokens_STK=history_STK.clone(),
            ended_S=zero_S.clone(),
            ended_score_SK=torch.full_like(score_SK, -torch.inf),
            ended_length_SK=torch.ones_like(score_SK, dtype=torch.long),
            ended_index_SK=torch.zeros_like(score_SK, dtype=torch.long),
        )

    def advance(self, logits_SKV: Tensor, state: BeamState) -> tuple[Tensor, Tensor, BeamState]:
        if fast := accelerated("advance"):
            found: tuple[Tensor, Tensor, BeamState] | None = fast(self, logits_SKV, state)
            if found:
                return found
        logits_RV = logits_SKV.flatten(0, 1)
        best_RC, ids_RC, sum_R1 = top(logits_RV, self.size)
        log_RC = best_RC - sum_R1
        total = (state.score_SK.view(-1, 1) + log_RC).view(len(state.score_SK), -1)
        score_SK, flat_SK = total.topk(self.size, -1)
        parents_SK = flat_SK // log_RC.shape[1]
        tokens_SK = ids_RC.view(total.shape).gather(1, flat_SK)

        # A finished sentence stays within its space until it is removed.
        at = state.length_S.clamp(max=state.tokens_STK.shape[1] - 1)[:, None, None].expand(-1, 1, self.size)
        state.parents_STK.scatter_(1, at, parents_SK[:, None])
        state.tokens_STK.scatter_(1, at, tokens_SK[:, None])
        length_S = state.length_S + 1
        ends_SK = tokens_SK == state.eos_S[:, None]
        full_S = length_S >= state.max_tokens_S
        if _on_host(tokens_SK) and not (ends_SK.any() or full_S.any() or state.ended_S.any()):
            return parents_SK, tokens_SK, replace(state, length_S=length_S, score_SK=score_SK)
        index_K = torch.arange(self.size, device=score_SK.device)
        taken = index_K >= (self.size - state.ended_S)[:, None]
        score_SK = score_SK.masked_fill(taken | state.done_S[:, None], -torch.inf)
        state = replace(state, length_S=length_S, score_SK=score_SK)
        return parents_SK, tokens_SK, self._with_ended(state, ends_SK, full_S, parents_SK)

    def _with_ended(self, state: BeamState, ends_SK: Tensor, full_S: Tensor, parents_SK: Tensor) -> BeamState:
        """Move what ended, and at the limit all, to the slots behind those that ended before."""
        leaves_SK = (ends_SK | full_S[:, None]) & state.score_SK.isfinite()
        index_SK = state.ended_S[:, None] + leaves_SK.cumsum(1) - 1
        # A spare slot at the end takes what is not meant to be kept.
        index_SK = torch.where(leaves_SK, index_SK, self.size)
        # At the limit the end comes without having been chosen.
        length_SK = state.length_S[:, None] + ~ends_SK
        own_SK = torch.arange(self.size, device=index_SK.device).expand_as(index_SK)
        ended_S = state.ended_S + leaves_SK.sum(1)
        ended_score_SK = _put(state.ended_score_SK, index_SK, state.score_SK)
        ended_length_SK = _put(state.ended_length_SK, index_SK, length_SK)
        last_SK = torch.where(ends_SK, parents_SK, own_SK)
        living_SK = state.score_SK.masked_fill(leaves_SK, -torch.inf)
        worst_S = self._normalised(ended_score_SK, ended_length_SK).topk(self.n_best, 1).values[:, -1]
        # A log probability only falls and the penalty is largest at full length: more is out of reach.
        hope_S = self._normalised(living_SK.amax(1), state.max_tokens_S + 1)
        hope_S = hope_S * (1 - ROUNDING)
        return replace(
            state,
            done_S=state.done_S | full_S | (ended_S >= self.size) | (worst_S >= hope_S),
            score_SK=living_SK,
            ended_S=ended_S,
            ended_score_SK=ended_score_SK,
            ended_length_SK=ended_length_SK,
            ended_index_SK=_put(state.ended_index_SK, index_SK, last_SK),
        )

    def _normalised(self, score: Tensor, length: Tensor) -> Tensor:
        return score / ((5 + length) / 6) ** self.length_penalty

    def results(self, state: BeamState) -> list[list[Hypothesis]]:
        steps = int(state.length_S.max())
        rows = zip(
            state.ended_S.tolist(),
            state.ended_score_SK.tolist(),
            state.ended_length_SK.tolist(),
            state.ended_index_SK.tolist(),
            state.parents_STK[:, :steps].tolist(),
            state.tokens_STK[:, :steps].tolist(),
            strict=True,
        )
        return [self._ranked(*row) for row in rows]

    def _ranked(
        self,
        ended: int,
        scores: list[float],
        lengths: list[int],
        indices: list[int],
        parents: list[list[int]],
        tokens: list[list[int]],
    ) -> list[Hypothesis]:
        # In Python: a tensor's powers differ in the last bit with the position of a number in it.
        found = [
            (score / ((5 + length) / 6) ** self.length_penalty, score, length, index)
            for score, length, index in zip(scores[:ended], lengths, indices, strict=False)
        ]
        best = sorted(found, key=lambda each: -each[0])[: self.n_best]
        return [
            Hypothesis(_traced(length - 1, index, parents, tokens), score, normalised)
            for normalised, score, length, index in best
        ]


def _traced(count: int, index: int, parents: list[list[int]], tokens: list[list[int]]) -> tuple[int, ...]:
    """The first `count` tokens of the hypothesis that has this index after them."""
    ids = []
    for step in range(count - 1, -1, -1):
        ids.append(tokens[step][index])
        index = parents[step][index]
    return tuple(reversed(ids))


def _on_host(tensor: Tensor) -> bool:
    """Whether its values can be had without waiting for a device."""
    return tensor.device.type == "cpu"


def _put(kept: Tensor, index_SK: Tensor, new: Tensor) -> Tensor:
    """`new` written to these indices along axis 1; index K is thrown away."""
    spare = torch.cat([kept, torch.zeros_like(kept[:, :1])], 1)
    return spare.scatter_(1, index_SK, new)[:, :-1]
