"""Runs the steps of a batch directly: PyTorch operation by operation, or several steps in one call of a
kernel.

Axes: S sentence, K hypothesis.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence

from trmt.acceleration import accelerated
from trmt.decoding.base import Hypothesis
from trmt.decoding.batch import Batch, BatchDecoder
from trmt.decoding.request import Request
from trmt.devices.transfer import to_device
from trmt.nets.base import Decoding

COMPACT_AT = 0.25  # share of finished sentences at which others take their slots, or the batch shrinks
REFILL_LENGTH = 0.6  # of the longest source in a batch: what is shorter waits for the next
SYNC_EVERY = 8  # steps between two questions to an accelerator, each of which waits for it


class DirectRunner:
    """A batch whose tensors shrink as sentences finish, on any device."""

    def __init__(self, decoder: BatchDecoder) -> None:
        self.decoder = decoder
        fast = accelerated("multi_step")
        self.multi_step = fast(decoder.stepper, decoder.search) if fast else None
        self.slots: list[Request | None] = []  # whose sentence each row of the batch is; None: finished

    def queues(self, requests: Sequence[Request]) -> Iterator[tuple[deque[Request], int]]:
        """All requests in one queue, and how many tokens they want."""
        yield deque(requests), max((request.max_tokens for request in requests), default=0)

    def open(self, queue: deque[Request], max_tokens: int) -> None:
        """Get ready for a queue."""
        self.max_tokens, self.slots = max_tokens, []
        search = self.decoder.search
        decoding = Decoding(search.hypotheses, max_tokens, search.reorders)
        self.refills = self.decoder.stepper.same_beside_others(decoding)

    def admit(self, queue: deque[Request]) -> bool:
        """Give free slots to requests of the queue, or drop them; False when there is nothing left to decode.

        Requests that join are as long as those beside them, or little shorter: what is much shorter would be
        padded, and waits for the next batch.
        """
        free = [slot for slot, request in enumerate(self.slots) if request is None]
        if len(free) == len(self.slots):
            return self._start_batch(queue)
        if free and self.refills and queue and len(queue[0].source) >= REFILL_LENGTH * self.longest_source:
            joining = self.decoder.take(queue, len(free))
            taken, free = free[: len(joining)], free[len(joining) :]
            self.batch.replace(
                to_device(taken, self.decoder.device), self.decoder.start(joining, self.max_tokens)
            )
            for slot, request in zip(taken, joining, strict=True):
                self.slots[slot] = request
        if free:
            kept = [slot for slot, request in enumerate(self.slots) if request is not None]
            self.batch.keep(to_device(kept, self.decoder.device))
            self.slots = [self.slots[slot] for slot in kept]
        self.tokens = int(self.batch.search_state.length_S.max())
        return True

    def _start_batch(self, queue: deque[Request]) -> bool:
        self.free()
        if not queue:
            return False
        requests = self.decoder.take(queue, len(queue))
        self.batch: Batch = self.decoder.start(requests, self.max_tokens)
        self.slots = [*requests]
        self.longest_source, self.tokens = len(requests[0].source), 0
        return True

    def run(self, queue: deque[Request]) -> None:
        """Decode until enough sentences are done to make it worth changing the batch."""
        enough = max(math.ceil(COMPACT_AT * len(self.slots)), 1)
        for step in itertools.count(1):
            self.tokens += self._advance(enough)
            # At the limit all are done, and must not go on.
            at_limit = self.tokens >= self.max_tokens
            if not at_limit and self.decoder.device.type != "cpu" and step % SYNC_EVERY:
                continue
            self.done = self.batch.search_state.done_S.tolist()
            if at_limit or sum(self.done) >= enough:
                return

    def _advance(self, enough: int) -> int:
        """A step, or several; returns how many."""
        if self.multi_step:
            taken: int = self.multi_step.run(self.batch, self.max_tokens - self.tokens, enough)
            if taken:
                return taken
        self.decoder.step(self.batch)
        return 1

    def finished(self) -> Iterator[tuple[Request, list[Hypothesis]]]:
        """The sentences that are done; their slots are free from now on."""
        slots = [slot for slot, is_done in enumerate(self.done) if is_done]
        search_state = self.batch.search_state.keep(to_device(slots, self.decoder.device))
        for slot, hypotheses in zip(slots, self.decoder.results(search_state), strict=True):
            request, self.slots[slot] = self.slots[slot], None
            assert request is not None, "a finished sentence was there"
            yield request, hypotheses

    def drain(self) -> Iterator[tuple[Request, list[Hypothesis]]]:
        """Nothing is under way when the queue is empty."""
        return iter(())

    def free(self) -> None:
        """Let go of memory."""
        self.slots = []
        vars(self).pop("batch", None)
