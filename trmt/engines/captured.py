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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from trmt import console
from trmt.arch.base import Memory, Seq2Seq, State, Stepper
from trmt.decode.base import Hypothesis, Search
from trmt.engines import linear
from trmt.engines.base import Batching, Request
from trmt.engines.eager import COMPACT_AT, LOOK_EVERY, Eager, Underway
from trmt.kernels.products import Precision
from trmt.saved.lexicon import Lexicon
from trmt.sending import Fetched, sent

SMALLEST = 32  # tokens of the translations in the slots with the least room
KINDS = 4  # slots of so many different rooms are kept
# What masks rule out beside what is banned.
NOTHING, ENDS, ALL_BUT_PREFIXES = range(3)
Key = tuple[int, int, int, int]  # sentences, columns written, columns read, what masks rule out


class Captured(Eager):
    """Steps in CUDA graphs; on other devices the same without graphs, which is for tests."""

    def __init__(
        self,
        net: Seq2Seq,
        search: Search,
        *,
        bos: int,
        eos: int,
        banned: Collection[int] = (),
        batching: Batching = Batching(),
        precision: Precision = "fp32",
        weights: str = "",
        lexicon: Lexicon | None = None,
    ) -> None:
        super().__init__(
            net,
            search,
            bos=bos,
            eos=eos,
            banned=banned,
            batching=batching,
            precision=precision,
            weights=weights,
            lexicon=lexicon,
        )
        self.longest = net.most_tokens
        self._kept: dict[int, Slots] = {}  # by their room
        self._record: Callable[[Callable[[], None]], Any] = (
            Graphs() if self.device.type == "cuda" else Repeated
        )
        if why := self._obstacle():
            self._fall_back(why)

    def _frozen(self, net: Seq2Seq, precision: Precision, weights: str) -> Stepper:
        # The C kernels keep their own books of what is where.
        return net.frozen(linear.eager) if precision == "fp32" else super()._frozen(net, precision, weights)

    def _obstacle(self) -> str:
        """Why steps cannot be recorded, if that is known."""
        if self.lexicon is not None:
            return "with a shortlist, each batch reads out other columns"
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
        except RuntimeError as error:
            self._fall_back(str(error).splitlines()[0])
            return None


class Repeated:
    """Stands for a graph on devices that have none."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run


class Graphs:
    """Makes CUDA graphs, which share their memory, since they run one at a time and leave nothing there."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            run()
        return graph


@dataclass(frozen=True)
class Parts:
    """All that a step reads and writes."""

    tokens_SK: Tensor
    memory: Memory
    own: Any
    position_S: Tensor
    search_state: Any
    prefix_ST: Tensor
    least_S: Tensor

    @classmethod
    def of(cls, under: Underway) -> Parts:
        """Those of what is under way, which must not go on by itself."""
        memory, own, position_S = under.state.take()
        masks = under.masks
        return cls(
            under.tokens_SK, memory, own, position_S, under.search_state, masks.prefix_ST, masks.least_S
        )

    def front(self, sentences: int, columns: int, width: int) -> Parts:
        """A view of the first sentences, the first columns that were written, and so many that were read."""
        return Parts(
            self.tokens_SK[:sentences],
            self.memory.front(sentences, width),
            self.own.front(sentences, columns),
            self.position_S[:sentences],
            self.search_state.front(sentences),
            self.prefix_ST[:sentences],
            self.least_S[:sentences],
        )

    def under_way(self, like: Underway, *, room: int, masking: int = ALL_BUT_PREFIXES) -> Underway:
        """These parts, ready to go on."""
        # A sentence that waits to be taken away stays within its room.
        state = State(self.memory, self.own, self.position_S.clamp(max=room - 1))
        # To look for prefixes is to go through all scores.
        prefix_ST = self.prefix_ST if masking == ALL_BUT_PREFIXES else self.prefix_ST[:, :0]
        busy = int(masking != NOTHING)
        masks = replace(like.masks, prefix_ST=prefix_ST, least_S=self.least_S, busy=busy)
        indices = [-1] * len(self.tokens_SK)
        return Underway(indices, self.tokens_SK, state, self.search_state, masks, like.columns, like.width)

    def become(self, others: Parts) -> bool:
        """Take the others' values, and stay where they are; False if they do not fit."""
        pairs = list(zip(leaves(self), leaves(others), strict=True))
        if any(mine.shape != theirs.shape for mine, theirs in pairs):
            return False
        for mine, theirs in pairs:
            if mine is not theirs:
                mine.copy_(theirs)
        return True


def leaves(tree: Any) -> Iterator[Tensor]:
    """All tensors in a tree of dataclasses, mappings, tuples and lists, always in the same order."""
    parts: Any = ()
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        parts = tree.values()
    elif isinstance(tree, tuple | list):
        parts = tree
    elif is_dataclass(tree):
        parts = (getattr(tree, each.name) for each in fields(tree))
    for part in parts:
        yield from leaves(part)


def mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with other tensors."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {name: mapped(part, change) for name, part in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(mapped(part, change) for part in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{each.name: mapped(getattr(tree, each.name), change) for each in fields(tree)})
    return tree


@dataclass
class _Guest:
    """A sentence in a slot, as far as the host knows it."""

    index: int  # of its request
    limit: int
    width: int
    prefix: int  # tokens of it
    least: int
    age: int = 0

    @property
    def masking(self) -> int:
        """What masks rule out in its next step."""
        return ALL_BUT_PREFIXES if self.age < self.prefix else ENDS if self.age < self.least else NOTHING


@dataclass
class Slots:
    """Places for sentences, in memory that stays where it is, and the graphs that work on it."""

    parts: Parts
    like: Underway  # has what steps do not change
    room: int
    guests: list[_Guest | None]
    seen: set[Key] = field(default_factory=set)
    graphs: dict[Key, Any] = field(default_factory=dict)
    done: Fetched | None = None  # who is, after the steps that were run last

    @classmethod
    def of(cls, under: Underway, room: int) -> Slots:
        """As many slots as are under way."""
        size = len(under.indices)
        # Copies, since what begins alike may have begun as one tensor.
        parts: Parts = mapped(Parts.of(under), torch.clone)
        parts = replace(parts, prefix_ST=parts.prefix_ST.new_full((size, room), -1))
        parts.own.front(size, room)  # which takes up its space
        return cls(parts, under, room, [None] * size)

    @property
    def size(self) -> int:
        return len(self.guests)

    @property
    def free(self) -> list[int]:
        """The slots that nobody is in."""
        return [place for place, guest in enumerate(self.guests) if guest is None]

    @property
    def taken(self) -> list[int]:
        """The slots that somebody is in."""
        return [place for place, guest in enumerate(self.guests) if guest is not None]

    def clear(self) -> None:
        """Let everybody go."""
        self.guests = [None] * self.size

    def put(self, fresh: Underway, requests: Sequence[Request]) -> None:
        """These sentences, whose indices are those of `requests`, into free slots."""
        places = self.free[: len(fresh.indices)]
        for place, index in zip(places, fresh.indices, strict=True):
            request = requests[index]
            self.guests[place] = _Guest(
                index, request.limit, len(request.source), len(request.prefix), request.least
            )
        self._write(places, fresh)

    def _write(self, places: list[int], other: Underway) -> None:
        mine = self.parts.under_way(self.like, room=self.room)
        mine.replace(places, other)
        replaced = Parts.of(mine)
        if not self.parts.become(replaced):
            # Longer sources than ever before: other memory, for which nothing is recorded.
            self.parts = replaced
            self.graphs.clear()

    def gather(self) -> None:
        """Move sentences to the front where that leaves only half as many to compute, or fewer."""
        taken = self.taken
        enough = self._rounded(len(taken))
        if not taken or self._rounded(taken[-1] + 1) == enough:
            return
        movers = [place for place in taken if place >= enough]
        holes = [place for place in range(enough) if self.guests[place] is None][: len(movers)]
        moving = self.parts.under_way(self.like, room=self.room)
        moving.keep(movers)
        self._write(holes, moving)
        for hole, mover in zip(holes, movers, strict=True):
            self.guests[hole], self.guests[mover] = self.guests[mover], None

    def _rounded(self, sentences: int) -> int:
        return min(1 << (max(sentences, 1) - 1).bit_length(), self.size)

    def run(self, engine: Captured) -> None:
        """A few steps, for which nobody waits."""
        guests = [guest for guest in self.guests if guest]
        # Nobody needs more steps than those who may write the most.
        steps = max(min(LOOK_EVERY, max(guest.limit - guest.age for guest in guests)), 1)
        key = (
            self._rounded(self.taken[-1] + 1),
            min(rounded(max(guest.age for guest in guests) + steps), self.room),
            rounded(max(guest.width for guest in guests)),
            max(guest.masking for guest in guests),
        )
        self._replay(engine, key, steps)
        for guest in guests:
            guest.age += steps
        self.done = Fetched([self.parts.search_state.done_S])

    def _replay(self, engine: Captured, key: Key, steps: int) -> None:
        sentences, columns, width, masking = key
        parts = self.parts.front(sentences, columns, width)

        def step() -> None:
            under = parts.under_way(self.like, room=self.room, masking=masking)
            under.step(engine)
            fits = parts.become(replace(Parts.of(under), prefix_ST=parts.prefix_ST))
            assert fits, "a fixed state keeps its shapes"

        if key in self.seen and key not in self.graphs and not engine.eager:
            self.graphs[key] = engine.recorded(step)
        graph = self.graphs.get(key)
        for _ in range(steps):
            if graph:
                graph.replay()
            else:
                step()
        self.seen.add(key)

    def let_out(self) -> tuple[list[int], Callable[[], Any]] | None:
        """Wait for the steps that run; who is done leaves, with what the search has found."""
        assert self.done, "nothing was run"
        (done_S,) = self.done.there()
        done = done_S.tolist()
        places = [place for place in self.taken if done[place]]
        late = [guest for guest in self.guests if guest and guest.age >= guest.limit]
        assert len(late) <= len(places), "at its limit a sentence is done"
        if not places:
            return None
        indices = []
        for place in places:
            guest = self.guests[place]
            assert guest, "who is done was there"
            indices.append(guest.index)
            self.guests[place] = None
        found = self.parts.search_state.keep(sent(places, self.parts.tokens_SK.device))
        return indices, found.fetched()


def rounded(count: int) -> int:
    """The next of 16, 32, 48, 64, 96, 128, 192, ..."""
    power = max(1 << (count - 1).bit_length(), 16)
    return power * 3 // 4 if power > 32 and count <= power * 3 // 4 else power
