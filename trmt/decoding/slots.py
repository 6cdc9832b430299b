"""Slots for sentences, in memory that stays where it is, and the graphs that work on it.

Axes: S sentence, K hypothesis, T target position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trmt.decoding.eager import LOOK_EVERY, Masks, Underway
from trmt.decoding.engine import Request
from trmt.devices.transfer import HostCopy, to_device
from trmt.nets.base import Memory, State

if TYPE_CHECKING:
    from trmt.decoding.captured import Captured

# What masks rule out beside what is banned.
NOTHING, ENDS, ALL_BUT_PREFIXES = range(3)
Key = tuple[int, int, int, int]  # sentences, columns written, columns read, what masks rule out


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

    def under_way(self, like: Steady, *, room: int, masking: int = ALL_BUT_PREFIXES) -> Underway:
        """These parts, ready to go on."""
        # A sentence that waits to be taken away stays within its room.
        state = State(self.memory, self.own, self.position_S.clamp(max=room - 1))
        # To look for prefixes is to go through all scores.
        prefix_ST = self.prefix_ST if masking == ALL_BUT_PREFIXES else self.prefix_ST[:, :0]
        busy = int(masking != NOTHING)
        masks = replace(like.masks, prefix_ST=prefix_ST, least_S=self.least_S, busy=busy)
        indices = [-1] * len(self.tokens_SK)
        return Underway(indices, self.tokens_SK, state, self.search_state, masks, like.width)

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
class Steady:
    """What steps do not change, of what is under way."""

    masks: Masks
    width: int


@dataclass
class Slots:
    """Places for sentences, in memory that stays where it is, and the graphs that work on it."""

    parts: Parts
    like: Steady
    room: int
    guests: list[_Guest | None]
    seen: set[Key] = field(default_factory=set)
    graphs: dict[Key, Any] = field(default_factory=dict)
    done: HostCopy | None = None  # who is, after the steps that were run last

    @classmethod
    def of(cls, under: Underway, room: int) -> Slots:
        """As many slots as are under way."""
        size = len(under.indices)
        # Copies, since what begins alike may have begun as one tensor.
        parts: Parts = mapped(Parts.of(under), torch.clone)
        parts = replace(parts, prefix_ST=parts.prefix_ST.new_full((size, room), -1))
        parts.own.front(size, room)  # which takes up its space
        return cls(parts, Steady(under.masks, under.width), room, [None] * size)

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
            self.seen.clear()

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
        self.done = HostCopy([self.parts.search_state.done_S])

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
        (done_S,) = self.done.wait()
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
        found = self.parts.search_state.keep(to_device(places, self.parts.tokens_SK.device))
        return indices, found.fetched()


def rounded(count: int) -> int:
    """The next of 16, 32, 48, 64, 96, 128, 192, ..."""
    power = max(1 << (count - 1).bit_length(), 16)
    return power * 3 // 4 if power > 32 and count <= power * 3 // 4 else power
