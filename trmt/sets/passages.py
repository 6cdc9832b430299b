"""Examples from documents in one language: passages of sentences that follow each other.

A document is cut into passages once, the next one beginning where the last one was full. With `pairs`, each
passage comes in two parts, and every other time the second is taken from another document. What is drawn is a
pure function of (seed, epoch, number of the passage).

Columns of the examples: `first.ids` and `second.ids`, the parts; `sizes`, how long each sentence is;
`follows`, whether the second part does; `key`, a number of its own for whatever an objective draws.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trmt.errors import ConfigError
from trmt.sets.batches import BatchConfig, Batches, Column, Examples, Indices, Resample, Room
from trmt.sets.shards import DOCUMENTS, PreparedSet

SPECIALS = 3  # tokens of a passage that are no text: one before it, one behind each part
TRIES = 8  # to draw a sentence of another document

Ints = NDArray[np.int64]


class Drawn(NamedTuple):
    """For each passage the sentences of both parts, from the first up to the one behind the last."""

    first: tuple[Ints, Ints]
    second: tuple[Ints, Ints]
    follows: NDArray[np.bool_]


class Passages(Batches):
    """The passages of a split of documents, epoch after epoch."""

    def __init__(
        self,
        data: PreparedSet,
        config: BatchConfig,
        *,
        seed: int,
        split: str = "train",
        resample: Resample | None = None,
        in_row: bool = False,
        pairs: bool = False,
    ) -> None:
        self.pairs = pairs
        self.space = config.passage - SPECIALS
        self._epoch: tuple[int, Drawn] | None = None
        super().__init__(data, config, seed=seed, split=split, resample=resample, in_row=in_row)

    def _check_kind(self) -> None:
        if self.data.kind != DOCUMENTS:
            raise ConfigError(
                f"{self.data.folder} holds pairs, and this objective learns from documents in one language; "
                "prepare some with trmt prepare --documents, or use trmt train"
            )

    def _sides(self) -> Iterable[NDArray[Any]]:
        # A sentence alone may fill half of a passage, so that another one always fits beside it.
        self.most = self.space // 2 if self.pairs else self.space
        self.sizes = np.minimum(self.split.lengths("text.ids"), self.most).astype(np.int64)
        documents = self.split.scalars("document", np.arange(len(self.sizes)))
        self.ends = np.searchsorted(documents, documents, side="right")  # of each sentence's document
        self.before = np.concatenate([[0], np.cumsum(self.sizes)])
        if self.pairs and len(self.ends) and int(self.ends[0]) == len(self.ends):
            raise ConfigError(
                f"{self.data.folder} is one document, and loss.next_sentence = true needs others to take a "
                "wrong sentence from; put blank lines between documents, or set loss.next_sentence = false"
            )
        self.begins, self.stops = self._cut_documents()
        lengths = self.before[self.stops] - self.before[self.begins]
        # A part from another document may be longer than what it stands for, by less than a sentence.
        longest = int(self.sizes.max(initial=0)) if self.pairs else 0
        bound = np.minimum(lengths + longest, self.space) + SPECIALS - 1  # batches add one
        return bound, bound

    def _cut_documents(self) -> tuple[Ints, Ints]:
        """Where passages begin and end, in sentences."""
        begins = [0] if len(self.sizes) else []
        room, end = self.space, int(self.ends[0]) if begins else 0
        for place, (size, document_end) in enumerate(
            zip(self.sizes.tolist(), self.ends.tolist(), strict=True)
        ):
            if place == end or size > room:
                begins.append(place)
                room, end = self.space, document_end
            room -= size
        return np.array(begins, np.int64), np.array([*begins[1:], len(self.sizes)], np.int64)

    @cached_property
    def room(self) -> Room | None:
        """Passages are not filled up to one shape."""
        return None

    def drawn(self, epoch: int) -> Drawn:
        """The parts of all passages in an epoch."""
        kept = self._epoch  # read once: another thread may exchange it meanwhile
        if kept is None or kept[0] != epoch:
            self._epoch = kept = (epoch, self._draw(epoch))
        return kept[1]

    def _draw(self, epoch: int) -> Drawn:
        begins, stops = self.begins, self.stops
        if not self.pairs:
            return Drawn((begins, stops), (stops, stops), np.ones(len(begins), bool))
        generator = np.random.default_rng([self.seed, epoch, 2])
        count = stops - begins
        middle = begins + np.minimum(
            1 + (generator.random(len(begins)) * (count - 1)).astype(np.int64), count
        )
        follows = (generator.random(len(begins)) < 0.5) & (count > 1)
        other = self._elsewhere(begins, generator)
        wanted = self.before[stops] - self.before[middle]
        other_stop = np.searchsorted(self.before, self.before[other] + wanted, side="right") - 1
        other_stop = np.clip(other_stop, other + 1, self.ends[other])
        second = np.where(follows, middle, other), np.where(follows, stops, other_stop)
        return Drawn((begins, middle), second, follows)

    def _elsewhere(self, begins: Ints, generator: np.random.Generator) -> Ints:
        """For each passage a sentence of another document."""
        mine = self.ends[begins]
        found = generator.integers(len(self.ends), size=len(begins))
        for _ in range(TRIES):
            same = self.ends[found] == mine
            found[same] = generator.integers(len(self.ends), size=int(same.sum()))
        # One document may be nearly everything: then what comes behind it, or stands at the very beginning.
        return np.where(self.ends[found] == mine, mine % len(self.ends), found)

    def load(self, pairs: Indices, *, seed: tuple[int, ...] = ()) -> Examples:
        epoch = seed[0] if seed else 0
        drawn = self.drawn(epoch)
        chosen = np.asarray(pairs).astype(np.int64)
        first, sizes = self._part(*(side[chosen] for side in drawn.first), seed=(*seed, 0))
        second, _ = self._part(*(side[chosen] for side in drawn.second), seed=(*seed, 1))
        second = _shortened(second, self.space - first.lengths)
        ones = np.ones(len(chosen), np.int64)
        return Examples(
            {
                "first.ids": first,
                "second.ids": second,
                "sizes": sizes,
                "follows": Column(drawn.follows[chosen].astype(np.int64), ones),
                "key": Column(_keys(self.seed, epoch, chosen), ones),
            }
        )

    def _part(self, begins: Ints, stops: Ints, *, seed: tuple[int, ...]) -> tuple[Column, Column]:
        """The text of these runs of sentences, and how long each sentence is."""
        counts = stops - begins
        sentences = np.repeat(begins - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        column = Column(*self.split.gather("text.ids", sentences))
        if self.resample and len(seed) > 1:
            key = int(np.random.SeedSequence([self.seed, *seed]).generate_state(1)[0])
            column = self.resample(f"{self.data.index['side']}.ids", column, key)
        column = _shortened(column, np.full(len(sentences), self.most))
        run = np.repeat(np.arange(len(counts)), counts)
        lengths = np.bincount(run, column.lengths, minlength=len(counts)).astype(np.int64)
        whole = _shortened(Column(column.ids, lengths), np.full(len(counts), self.space - self.pairs))
        return whole, Column(column.lengths, counts)


def _shortened(column: Column, most: Ints) -> Column:
    """Each run without what is beyond so many values."""
    if (column.lengths <= most).all():
        return column
    starts = np.cumsum(column.lengths) - column.lengths
    place = np.arange(len(column.ids)) - np.repeat(starts, column.lengths)
    return Column(
        column.ids[place < np.repeat(most, column.lengths)], np.minimum(column.lengths, most).astype(np.int64)
    )


def _keys(seed: int, epoch: int, numbers: Ints) -> NDArray[np.uint64]:
    base = np.random.SeedSequence([seed, epoch, 3]).generate_state(1, np.uint64).astype(np.uint64)
    return mixed((base + numbers.astype(np.uint64)).astype(np.uint64))


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele et al., 2014): near numbers become unlike ones."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
