"""Token-budget batches from a prepared set; their order is a pure function of (seed, epoch, position).

Nothing here is drawn from a running generator: a resumed run, or one on another number of processes,
meets the same batches at the same positions.
"""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trmt.errors import ConfigError, DataError
from trmt.sets.shards import PAIRS, PreparedSet, Split

Indices = NDArray[Any]  # of whole numbers, as narrow as the corpus allows

READ_AHEAD = 4  # batches that wait ready
SIDES = ("source", "target")
WINDOW = 1 << 20  # pairs that are cut into batches at a time
TRIAL = (0,)  # the seed of what is drawn for a batch that is no step's
MEASURED = 2000  # pairs from which it is told how many pieces drawing makes
SPARE = 8  # sentences that a room always has left, for what fills it up


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How pairs are put together."""

    tokens: int = 4096  # of the longer side in one batch, padding included where a network computes it
    accumulate: int = 1  # batches whose gradients make one step
    passage: int = (
        128  # of documents: tokens of an example, which is made of sentences that follow each other
    )
    subword_alpha: float = 0.0  # subword sampling: dropout of merges for BPE, smoothing for unigram; 0 is off

    def __post_init__(self) -> None:
        if self.passage < 8:
            raise ConfigError(
                f"batches.passage = {self.passage} has no room for two sentences; set at least 8"
            )
        if self.tokens < 1 or self.accumulate < 1 or not 0 <= self.subword_alpha < 1:
            raise ConfigError(
                "batches.tokens and batches.accumulate are at least 1, "
                "batches.subword_alpha is from 0 to below 1"
            )


class Column(NamedTuple):
    """Sentences one after the other, and how long each is."""

    ids: NDArray[Any]
    lengths: NDArray[Any]


@dataclass(frozen=True)
class Examples:
    """The pairs of one batch: what an objective collates."""

    columns: Mapping[str, Column]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())).lengths)

    def part(self, begin: int, end: int) -> Examples:
        """The pairs from `begin` up to `end`."""

        def cut(column: Column) -> Column:
            bounds = np.concatenate([[0], np.cumsum(column.lengths)])
            return Column(column.ids[bounds[begin] : bounds[end]], column.lengths[begin:end])

        return Examples({name: cut(column) for name, column in self.columns.items()})

    def share(self, rank: int, size: int) -> Examples:
        """What one of `size` processes takes: every `size`-th pair, so that lengths stay alike."""

        def cut(column: Column) -> Column:
            lengths = column.lengths[rank::size]
            begins = (np.cumsum(column.lengths) - column.lengths)[rank::size]
            shift = np.repeat(begins - (np.cumsum(lengths) - lengths), lengths)
            return Column(column.ids[shift + np.arange(len(shift))], lengths)

        if size == 1:
            return self
        return Examples({name: cut(column) for name, column in self.columns.items()})


class Position(NamedTuple):
    """Where the data stands: the next step to take is number `step` of `epoch`."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Room:
    """What every batch of a plan fits into, for those who want all batches to be of one shape."""

    source: int  # tokens
    target: int
    sentences: int
    longest: int  # tokens of a sentence

    def part(self, parts: int) -> Room:
        """Room for one of so many parts of a batch, which are never quite equal."""
        if parts == 1:
            return self
        source, target = (-(-side // parts) + 2 * self.longest for side in (self.source, self.target))
        return Room(source, target, -(-self.sentences // parts) + SPARE, self.longest)


Resample = Callable[
    [str, Column, int], Column
]  # (column name, column, seed) -> other pieces of the same text


class Batches:
    """The training batches of a split, epoch after epoch.

    For networks that compute padding, pairs of like length come together. With `in_row` any pairs do, in
    random order, and the budget counts their tokens. `also` names columns to come along with the ids.
    """

    def __init__(
        self,
        data: PreparedSet,
        config: BatchConfig,
        *,
        seed: int,
        split: str = "train",
        resample: Resample | None = None,
        in_row: bool = False,
        also: Sequence[str] = (),
    ) -> None:
        self.data = data
        self.split: Split = data.split(split)
        self.also = self._there(also)
        if not len(self.split):
            raise DataError(f"the {split} split of {data.folder} is empty; run trmt prepare with more data")
        self.config, self.seed, self.resample = config, seed, resample
        self._check_kind()
        self.by_source, self.by_target = map(_small, self._sides())
        self.lengths = _small(np.maximum(self.by_source, self.by_target).astype(np.int32) + 1)
        self.weights = data.corpus_weights
        self.in_row = in_row
        self._planned: tuple[int, list[list[Indices]]] | None = None

    def _there(self, columns: Sequence[str]) -> list[str]:
        """Those of the columns, which belong to the training pairs, that the split has."""
        known = {column.name for column in self.split.columns} if columns else set()
        missing = [name for name in columns if name not in known]
        if missing and self.split.name == "train":
            raise ConfigError(
                f"{self.data.folder} has no {missing[0]}s, from which this run is to learn; run trmt prepare "
                f"with --{missing[0]}s FILE"
            )
        return [name for name in columns if name in known]

    def _check_kind(self) -> None:
        if self.data.kind != PAIRS:
            raise ConfigError(
                f"{self.data.folder} holds documents in one language, and this objective learns from pairs; "
                "use trmt pretrain, or prepare pairs with --train"
            )

    def _sides(self) -> Iterable[NDArray[Any]]:
        """How long each example is at most, on either side."""
        return (self.split.lengths(f"{side}.ids") for side in SIDES)

    def plan(self, epoch: int) -> list[list[Indices]]:
        """The steps of an epoch, each a list of `accumulate` batches of pair numbers."""
        # Read once: the thread that reads ahead may exchange it for another epoch's meanwhile.
        planned = self._planned
        if planned is None or planned[0] != epoch:
            batches = self._cut(self._chosen(epoch))
            order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(batches))
            shuffled = [batches[place] for place in order]
            size = self.config.accumulate
            steps = [shuffled[at : at + size] for at in range(0, len(shuffled), size)]
            self._planned = planned = (epoch, steps)
        return planned[1]

    def _chosen(self, epoch: int) -> Indices:
        """The pairs of an epoch, near ones alike in length; corpus weights repeat pairs or leave some out."""
        generator = np.random.default_rng([self.seed, epoch])
        # Every byte here is paid once for each pair of the corpus.
        kind = np.int32 if len(self.by_source) < 1 << 31 else np.int64
        if (self.weights == 1).all():
            pairs = np.arange(len(self.by_source), dtype=kind)
        else:
            weight = self.weights[self.split.scalars("corpus", np.arange(len(self.split)))]
            times = np.floor(weight + generator.random(len(weight))).astype(np.int64)
            pairs = np.repeat(np.arange(len(self.split), dtype=kind), times)
        if not len(pairs):
            raise DataError("the corpus weights leave no pair in this epoch; raise them")
        generator.shuffle(pairs)
        if self.in_row:
            return pairs
        return pairs[np.lexsort((self.by_source[pairs], self.by_target[pairs]))]

    @functools.cached_property
    def room(self) -> Room | None:
        """What each batch fits into, in proportion to the data; None where batches differ in length."""
        if not self.in_row:
            return None
        return self._budget(self._stretch())

    def _stretch(self) -> float:
        """How many times as many pieces there are once subwords are drawn, and a little more."""
        if not self.resample:
            return 1.0
        pairs = np.unique(np.linspace(0, len(self.split) - 1, MEASURED, dtype=np.int64))
        stored, drawn = self.load(pairs), self.load(pairs, seed=TRIAL)
        ratios = [
            (len(drawn.columns[name].ids) + len(pairs)) / (len(column.ids) + len(pairs))
            for name, column in stored.columns.items()
        ]
        return 1.03 * max(1.0, *ratios)

    def _budget(self, stretch: float = 1.0) -> Room:
        means = [float(side.mean()) + 1 for side in (self.by_source, self.by_target)]
        budget, longest = self.config.tokens, int(self.lengths.max())
        # A little more for the shorter side, whose share of a batch varies; sizes that tensor cores like.
        source, target = (
            int(stretch * min(budget, -(-int(budget * mean / max(means) * 1.02) // 128) * 128))
            for mean in means
        )
        sentences = -(-int(budget / max(means) * 1.05) // 64) * 64 + SPARE
        # One sentence may be stretched more than the whole.
        return Room(source, target, sentences, round(longest * stretch**2))

    def _cut(self, pairs: Indices) -> list[Indices]:
        """Runs of pairs as long as the budget allows; a pair over the budget stands alone."""
        return self._cut_rows(pairs, self._budget()) if self.in_row else self._cut_grids(pairs)

    def _cut_rows(self, pairs: Indices, room: Room) -> list[Indices]:
        batches: list[Indices] = []
        most, begin = room.sentences - SPARE, 0
        while begin < len(pairs):
            window = pairs[begin : begin + max(WINDOW, 2 * most)]
            sums = [np.cumsum(side[window].astype(np.int64) + 1) for side in (self.by_source, self.by_target)]
            last = begin + len(window) == len(pairs)
            done = 0
            while done < len(window):
                end = done + most
                for total, budget in zip(sums, (room.source, room.target), strict=True):
                    before = int(total[done - 1]) if done else 0
                    end = min(end, int(np.searchsorted(total, before + budget, side="right")))
                end = max(end, done + 1)
                if end >= len(window) and not last:
                    break  # this batch may go on in the next window
                batches.append(window[done:end])
                done = end
            begin += done
        return batches

    def _cut_grids(self, pairs: Indices) -> list[Indices]:
        lengths, budget = self.lengths[pairs], self.config.tokens
        batches, begin = [], 0
        while begin < len(pairs):
            window = lengths[begin : begin + max(budget // int(lengths[begin]), 1)]
            cost = np.maximum.accumulate(window) * np.arange(1, len(window) + 1)
            size = max(int(np.searchsorted(cost, budget, side="right")), 1)
            batches.append(pairs[begin : begin + size])
            begin += size
        return batches

    def cost(self, pairs: Indices) -> int:
        """The tokens that a network computes for these pairs, of the longer side."""
        lengths = self.lengths[pairs]
        return int(lengths.sum(dtype=np.int64)) if self.in_row else len(pairs) * int(lengths.max())

    def largest(self) -> list[Indices]:
        """The batches that take the most memory: that of most tokens, of most pairs, of the longest pairs."""
        plan = [pairs for step in self.plan(0) for pairs in step]

        def longest(pairs: Indices) -> int:
            return int(self.lengths[pairs].max())

        kinds = (max(plan, key=self.cost), max(plan, key=len), max(plan, key=longest))
        return list({id(pairs): pairs for pairs in kinds}.values())

    def load(self, pairs: Indices, *, seed: tuple[int, ...] = ()) -> Examples:
        """The pairs with these numbers; `seed` keys what is drawn for them."""
        columns = {}
        for number, name in enumerate(("source.ids", "target.ids")):
            ids, lengths = self.split.gather(name, pairs)
            column = Column(ids, lengths)
            if self.resample and seed:
                key = int(np.random.SeedSequence([self.seed, *seed, number]).generate_state(1)[0])
                column = self.resample(name, column, key)
            columns[name] = column
        for name in self.also:
            columns[name] = Column(*self.split.gather(name, pairs))
        return Examples(columns)

    def steps(self, start: Position) -> Generator[tuple[Position, list[Examples]]]:
        """(position after the step, its batches), for ever from `start`, read ahead by a thread."""
        yield from _ahead(self._steps(start), READ_AHEAD)

    def _steps(self, start: Position) -> Iterator[tuple[Position, list[Examples]]]:
        epoch, first = start
        while True:
            plan = self.plan(epoch)
            for step in range(first, len(plan)):
                loaded = [
                    self.load(pairs, seed=(epoch, step, place)) for place, pairs in enumerate(plan[step])
                ]
                after = Position(epoch, step + 1) if step + 1 < len(plan) else Position(epoch + 1, 0)
                yield after, loaded
            epoch, first = epoch + 1, 0

    def whole(self) -> Iterator[Examples]:
        """Every pair once, in batches of like length: for validation."""
        order = np.lexsort((self.by_source, self.by_target))
        for pairs in self._cut(order.astype(np.int64)):
            yield self.load(pairs)


def _small(lengths: NDArray[Any]) -> NDArray[Any]:
    """The same numbers in two bytes each, where they fit."""
    return lengths.astype(np.uint16) if len(lengths) == 0 or int(lengths.max()) < (1 << 16) - 1 else lengths


@dataclass(frozen=True)
class _Failed:
    error: BaseException


def _ahead(items: Iterator[Any], size: int) -> Iterator[Any]:
    """The same items, made by a thread that stays up to `size` ahead and ends when nobody listens."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=size)
    stopped = threading.Event()

    def offer(item: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not offer(item):
                    return
        except BaseException as error:  # handed over to the consumer, whatever it is
            offer(_Failed(error))

    thread = threading.Thread(target=work, name="trmt-batches", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join()


def halves(examples: Examples) -> list[Examples]:
    """The batch in two parts, for when it does not fit into memory."""
    middle = len(examples) // 2
    return [examples.part(0, middle), examples.part(middle, len(examples))]
