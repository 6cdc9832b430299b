"""Batches of a prepared set up to a number of tokens, in an order that depends on (seed, epoch, step) alone.

No generator keeps a state between steps: a resumed run, or one with another number of processes, gets the
same batches at the same steps.
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
from trmt.sets.shards import PAIRS, SIDES, PreparedSet, RaggedArray, Split

PairNumbers = NDArray[Any]  # integers of a dtype that is as narrow as the corpus allows

PREFETCH = 4  # steps that are loaded ahead
WINDOW = 1 << 20  # pairs that are divided into batches at a time
PROBE_SEED = (0,)  # for batches that are loaded outside training, to measure memory and time
SAMPLED_PAIRS = 2000  # pairs from which the effect of subword sampling on lengths is estimated
SPARE_SENTENCES = 8  # sentences of a batch shape that are left for padding


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How pairs or passages make batches."""

    tokens: int = 4096  # tokens of the longer side in a batch, padding included if the network computes it
    accumulate: int = 1  # batches whose gradients are accumulated for one optimizer step
    passage_tokens: int = 128  # tokens of a passage of a document, special tokens included; for pretraining
    subword_alpha: float = 0.0  # subword sampling: the BPE-dropout rate, or alpha of a unigram model; 0: off

    def __post_init__(self) -> None:
        if self.passage_tokens < 8:
            raise ConfigError(
                f"batches.passage_tokens = {self.passage_tokens} is too few for two sentences; set at least 8"
            )
        if self.tokens < 1 or self.accumulate < 1 or not 0 <= self.subword_alpha < 1:
            raise ConfigError(
                "batches.tokens and batches.accumulate are at least 1, "
                "batches.subword_alpha is from 0 to below 1"
            )


@dataclass(frozen=True)
class RaggedBatch:
    """The examples of a batch as ragged columns, before an objective makes tensors of them."""

    columns: Mapping[str, RaggedArray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())).lengths)

    def slice(self, begin: int, end: int) -> RaggedBatch:
        """The examples from `begin` up to `end`."""

        def take(column: RaggedArray) -> RaggedArray:
            bounds = np.concatenate([[0], np.cumsum(column.lengths)])
            return RaggedArray(column.values[bounds[begin] : bounds[end]], column.lengths[begin:end])

        return RaggedBatch({name: take(column) for name, column in self.columns.items()})

    def halve(self) -> list[RaggedBatch]:
        """The batch in two halves, for when it does not fit into memory."""
        middle = len(self) // 2
        return [self.slice(0, middle), self.slice(middle, len(self))]

    def shard(self, rank: int, size: int) -> RaggedBatch:
        """The examples for one of `size` processes: every `size`-th, so that all have similar lengths."""

        def take(column: RaggedArray) -> RaggedArray:
            lengths = column.lengths[rank::size]
            begins = (np.cumsum(column.lengths) - column.lengths)[rank::size]
            shift = np.repeat(begins - (np.cumsum(lengths) - lengths), lengths)
            return RaggedArray(column.values[shift + np.arange(len(shift))], lengths)

        if size == 1:
            return self
        return RaggedBatch({name: take(column) for name, column in self.columns.items()})


class DataPosition(NamedTuple):
    """The next step of a run: number `step` of `epoch`."""

    epoch: int
    step: int


@dataclass(frozen=True)
class BatchShape:
    """The one shape that batches are padded to, for networks that are compiled for a shape."""

    source_tokens: int
    target_tokens: int
    sentences: int
    max_length: int  # tokens of a sentence

    def micro_batch(self, count: int) -> BatchShape:
        """The shape of one of `count` micro-batches, which differ a little in size."""
        if count == 1:
            return self
        source, target = (
            -(-side // count) + 2 * self.max_length for side in (self.source_tokens, self.target_tokens)
        )
        return BatchShape(source, target, -(-self.sentences // count) + SPARE_SENTENCES, self.max_length)


# (name of the column, its ids, seed) -> other segmentations of the same text
Resample = Callable[[str, RaggedArray, int], RaggedArray]


class Batches:
    """The batches of a split, epoch after epoch.

    For networks that compute padding, pairs of similar length form a batch. `padding_free` batches have
    random pairs in random order, and only their tokens count. `extra_columns` are loaded besides the ids.
    """

    def __init__(
        self,
        data: PreparedSet,
        config: BatchConfig,
        *,
        seed: int,
        split: str = "train",
        resample: Resample | None = None,
        padding_free: bool = False,
        extra_columns: Sequence[str] = (),
    ) -> None:
        self.data = data
        self.split: Split = data.split(split)
        self.extra_columns = self._existing(extra_columns)
        if not len(self.split):
            raise DataError(f"the {split} split of {data.folder} is empty; run trmt prepare with more data")
        self.config, self.seed, self.resample = config, seed, resample
        self._check_kind()
        self.source_lengths, self.target_lengths = map(_narrow, self._side_lengths())
        longer = np.maximum(self.source_lengths, self.target_lengths)
        self.lengths = _narrow(longer.astype(np.int32) + 1)  # with bos or eos
        self.corpus_weights = data.corpus_weights
        self.padding_free = padding_free
        self._cached_plan: tuple[int, list[list[PairNumbers]]] | None = None

    def _existing(self, columns: Sequence[str]) -> list[str]:
        """Those of the columns that the split has; the training split must have all."""
        known = {column.name for column in self.split.columns} if columns else set()
        missing = [name for name in columns if name not in known]
        if missing and self.split.name == "train":
            raise ConfigError(
                f"{self.data.folder} has no {missing[0]}s, which this recipe trains on; run trmt prepare "
                f"with --{missing[0]}s FILE"
            )
        return [name for name in columns if name in known]

    def _check_kind(self) -> None:
        if self.data.kind != PAIRS:
            raise ConfigError(
                f"{self.data.folder} has documents in one language, and this objective needs pairs; "
                "use trmt pretrain, or prepare pairs with --train"
            )

    def _side_lengths(self) -> Iterable[NDArray[Any]]:
        """The lengths of both sides of each example, or upper bounds of them."""
        return (self.split.lengths(f"{side}.ids") for side in SIDES)

    def plan(self, epoch: int) -> list[list[PairNumbers]]:
        """The steps of an epoch, each a list of `accumulate` batches of pair numbers."""
        # Read once: the prefetching thread may replace it with the plan of another epoch.
        cached = self._cached_plan
        if cached is None or cached[0] != epoch:
            batches = self._make_batches(self._epoch_pairs(epoch))
            order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(batches))
            shuffled = [batches[number] for number in order]
            size = self.config.accumulate
            steps = [shuffled[at : at + size] for at in range(0, len(shuffled), size)]
            self._cached_plan = cached = (epoch, steps)
        return cached[1]

    def _epoch_pairs(self, epoch: int) -> PairNumbers:
        """The pairs of an epoch in the order of batches; corpus weights repeat pairs or leave some out."""
        generator = np.random.default_rng([self.seed, epoch])
        # A narrow dtype, since the array has an entry for each pair of the corpus.
        dtype = np.int32 if len(self.source_lengths) < 1 << 31 else np.int64
        if (self.corpus_weights == 1).all():
            pairs = np.arange(len(self.source_lengths), dtype=dtype)
        else:
            weight = self.corpus_weights[self.split.scalars("corpus", np.arange(len(self.split)))]
            times = np.floor(weight + generator.random(len(weight))).astype(np.int64)
            pairs = np.repeat(np.arange(len(self.split), dtype=dtype), times)
        if not len(pairs):
            raise DataError("the corpus weights leave no pair in this epoch; raise them")
        generator.shuffle(pairs)
        if self.padding_free:
            return pairs
        return pairs[np.lexsort((self.source_lengths[pairs], self.target_lengths[pairs]))]

    @functools.cached_property
    def shape(self) -> BatchShape | None:
        """The shape that nearly all batches fit into; None if batches are padded to their longest pair."""
        if not self.padding_free:
            return None
        return self._max_shape(self._sampling_growth())

    def _sampling_growth(self) -> float:
        """The factor by which subword sampling increases the number of pieces, with a margin."""
        if not self.resample:
            return 1.0
        pairs = np.unique(np.linspace(0, len(self.split) - 1, SAMPLED_PAIRS, dtype=np.int64))
        stored, sampled = self.load(pairs), self.load(pairs, seed=PROBE_SEED)
        ratios = [
            (len(sampled.columns[name].values) + len(pairs)) / (len(column.values) + len(pairs))
            for name, column in stored.columns.items()
        ]
        return 1.03 * max(1.0, *ratios)

    def _max_shape(self, growth: float = 1.0) -> BatchShape:
        """The most that a padding-free batch may have, in the proportions of the corpus."""
        means = [float(side.mean()) + 1 for side in (self.source_lengths, self.target_lengths)]
        tokens, max_length = self.config.tokens, int(self.lengths.max())
        # A margin for the shorter side, whose share of a batch varies; multiples of 128 suit tensor cores.
        source, target = (
            int(growth * min(tokens, -(-int(tokens * mean / max(means) * 1.02) // 128) * 128))
            for mean in means
        )
        sentences = -(-int(tokens / max(means) * 1.05) // 64) * 64 + SPARE_SENTENCES
        # A single sentence may grow more than the average.
        return BatchShape(source, target, sentences, round(max_length * growth**2))

    def _make_batches(self, pairs: PairNumbers) -> list[PairNumbers]:
        """Consecutive pairs as batches of `config.tokens` at most; a longer pair is a batch of its own."""
        if self.padding_free:
            return self._make_padding_free_batches(pairs, self._max_shape())
        return self._make_padded_batches(pairs)

    def _make_padding_free_batches(self, pairs: PairNumbers, shape: BatchShape) -> list[PairNumbers]:
        batches: list[PairNumbers] = []
        max_pairs, begin = shape.sentences - SPARE_SENTENCES, 0
        while begin < len(pairs):
            window = pairs[begin : begin + max(WINDOW, 2 * max_pairs)]
            sides = self.source_lengths[window], self.target_lengths[window]
            totals = [np.cumsum(side.astype(np.int64) + 1) for side in sides]
            last = begin + len(window) == len(pairs)
            done = 0
            while done < len(window):
                end = done + max_pairs
                for total, tokens in zip(totals, (shape.source_tokens, shape.target_tokens), strict=True):
                    before = int(total[done - 1]) if done else 0
                    end = min(end, int(np.searchsorted(total, before + tokens, side="right")))
                end = max(end, done + 1)
                if end >= len(window) and not last:
                    break  # this batch may continue in the next window
                batches.append(window[done:end])
                done = end
            begin += done
        return batches

    def _make_padded_batches(self, pairs: PairNumbers) -> list[PairNumbers]:
        lengths, budget = self.lengths[pairs], self.config.tokens
        batches, begin = [], 0
        while begin < len(pairs):
            window = lengths[begin : begin + max(budget // int(lengths[begin]), 1)]
            cost = np.maximum.accumulate(window) * np.arange(1, len(window) + 1)
            size = max(int(np.searchsorted(cost, budget, side="right")), 1)
            batches.append(pairs[begin : begin + size])
            begin += size
        return batches

    def cost(self, pairs: PairNumbers) -> int:
        """The tokens of the longer side that a network computes for a batch of these pairs."""
        lengths = self.lengths[pairs]
        return int(lengths.sum(dtype=np.int64)) if self.padding_free else len(pairs) * int(lengths.max())

    def largest_batches(self) -> list[PairNumbers]:
        """The batches that need the most memory: with most tokens, with most pairs, with the longest pair."""
        plan = [pairs for step in self.plan(0) for pairs in step]

        def max_length(pairs: PairNumbers) -> int:
            return int(self.lengths[pairs].max())

        largest = (max(plan, key=self.cost), max(plan, key=len), max(plan, key=max_length))
        return list({id(pairs): pairs for pairs in largest}.values())

    def load(self, pairs: PairNumbers, *, seed: tuple[int, ...] = ()) -> RaggedBatch:
        """The batch of these pairs; with a `seed`, subwords are sampled."""
        columns = {}
        for number, side in enumerate(SIDES):
            name = f"{side}.ids"
            columns[name] = self.split.gather(name, pairs)
            if self.resample and seed:
                key = int(np.random.SeedSequence([self.seed, *seed, number]).generate_state(1)[0])
                columns[name] = self.resample(name, columns[name], key)
        for name in self.extra_columns:
            columns[name] = self.split.gather(name, pairs)
        return RaggedBatch(columns)

    def steps(self, start: DataPosition) -> Generator[tuple[DataPosition, list[RaggedBatch]]]:
        """(position after the step, its batches) without end from `start`, prefetched by a thread."""
        yield from _prefetch(self._load_steps(start), PREFETCH)

    def _load_steps(self, start: DataPosition) -> Iterator[tuple[DataPosition, list[RaggedBatch]]]:
        epoch, first = start
        while True:
            plan = self.plan(epoch)
            for step in range(first, len(plan)):
                loaded = [
                    self.load(pairs, seed=(epoch, step, number)) for number, pairs in enumerate(plan[step])
                ]
                last = step + 1 == len(plan)
                yield DataPosition(epoch + 1, 0) if last else DataPosition(epoch, step + 1), loaded
            epoch, first = epoch + 1, 0

    def iterate_once(self) -> Iterator[RaggedBatch]:
        """Every pair once, in batches of similar length: for validation."""
        order = np.lexsort((self.source_lengths, self.target_lengths))
        for pairs in self._make_batches(order.astype(np.int64)):
            yield self.load(pairs)


def _narrow(lengths: NDArray[Any]) -> NDArray[Any]:
    """The same numbers in two bytes each, if they fit."""
    return lengths.astype(np.uint16) if len(lengths) == 0 or int(lengths.max()) < (1 << 16) - 1 else lengths


@dataclass(frozen=True)
class _Failed:
    error: BaseException


def _prefetch(items: Iterator[Any], size: int) -> Iterator[Any]:
    """The same items, produced up to `size` ahead by a thread that ends when this generator is closed."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=size)
    stopped = threading.Event()

    def put(item: Any) -> bool:
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
                if not put(item):
                    return
        except BaseException as error:  # raised in the consumer
            put(_Failed(error))

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
