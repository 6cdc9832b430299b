"""Search on a GPU without its host: steps are recorded once as CUDA graphs, and replayed.

Axes: S sentence, K hypothesis, T target position.

A step of a small network is some two hundred kernels of microseconds, and telling a GPU to run each takes the
host longer than that. A graph is told once. It works on memory that stays where it is: `Slots` for so many
sentences with room for so many tokens, all that a step reads and writes. Sentences come into slots that are
free and leave them when they are done; the host looks every few steps.

How much of the slots a step computes is recorded with it: the first so many sentences, the first so many
columns of what was written, the first so many of what was read. So there is a graph for each combination of
these, rounded up to a few sizes. The first time one is needed its steps run one by one, since it may never be
needed again; the second time it is recorded.

Searches and networks take no part in this: a step is what `Eager` does. What a network or a search cannot do
without the host runs in `Eager`, and that is said.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from trmt import console
from trmt.decoding.base import Hypothesis, Search
from trmt.decoding.eager import COMPACT_AT, Eager, Underway
from trmt.decoding.engine import Request
from trmt.decoding.graphs import Graphs, Repeated
from trmt.decoding.slots import Slots
from trmt.native.products import Precision
from trmt.nets import linear
from trmt.nets.base import Seq2Seq, Stepper

SMALLEST = 32  # tokens of the translations in the slots with the least room
KINDS = 4  # slots of so many different rooms are kept


class Captured(Eager):
    """Steps in CUDA graphs; on other devices the same without graphs, which is for tests."""

    def __init__(self, net: Seq2Seq, search: Search, **options: Any) -> None:
        """The options are those of `Eager`."""
        super().__init__(net, search, **options)
        self.longest = net.most_tokens
        self._kept: dict[int, Slots] = {}  # by their room
        self._record: Callable[[Callable[[], None]], Any] = Repeated
        if self.device.type == "cuda":
            self._record = Graphs(self.device)
            # It makes a plan for each new shape, which takes as long as hundreds of steps.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if why := self._obstacle():
            self._fall_back(why)

    def _frozen(self, net: Seq2Seq, precision: Precision, weights: str) -> Stepper:
        # The C kernels keep their own books of what is where.
        return net.frozen(linear.eager) if precision == "fp32" else super()._frozen(net, precision, weights)

    def _obstacle(self) -> str:
        """Why steps cannot be recorded, if that is known."""
        return "" if self.stepper.fixes else "the network's states change their shapes"

    def _fall_back(self, why: str) -> None:
        console.say(f"steps run one by one, not in CUDA graphs: {why}")
        self.eager = True
        self._kept.clear()

    eager = False  # whether everything is left to `Eager`

    def translate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Hypothesis]]]:
        if self.eager:
            yield from super().translate(requests)
            return
        # As in `Eager`, but only with others that need about as much room.
        queues: dict[int, deque[int]] = defaultdict(deque)
        for index in sorted(range(len(requests)), key=lambda index: -len(requests[index].source)):
            if requests[index].limit:
                queues[self._room(requests[index])].append(index)
            else:
                yield index, [Hypothesis((), 0.0, 0.0)]
        for room in sorted(queues, reverse=True):
            yield from self._pass(requests, queues[room], room)

    def _room(self, request: Request) -> int:
        """A power of two, unless the network has no room for it."""
        rounded = max(1 << (request.limit - 1).bit_length(), SMALLEST)
        return max(min(rounded, self.longest), request.limit)

    @torch.inference_mode()
    def _pass(
        self, requests: Sequence[Request], queue: deque[int], room: int
    ) -> Iterator[tuple[int, list[Hypothesis]]]:
        """All sentences of the queue, from the longest to the shortest."""
        slots = self._slots(requests, queue, room)
        few = max(math.ceil(COMPACT_AT * slots.size), 1)  # so many come together
        waiting = self._next(requests, queue, room, most=slots.size)
        left: tuple[list[int], Callable[[], Any]] | None = None  # who was done at the last look
        while waiting or slots.taken:
            if waiting is None:
                slots.gather()
            elif len(slots.free) >= len(waiting.indices):
                slots.put(waiting, requests)
                waiting = None
            slots.run(self)
            # While the device goes on, the host tells it what comes next, and reads the results of those who
            # have left.
            waiting = waiting or self._next(requests, queue, room, most=few)
            if left:
                yield from zip(left[0], self._results(left[1]()), strict=True)
            left = slots.let_out()
        if left:
            yield from zip(left[0], self._results(left[1]()), strict=True)

    def shrink(self) -> bool:
        self._kept.clear()
        return super().shrink()

    def _next(
        self, requests: Sequence[Request], queue: deque[int], room: int, *, most: int
    ) -> Underway | None:
        """Some sentences from the front of the queue, ready to be put into slots."""
        if not queue:
            return None
        indices = self._taken(requests, queue, most=most)
        return self._begun([requests[index] for index in indices], indices, room, fixed=True)

    def _slots(self, requests: Sequence[Request], queue: Sequence[int], room: int) -> Slots:
        """Free slots with this room, as many as there is use for; those of last time, if they will do."""
        widest = len(requests[queue[0]].source)
        most = min(self.batching.sentences, self.batching.tokens // max(widest, room), len(queue))
        kept = self._kept.pop(room, None)
        if kept is None or kept.size < most:
            kept = None  # so that its memory is free
            kept = self._new_slots(size=1 << (max(most, 1) - 1).bit_length(), room=room, width=widest)
        kept.clear()
        self._kept[room] = kept  # now the last that was used
        while len(self._kept) > KINDS:
            del self._kept[next(iter(self._kept))]
        return kept

    def _new_slots(self, *, size: int, room: int, width: int) -> Slots:
        """Slots filled with nothing that matters; fewer, if there is no memory for so many."""
        while True:
            nothing = [Request((self.eos,) * width, limit=1)] * size
            try:
                return Slots.of(self._begun(nothing, [-1] * size, room, fixed=True), room)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self._kept.clear()
                size //= 2

    def recorded(self, steps: Callable[[], None]) -> Any:
        """What replays this; None where it cannot be recorded."""
        try:
            return self._record(steps)
        except torch.OutOfMemoryError:
            raise  # then there is room for fewer sentences
        except RuntimeError as error:
            self._fall_back(str(error).splitlines()[0])
            return None
