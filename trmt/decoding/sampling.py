"""Sampling, with temperature, top-k (arXiv 1805.04833) and top-p (arXiv 1904.09751).

Axes: S sentence, K hypothesis, V vocabulary, T target position.

Every sentence draws its random numbers before the first token, from its own key and the seed, so that a
sample depends neither on the batch nor on the order in which sentences are translated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trmt.decoding.base import Hypothesis, Search, SearchRequest
from trmt.decoding.greedy import LineState
from trmt.decoding.top import top
from trmt.devices.transfer import to_device
from trmt.errors import ConfigError
from trmt.trees import MAX_INT

MAX_SAMPLES = 100_000


@dataclass(frozen=True)
class SamplingState(LineState):
    """The lines, and the random number in [0, 1) that decides each of their tokens."""

    random_SKT: Tensor


@dataclass(frozen=True)
class Sampling(Search):
    """Draw each token from the network's distribution; the samples of a sentence are independent."""

    samples: int = 1
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 1
    reorders: bool = False

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.samples < 1:
            raise ConfigError(
                "sampling needs a temperature of at least 0, a top-p above 0 and up to 1, "
                "a top-k of at least 0 and at least one sample"
            )
        if self.samples > MAX_SAMPLES or max(self.top_k, abs(self.seed)) > MAX_INT:
            raise ConfigError(
                f"sampling draws at most {MAX_SAMPLES:,} samples, and takes a top-k and a seed of 64 bits; "
                "choose smaller numbers"
            )

    @property
    def hypotheses(self) -> int:  # type: ignore[override]
        """As many as samples are asked for."""
        return self.samples

    def start(
        self, requests: Sequence[SearchRequest], *, max_tokens: int, eos: int, device: torch.device
    ) -> SamplingState:
        lines = LineState.empty(requests, (self.samples, max_tokens), eos=eos, device=device)
        numbers = [
            torch.rand(max_tokens, self.samples, generator=self._generator(request.key)).T
            for request in requests
        ]
        return SamplingState(**vars(lines), random_SKT=to_device(torch.stack(numbers), device))

    def _generator(self, key: int) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed} {key}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def advance(self, logits_SKV: Tensor, state: SamplingState) -> tuple[Tensor, Tensor, SamplingState]:
        # A finished sentence stays within its random numbers until it is removed.
        at = state.length_S.clamp(max=state.random_SKT.shape[2] - 1)[:, None, None].expand(
            -1, self.samples, 1
        )
        random_SK1 = state.random_SKT.gather(2, at)
        logits_SKV = logits_SKV.float()  # in half precision, shares would not add up
        tokens_SK = self._choose(logits_SKV, random_SK1)
        # The score is the probability under the network, not under the sharpened distribution.
        chosen_SK = logits_SKV.gather(2, tokens_SK[:, :, None])[:, :, 0]
        # Last, because the scores may be lost in it.
        log_SK = chosen_SK - top(logits_SKV.flatten(0, 1), 1)[2].view_as(chosen_SK)
        lines = state.extended(tokens_SK, log_SK)
        parents_SK = torch.arange(self.samples, device=tokens_SK.device).expand_as(tokens_SK)
        return parents_SK, tokens_SK, SamplingState(**vars(lines), random_SKT=state.random_SKT)

    def _choose(self, logits_SKV: Tensor, random_SK1: Tensor) -> Tensor:
        """Inverse transform sampling, the most probable token first."""
        if self.temperature == 0:
            return logits_SKV.argmax(-1)
        ordered_SKV, ids_SKV = logits_SKV.sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            ordered_SKV, ids_SKV = ordered_SKV[..., : self.top_k], ids_SKV[..., : self.top_k]
        # Relative to the first, so that no temperature is too low to divide by.
        share_SKV = ((ordered_SKV - ordered_SKV[..., :1]) / self.temperature).softmax(-1)
        upper_SKV = share_SKV.cumsum(-1)
        # The nucleus: the shortest head of the list that holds top_p.
        inside_SKV = (upper_SKV - share_SKV) < self.top_p
        # At least one, also where the scores are no numbers, which is the engine's to report.
        size_SK1 = inside_SKV.sum(-1, keepdim=True).clamp(min=1)
        whole_SK1 = upper_SKV.gather(-1, size_SK1 - 1)
        index_SK1 = (upper_SKV <= random_SK1 * whole_SK1).sum(-1, keepdim=True)
        # Rounding can push a number near 1 past the end; the last token that has any share takes it.
        count_SK1 = ((share_SKV > 0) & inside_SKV).sum(-1, keepdim=True).clamp(min=1)
        return ids_SKV.gather(-1, index_SK1.minimum(count_SK1 - 1))[..., 0]

    def results(self, state: SamplingState) -> list[list[Hypothesis]]:
        return state.hypotheses()
