"""A batch of sentences that are decoded together, and one decoding step of it.

Axes: S sentence, K hypothesis, T target position.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trmt.decoding.base import Hypothesis, Search
from trmt.decoding.masks import Masks
from trmt.decoding.request import Batching, Request
from trmt.errors import BundleError
from trmt.nets.base import Decoding, State, Stepper
from trmt.nets.ragged import Source


@dataclass
class Batch:
    """All that a decoding step reads and writes; every tensor begins with the sentence axis."""

    tokens_SK: Tensor  # the newest ones
    state: State
    search_state: Any
    masks: Masks

    def keep(self, sentences: Tensor) -> None:
        """Only these sentences, in this order."""
        self.tokens_SK = self.tokens_SK.index_select(0, sentences)
        self.state = self.state.keep(sentences)
        self.search_state = self.search_state.keep(sentences)
        self.masks.keep(sentences)

    def replace(self, slots: Tensor, other: Batch) -> None:
        """The sentences of `other` in these slots."""
        self.tokens_SK = self.tokens_SK.index_copy(0, slots, other.tokens_SK)
        self.state = self.state.replace(slots, other.state)
        self.search_state = self.search_state.replace(slots, other.search_state)
        self.masks.replace(slots, other.masks)


@dataclass
class BatchDecoder:
    """A frozen network and a search: starts batches, and decodes them step by step."""

    stepper: Stepper
    search: Search
    bos: int
    eos: int
    banned: tuple[int, ...]
    device: torch.device
    batching: Batching

    def take(self, queue: deque[Request], most: int) -> list[Request]:
        """As many requests from the front of the queue as may be decoded together."""
        longest = len(queue[0].source)
        count = max(min(most, self.batching.sentences, self.batching.tokens // longest), 1)
        return [queue.popleft() for _ in range(min(count, len(queue)))]

    def start(self, requests: Sequence[Request], max_tokens: int, *, static: bool = False) -> Batch:
        """The batch of these requests before their first token, with space for `max_tokens`."""
        source = Source.of([request.source for request in requests], self.device)
        search = self.search
        decoding = Decoding(search.hypotheses, max_tokens, search.reorders, static)
        return Batch(
            torch.full((len(requests), search.hypotheses), self.bos, device=self.device),
            self.stepper.start(source, decoding),
            search.start(requests, max_tokens=max_tokens, eos=self.eos, device=self.device),
            Masks.of(requests, banned=self.banned, eos=self.eos, device=self.device),
        )

    def step(self, batch: Batch) -> None:
        """One token more for each hypothesis: network, logits, masks, search, and the beams reordered."""
        hidden_SKTD, state = self.stepper.step(batch.tokens_SK[:, :, None], batch.state)
        logits_SKV = self.stepper.readout(hidden_SKTD[:, :, 0])
        batch.masks.apply(logits_SKV, batch.search_state.length_S)
        parents_SK, batch.tokens_SK, batch.search_state = self.search.advance(logits_SKV, batch.search_state)
        batch.state = state.reorder(parents_SK) if self.search.reorders else state

    def results(self, search_state: Any) -> list[list[Hypothesis]]:
        """The hypotheses of each sentence; logits that are not numbers are an error."""
        results = self.search.results(search_state)
        for hypotheses in results:
            if not hypotheses or not all(math.isfinite(each.score) for each in hypotheses):
                raise BundleError(
                    "the network's scores are not numbers: its weights are broken, or the precision is too "
                    "low for them; try another checkpoint or fp32"
                )
        return results
