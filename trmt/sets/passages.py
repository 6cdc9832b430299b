"""Examples from documents in one language: passages of consecutive sentences.

A document is divided into passages once: the next passage begins where the previous one was full. With
`next_sentence`, a passage has two segments A and B, and every other time B is from another document (BERT,
arXiv 1810.04805). What is drawn depends on (seed, epoch, number of the passage) alone.

Columns of the examples: `first.ids` and `second.ids`, the segments; `sizes`, the length of each sentence of
A; `follows`, whether B continues A; `key`, a number of the example for the random draws of an objective.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trmt.errors import ConfigError
from trmt.sets.batches import BatchConfig, Batches, BatchShape, PairNumbers, RaggedBatch, Resample
from trmt.sets.shards import DOCUMENTS, PreparedSet, RaggedArray

SPECIALS = 3  # special tokens of a passage: bos, and eos after each segment
ATTEMPTS = 8  # to draw a sentence of another document

SentenceNumbers = NDArray[np.int64]


class Segments(NamedTuple):
    """For each passage the sentences of both segments, as (first, one after the last)."""

    first: tuple[SentenceNumbers, SentenceNumbers]
    second: tuple[SentenceNumbers, SentenceNumbers]
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
        padding_free: bool = False,
        next_sentence: bool = False,
    ) -> None:
        self.next_sentence = next_sentence
        self.max_pieces = config.passage_tokens - SPECIALS
        self._cached_segments: tuple[int, Segments] | None = None
        super().__init__(data, config, seed=seed, split=split, resample=resample, padding_free=padding_free)

    def _check_kind(self) -> None:
        if self.data.kind != DOCUMENTS:
            raise ConfigError(
                f"{self.data.folder} has pairs, and this objective needs documents in one language; "
                "prepare some with trmt prepare --documents, or use trmt train"
            )

    def _side_lengths(self) -> Iterable[NDArray[Any]]:
        # A sentence is cut to half of a passage, so that another one always fits beside it.
        self.max_sentence = self.max_pieces // 2 if self.next_sentence else self.max_pieces
        self.sizes = np.minimum(self.split.lengths("text.ids"), self.max_sentence).astype(np.int64)
        documents = self.split.scalars("document", np.arange(len(self.sizes)))
        self.document_ends = np.searchsorted(documents, documents, side="right")  # for each sentence
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)])
        if self.next_sentence and len(self.sizes) and int(self.document_ends[0]) == len(self.sizes):
            raise ConfigError(
                f"{self.data.folder} is one document, and loss.next_sentence = true needs others to take a "
                "wrong sentence from; put blank lines between documents, or set loss.next_sentence = false"
            )
        self.begins, self.ends = self._divide_documents()
        lengths = self.offsets[self.ends] - self.offsets[self.begins]
        # A segment of another document may be longer than the one it replaces, by less than a sentence.
        longest = int(self.sizes.max(initial=0)) if self.next_sentence else 0
        bound = np.minimum(lengths + longest, self.max_pieces) + SPECIALS - 1  # Batches adds one
        return bound, bound

    def _divide_documents(self) -> tuple[SentenceNumbers, SentenceNumbers]:
        """Where passages begin and end, in sentences."""
        begins = [0] if len(self.sizes) else []
        left, end = self.max_pieces, int(self.document_ends[0]) if begins else 0
        sentences = zip(self.sizes.tolist(), self.document_ends.tolist(), strict=True)
        for number, (size, document_end) in enumerate(sentences):
            if number == end or size > left:
                begins.append(number)
                left, end = self.max_pieces, document_end
            left -= size
        return np.array(begins, np.int64), np.array([*begins[1:], len(self.sizes)], np.int64)

    @cached_property
    def shape(self) -> BatchShape | None:
        """None: passages are not padded to one shape."""
        return None

    def segments(self, epoch: int) -> Segments:
        """The segments of all passages in an epoch."""
        cached = self._cached_segments  # read once: another thread may replace it
        if cached is None or cached[0] != epoch:
            self._cached_segments = cached = (epoch, self._draw_segments(epoch))
        return cached[1]

    def _draw_segments(self, epoch: int) -> Segments:
        begins, ends = self.begins, self.ends
        if not self.next_sentence:
            return Segments((begins, ends), (ends, ends), np.ones(len(begins), bool))
        generator = np.random.default_rng([self.seed, epoch, 2])
        count = ends - begins
        middle = begins + np.minimum(
            1 + (generator.random(len(begins)) * (count - 1)).astype(np.int64), count
        )
        follows = (generator.random(len(begins)) < 0.5) & (count > 1)
        other = self._draw_other_documents(begins, generator)
        wanted = self.offsets[ends] - self.offsets[middle]
        other_end = np.searchsorted(self.offsets, self.offsets[other] + wanted, side="right") - 1
        other_end = np.clip(other_end, other + 1, self.document_ends[other])
        second = np.where(follows, middle, other), np.where(follows, ends, other_end)
        return Segments((begins, middle), second, follows)

    def _draw_other_documents(
        self, begins: SentenceNumbers, generator: np.random.Generator
    ) -> SentenceNumbers:
        """For each passage a sentence of another document."""
        own, total = self.document_ends[begins], len(self.document_ends)
        found = generator.integers(total, size=len(begins))
        for _ in range(ATTEMPTS):
            same = self.document_ends[found] == own
            found[same] = generator.integers(total, size=int(same.sum()))
        # If one document is nearly everything: the first sentence after it, or of the set.
        return np.where(self.document_ends[found] == own, own % total, found)

    def load(self, pairs: PairNumbers, *, seed: tuple[int, ...] = ()) -> RaggedBatch:
        epoch = seed[0] if seed else 0
        segments = self.segments(epoch)
        chosen = np.asarray(pairs).astype(np.int64)
        first, sizes = self._load_segments(*(side[chosen] for side in segments.first), seed=(*seed, 0))
        second, _ = self._load_segments(*(side[chosen] for side in segments.second), seed=(*seed, 1))
        second = _truncate(second, self.max_pieces - first.lengths)
        ones = np.ones(len(chosen), np.int64)
        return RaggedBatch(
            {
                "first.ids": first,
                "second.ids": second,
                "sizes": sizes,
                "follows": RaggedArray(segments.follows[chosen].astype(np.int64), ones),
                "key": RaggedArray(_keys(self.seed, epoch, chosen), ones),
            }
        )

    def _load_segments(
        self, begins: SentenceNumbers, ends: SentenceNumbers, *, seed: tuple[int, ...]
    ) -> tuple[RaggedArray, RaggedArray]:
        """The text of each segment, and the lengths of its sentences."""
        counts = ends - begins
        sentences = np.repeat(begins - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        column = self.split.gather("text.ids", sentences)
        if self.resample and len(seed) > 1:
            key = int(np.random.SeedSequence([self.seed, *seed]).generate_state(1)[0])
            column = self.resample(f"{self.data.index['side']}.ids", column, key)
        column = _truncate(column, np.full(len(sentences), self.max_sentence))
        segment = np.repeat(np.arange(len(counts)), counts)
        lengths = np.bincount(segment, column.lengths, minlength=len(counts)).astype(np.int64)
        limit = np.full(len(counts), self.max_pieces - self.next_sentence)
        return _truncate(RaggedArray(column.values, lengths), limit), RaggedArray(column.lengths, counts)


def _truncate(column: RaggedArray, limits: NDArray[np.int64]) -> RaggedArray:
    """Each sequence cut to its limit."""
    if (column.lengths <= limits).all():
        return column
    starts = np.cumsum(column.lengths) - column.lengths
    positions = np.arange(len(column.values)) - np.repeat(starts, column.lengths)
    within = positions < np.repeat(limits, column.lengths)
    return RaggedArray(column.values[within], np.minimum(column.lengths, limits).astype(np.int64))


def _keys(seed: int, epoch: int, numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    base = np.random.SeedSequence([seed, epoch, 3]).generate_state(1, np.uint64).astype(np.uint64)
    return mix_bits((base + numbers.astype(np.uint64)).astype(np.uint64))


def mix_bits(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele et al., 2014), a hash of 64-bit integers."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
