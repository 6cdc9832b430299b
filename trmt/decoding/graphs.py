"""Runs the steps of a batch on a GPU without its host: steps are recorded once as CUDA graphs, and replayed.

A step of a small network is some two hundred kernels of microseconds, and launching each takes the host
longer than that. A graph is launched at once. It works on memory that stays where it is: slots for so many
sentences with space for so many tokens, all that a step reads and writes. Requests come into free slots and
leave them when they are done; the host synchronises every few steps.

How much of the slots a step computes is recorded with it: the first so many sentences, the first so many
target and source positions. So there is a graph for each combination of these, rounded up to a few sizes. The
first time one is needed its steps run one by one, since it may never be needed again; the second time it is
recorded. On other devices the same works without graphs, which is for tests.

Axes: S sentence, K hypothesis, T target position.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trmt import console
from trmt.decoding.base import Hypothesis
from trmt.decoding.batch import Batch, BatchDecoder
from trmt.decoding.direct import COMPACT_AT, SYNC_EVERY, DirectRunner
from trmt.decoding.masks import Masks
from trmt.decoding.request import Request
from trmt.devices.abilities import abilities
from trmt.devices.cuda_graphs import GraphRecorder
from trmt.devices.memory import is_out_of_memory
from trmt.devices.transfer import HostCopy, to_device
from trmt.errors import first_line
from trmt.nets.base import EncoderMemory, State

SMALLEST = 32  # tokens that the slots with the least space have
KEPT = 4  # slots of so many different sizes are kept
# What masks exclude beside what is banned.
NOTHING, ENDS, ALL_BUT_PREFIXES = range(3)
Size = tuple[
    int, int, int, int
]  # of a graph: sentences, target positions, source positions, what masks exclude


@dataclass(frozen=True)
class BatchTensors:
    """All that a step reads and writes, as static tensors."""

    tokens_SK: Tensor
    memory: EncoderMemory
    decoder: Any
    position_S: Tensor
    search_state: Any
    prefix_ST: Tensor
    min_tokens_S: Tensor

    @classmethod
    def of(cls, batch: Batch) -> BatchTensors:
        """Those of a batch, whose state is consumed."""
        masks = batch.masks
        state = batch.state.take()
        return cls(batch.tokens_SK, *state, batch.search_state, masks.prefix_ST, masks.min_tokens_S)

    def view(self, sentences: int, columns: int, source_length: int) -> BatchTensors:
        """A view of the first sentences, target positions and source positions."""
        return BatchTensors(
            self.tokens_SK[:sentences],
            self.memory.view(sentences, source_length),
            self.decoder.view(sentences, columns),
            self.position_S[:sentences],
            self.search_state.view(sentences),
            self.prefix_ST[:sentences],
            self.min_tokens_S[:sentences],
        )

    def batch(self, masks: Masks, *, max_tokens: int, excluded: int = ALL_BUT_PREFIXES) -> Batch:
        """A batch of these tensors."""
        # A finished sentence stays within the cache until it is removed.
        state = State(self.memory, self.decoder, self.position_S.clamp(max=max_tokens - 1))
        # Looking for prefixes reads all logits.
        prefix_ST = self.prefix_ST if excluded == ALL_BUT_PREFIXES else self.prefix_ST[:, :0]
        steps_left = int(excluded != NOTHING)
        masks = replace(masks, prefix_ST=prefix_ST, min_tokens_S=self.min_tokens_S, steps_left=steps_left)
        return Batch(self.tokens_SK, state, self.search_state, masks)

    def copy_from(self, other: BatchTensors) -> bool:
        """Take the other's values, and keep the memory; False if shapes differ."""
        pairs = list(zip(leaves(self), leaves(other), strict=True))
        if any(mine.shape != theirs.shape for mine, theirs in pairs):
            return False
        # A step may return views of what it was given, which must be read before that is overwritten.
        pairs = [(mine, theirs) for mine, theirs in pairs if mine is not theirs]
        overwritten = {storage_of(mine) for mine, _ in pairs}
        values = [theirs.clone() if storage_of(theirs) in overwritten else theirs for _, theirs in pairs]
        for (mine, _), value in zip(pairs, values, strict=True):
            mine.copy_(value)
        return True


def storage_of(tensor: Tensor) -> int:
    """The address of the memory that a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


def leaves(tree: Any) -> Iterator[Tensor]:
    """All tensors in a tree of dataclasses, mappings, tuples and lists, always in the same order."""
    children: Any = ()
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        children = tree.values()
    elif isinstance(tree, tuple | list):
        children = tree
    elif is_dataclass(tree):
        children = (getattr(tree, each.name) for each in fields(tree))
    for child in children:
        yield from leaves(child)


def mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with other tensors."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {name: mapped(child, change) for name, child in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(mapped(child, change) for child in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{each.name: mapped(getattr(tree, each.name), change) for each in fields(tree)})
    return tree


@dataclass
class Slot:
    """A request in a slot, and how many tokens it has, as far as the host knows."""

    request: Request
    tokens: int = 0

    @property
    def excluded(self) -> int:
        """What masks exclude in its next step."""
        if self.tokens < len(self.request.prefix):
            return ALL_BUT_PREFIXES
        return ENDS if self.tokens < self.request.min_tokens else NOTHING


@dataclass
class StaticSlots:
    """Slots for requests in static memory, and the graphs that work on it."""

    tensors: BatchTensors
    masks: Masks
    max_tokens: int
    slots: list[Slot | None]
    seen: set[Size] = field(default_factory=set)
    graphs: dict[Size, Any] = field(default_factory=dict)
    done: HostCopy | None = None  # which sentences are done, after the newest steps

    @classmethod
    def of(cls, batch: Batch, count: int, max_tokens: int) -> StaticSlots:
        """As many slots as the batch has sentences."""
        masks = batch.masks
        # Copies, since several tensors may share memory at first.
        tensors: BatchTensors = mapped(BatchTensors.of(batch), torch.clone)
        tensors = replace(tensors, prefix_ST=tensors.prefix_ST.new_full((count, max_tokens), -1))
        tensors.decoder.view(count, max_tokens)  # which allocates it
        return cls(tensors, masks, max_tokens, [None] * count)

    @property
    def free(self) -> list[int]:
        """The slots without a request."""
        return [index for index, slot in enumerate(self.slots) if slot is None]

    @property
    def taken(self) -> list[int]:
        """The slots with a request."""
        return [index for index, slot in enumerate(self.slots) if slot is not None]

    def put(self, requests: Sequence[Request], batch: Batch) -> None:
        """A batch that was started for these requests into free slots."""
        free = self.free[: len(requests)]
        for index, request in zip(free, requests, strict=True):
            self.slots[index] = Slot(request)
        self._write(free, batch)

    def _write(self, slots: list[int], batch: Batch) -> None:
        mine = self.tensors.batch(self.masks, max_tokens=self.max_tokens)
        mine.replace(to_device(slots, mine.tokens_SK.device), batch)
        replaced = BatchTensors.of(mine)
        if not self.tensors.copy_from(replaced):
            # Longer sources than ever before: other memory, for which nothing is recorded.
            self.tensors = replaced
            self.graphs.clear()
            self.seen.clear()

    def compact(self) -> None:
        """Move sentences to the front where that leaves only half as many to compute, or fewer."""
        taken = self.taken
        enough = self._rounded(len(taken))
        if not taken or self._rounded(taken[-1] + 1) == enough:
            return
        movers = [index for index in taken if index >= enough]
        holes = [index for index in range(enough) if self.slots[index] is None][: len(movers)]
        moving = self.tensors.batch(self.masks, max_tokens=self.max_tokens)
        moving.keep(to_device(movers, moving.tokens_SK.device))
        self._write(holes, moving)
        for hole, mover in zip(holes, movers, strict=True):
            self.slots[hole], self.slots[mover] = self.slots[mover], None

    def _rounded(self, sentences: int) -> int:
        return min(1 << (max(sentences, 1) - 1).bit_length(), len(self.slots))

    def run(
        self,
        step: Callable[[Batch], None],
        record: Callable[[Callable[[], None]], Any],
        failed: Callable[[Exception], None],
    ) -> None:
        """A few steps, for which the host does not wait; `record` makes a graph of one, or None.

        `failed` is told of a graph that cannot be replayed; without an error of its own, steps run directly.
        """
        slots = [slot for slot in self.slots if slot]
        # No request needs more steps than the one that may have the most tokens.
        steps = max(min(SYNC_EVERY, max(slot.request.max_tokens - slot.tokens for slot in slots)), 1)
        size = (
            self._rounded(self.taken[-1] + 1),
            min(rounded(max(slot.tokens for slot in slots) + steps), self.max_tokens),
            rounded(max(len(slot.request.source) for slot in slots)),
            max(slot.excluded for slot in slots),
        )
        self._replay(size, steps, step, record, failed)
        for slot in slots:
            slot.tokens += steps
        self.done = HostCopy([self.tensors.search_state.done_S])

    def _replay(
        self,
        size: Size,
        steps: int,
        step: Callable[[Batch], None],
        record: Callable[..., Any],
        failed: Callable[[Exception], None],
    ) -> None:
        sentences, columns, source_length, excluded = size
        tensors = self.tensors.view(sentences, columns, source_length)

        def one_step() -> None:
            batch = tensors.batch(self.masks, max_tokens=self.max_tokens, excluded=excluded)
            step(batch)
            fits = tensors.copy_from(replace(BatchTensors.of(batch), prefix_ST=tensors.prefix_ST))
            assert fits, "a static state keeps its shapes"

        if size in self.seen and size not in self.graphs:
            self.graphs[size] = record(one_step)
        graph = self.graphs.get(size)
        for _ in range(steps):
            if graph and not self._replayed(graph, failed):
                graph = None
            if not graph:
                one_step()
        self.seen.add(size)

    def _replayed(self, graph: Any, failed: Callable[[Exception], None]) -> bool:
        """Whether a graph could be launched; if not, none of them is used again."""
        try:
            graph.replay()
        except Exception as error:  # whatever the driver and PyTorch raise; then nothing has been launched
            failed(error)
            self.graphs.clear()
            return False
        return True

    def release(self) -> tuple[list[Request], Callable[[], Any]] | None:
        """Wait for the steps that run; the requests that are done, and what the search has found for them."""
        assert self.done, "nothing was run"
        (done_S,) = self.done.wait()
        done = done_S.tolist()
        finished = [index for index in self.taken if done[index]]
        late = [slot for slot in self.slots if slot and slot.tokens >= slot.request.max_tokens]
        assert len(late) <= len(finished), "at its limit a sentence is done"
        if not finished:
            return None
        requests = [slot.request for index in finished if (slot := self.slots[index])]
        for index in finished:
            self.slots[index] = None
        found = self.tensors.search_state.keep(to_device(finished, self.tensors.tokens_SK.device))
        return requests, found.fetched()


def rounded(count: int) -> int:
    """The next of 16, 32, 48, 64, 96, 128, 192, ..."""
    power = max(1 << (count - 1).bit_length(), 16)
    return power * 3 // 4 if power > 32 and count <= power * 3 // 4 else power


class GraphRunner:
    """Static slots whose steps are replayed; what cannot be recorded runs directly from then on."""

    def __init__(self, decoder: BatchDecoder, max_positions: int) -> None:
        self.decoder, self.max_positions = decoder, max_positions
        self.kept: dict[int, StaticSlots] = {}  # by their max_tokens
        self.record: Callable[[Callable[[], None]], Any] = Repeated
        self.direct: DirectRunner | None = None  # what runs instead
        self.waiting: tuple[list[Request], Batch] | None = None  # the batch that comes next
        self.left: tuple[list[Request], Callable[[], Any]] | None = None  # who was done at the last sync
        if decoder.device.type == "cuda":
            self.record = GraphRecorder(decoder.device)
        if not decoder.stepper.static:
            self._fall_back("the network's states change their shapes")
            console.say(f"steps run one by one, not in CUDA graphs: {self.why}")

    def _fall_back(self, why: str) -> None:
        self.why = why
        self.direct = DirectRunner(self.decoder)
        self.kept.clear()

    def queues(self, requests: Sequence[Request]) -> Iterator[tuple[deque[Request], int]]:
        """A queue for each rounded number of tokens that requests want."""
        if self.direct:
            yield from self.direct.queues(requests)
            return
        queues: dict[int, deque[Request]] = defaultdict(deque)
        for request in requests:
            queues[self._max_tokens(request)].append(request)
        for max_tokens in sorted(queues, reverse=True):
            yield queues[max_tokens], max_tokens

    def _max_tokens(self, request: Request) -> int:
        """A power of two, unless the network has fewer positions."""
        power = max(1 << (request.max_tokens - 1).bit_length(), SMALLEST)
        return max(min(power, self.max_positions), request.max_tokens)

    def open(self, queue: deque[Request], max_tokens: int) -> None:
        """Get ready for a queue: slots with this space, as many as there is use for."""
        self.current = self.direct  # a queue ends as it began
        if self.current:
            self.current.open(queue, max_tokens)
            return
        self.waiting = self.left = None
        self.max_tokens = max_tokens
        self.slots = self._slots(queue, max_tokens)
        self.few = max(math.ceil(COMPACT_AT * len(self.slots.slots)), 1)  # so many come together
        self.waiting = self._next(queue, len(self.slots.slots))

    def admit(self, queue: deque[Request]) -> bool:
        """Put the waiting batch into free slots; False when there is nothing left to decode."""
        if self.current:
            return self.current.admit(queue)
        if self.waiting is None:
            self.slots.compact()
        elif len(self.slots.free) >= len(self.waiting[0]):
            self.slots.put(*self.waiting)
            self.waiting = None
        return bool(self.slots.taken)

    def run(self, queue: deque[Request]) -> None:
        """Launch a few steps; while the device runs them, the host starts the batch that comes next."""
        if self.current:
            return self.current.run(queue)
        self.slots.run(self.decoder.step, self._recorded, self._failed)
        self.waiting = self.waiting or self._next(queue, self.few)
        return None

    def finished(self) -> Iterator[tuple[Request, list[Hypothesis]]]:
        """The results of those who were done at the last sync; then sync again."""
        if self.current:
            yield from self.current.finished()
            return
        yield from self.drain()
        self.left = self.slots.release()

    def drain(self) -> Iterator[tuple[Request, list[Hypothesis]]]:
        """The results of those who were done at the last sync."""
        if not self.current and self.left:
            requests, found = self.left
            self.left = None
            yield from zip(requests, self.decoder.results(found()), strict=True)

    def free(self) -> None:
        """Let go of memory."""
        self.kept.clear()
        self.waiting = self.left = None
        vars(self).pop("slots", None)
        if self.direct:
            self.direct.free()

    def _next(self, queue: deque[Request], most: int) -> tuple[list[Request], Batch] | None:
        """Some requests from the front of the queue, started, ready to be put into slots."""
        if not queue:
            return None
        requests = self.decoder.take(queue, most)
        return requests, self.decoder.start(requests, self.max_tokens, static=True)

    def _slots(self, queue: deque[Request], max_tokens: int) -> StaticSlots:
        """Free slots with this space; those of last time, if they will do."""
        longest, batching = len(queue[0].source), self.decoder.batching
        most = min(batching.sentences, batching.tokens // max(longest, max_tokens), len(queue))
        slots = self.kept.pop(max_tokens, None)
        if slots is None or len(slots.slots) < most:
            slots = None  # so that its memory is free
            slots = self._new_slots(1 << (max(most, 1) - 1).bit_length(), max_tokens, longest)
        slots.slots = [None] * len(slots.slots)
        self.kept[max_tokens] = slots  # now the last that was used
        while len(self.kept) > KEPT:
            del self.kept[next(iter(self.kept))]
        return slots

    def _new_slots(self, count: int, max_tokens: int, source_length: int) -> StaticSlots:
        """Slots filled with nothing that matters; fewer, if there is no memory for so many."""
        while True:
            nothing = [Request((self.decoder.eos,) * source_length, max_tokens=1)] * count
            try:
                return StaticSlots.of(self.decoder.start(nothing, max_tokens, static=True), count, max_tokens)
            except (MemoryError, RuntimeError) as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
            # Outside of the handler, because the error keeps the tensors of the failed attempt alive.
            self.kept.clear()
            count //= 2

    def _recorded(self, step: Callable[[], None]) -> Any:
        """What replays this; None where it cannot be recorded."""
        if self.direct:
            return None
        try:
            return self.record(step)
        except Exception as error:  # whatever the driver and PyTorch raise
            self._failed(error)
            return None

    def _failed(self, error: Exception) -> None:
        """Record and replay nothing from now on; with less memory there are fewer sentences instead."""
        if is_out_of_memory(error):
            raise error
        abilities(self.decoder.device).lose("graphs", error)
        self._fall_back(first_line(error))


class Repeated:
    """Stands for a graph on devices that have none."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run
