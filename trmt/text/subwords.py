"""Subword sampling: random segmentations of a text that are the same in every process.

For BPE it is BPE-dropout (Provilkov et al. 2020); for unigram models a segmentation is drawn in proportion to
its probability raised to alpha (subword regularization, Kudo 2018). A sentence is split into words. Each word
has a fixed number of candidate segmentations, drawn by generators seeded with the word and the number of the
candidate, and the seed of a call only chooses among them: candidates do not depend on earlier draws and can
be cached.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD_MARK = "\u2581"  # sentencepiece's sign for white space, which begins a word
CANDIDATES = 32  # segmentations of each word
MAX_WORD_PIECES = 12  # longer words, as in text without white space, are split
CACHED_CANDIDATES = 1 << 22  # some 100 MB
CACHED_WORDS = 1 << 19  # their tables take as much again
EMPTY = -1  # fills the key of a word up to MAX_WORD_PIECES; the start of a candidate that is not drawn yet

IdArray = NDArray[np.int64]


class Sampler:
    """Draws segmentations of sentences given as ids; threads may share it.

    `pieces` has the text of each id, or None for an id that is never changed and belongs to no word; the
    scores are those of the sentencepiece model, `alpha` is as in `Side.sample`.
    """

    def __init__(self, pieces: Sequence[str | None], scores: Sequence[float], *, alpha: float) -> None:
        self._pieces, self._alpha = pieces, alpha
        self._ids = {piece: token for token, piece in enumerate(pieces) if piece is not None}
        self._scores = {piece: scores[token] for piece, token in self._ids.items()}
        self._fixed = np.array([piece is None for piece in pieces])
        self._begins_word = np.array([piece is None or piece.startswith(WORD_MARK) for piece in pieces])
        # The scores of BPE pieces are merge ranks; those of unigram pieces are log probabilities.
        by_merges = all(score == int(score) for score in self._scores.values())
        self._segment = merge_with_dropout if by_merges else draw_from_lattice
        self._lock = threading.Lock()
        self._clear_cache()

    def _clear_cache(self) -> None:
        self._words: dict[bytes, int] = {}
        self._starts = np.empty((0, CANDIDATES), np.int32)  # of each word's candidates in the pool
        self._sizes = np.empty((0, CANDIDATES), np.int16)
        self._pool = np.empty(0, np.int32)
        self._used = self._cached = 0  # pieces and candidates in the pool

    def sample(self, sentences: Sequence[Sequence[int]], *, seed: int) -> list[list[int]]:
        """The sentences segmented anew: a pure function of the model, alpha, the sentences and the seed."""
        flat = np.fromiter(chain.from_iterable(sentences), np.int64)
        lengths = np.fromiter(map(len, sentences), np.int64, len(sentences))
        ids, lengths = self.draw(flat, lengths, seed=seed)
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(lengths) else []

    def draw(self, ids: IdArray, lengths: IdArray, *, seed: int) -> tuple[IdArray, IdArray]:
        """The same for concatenated sentences and their lengths, without a loop over the words."""
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        begins = self._split_words(ids, offsets[:-1])
        chosen = np.random.default_rng(seed).integers(CANDIDATES, size=len(begins))
        with self._lock:
            if self._cached > CACHED_CANDIDATES or len(self._words) > CACHED_WORDS:
                self._clear_cache()
            words = self._cached_words(ids, begins, chosen)
            starts, sizes = (table[words, chosen].astype(np.int64) for table in (self._starts, self._sizes))
            drawn = self._pool[_ranges(starts, sizes)].astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        return drawn, np.diff(ends[np.searchsorted(begins, offsets)])

    def _split_words(self, ids: IdArray, sentences: IdArray) -> IdArray:
        """Where words begin, given where sentences begin."""
        begins = self._begins_word[ids]
        begins[1:] |= self._fixed[ids[:-1]]
        begins[sentences[sentences < len(ids)]] = True
        positions = np.arange(len(ids))
        since_begin = positions - np.maximum.accumulate(np.where(begins, positions, 0))
        return np.flatnonzero(since_begin % MAX_WORD_PIECES == 0)

    def _cached_words(self, ids: IdArray, begins: IdArray, chosen: IdArray) -> IdArray:
        """The number of each word in the cache, after its chosen candidate was added to the pool."""
        sizes = np.diff(begins, append=len(ids))
        rows = np.full((len(begins), MAX_WORD_PIECES), EMPTY, np.int32)
        columns = np.arange(len(ids)) - np.repeat(begins, sizes)
        rows[np.repeat(np.arange(len(begins)), sizes), columns] = ids
        keys: list[bytes] = rows.view(f"V{rows.itemsize * MAX_WORD_PIECES}").ravel().tolist()
        words = np.array([self._words.setdefault(key, len(self._words)) for key in keys], np.int64)
        self._starts = _grow(self._starts, len(self._words), fill=EMPTY)
        self._sizes = _grow(self._sizes, len(self._words))
        for row in np.flatnonzero(self._starts[words, chosen] == EMPTY).tolist():
            word, number = int(words[row]), int(chosen[row])
            if self._starts[word, number] == EMPTY:  # the batch may have it twice
                pieces = rows[row, : sizes[row]].tolist()
                self._cache(word, number, self._draw_candidate(number, pieces))
        return words

    def _cache(self, word: int, number: int, candidate: Sequence[int]) -> None:
        end = self._used + len(candidate)
        self._pool = _grow(self._pool, end)
        self._pool[self._used : end] = candidate
        self._starts[word, number], self._sizes[word, number] = self._used, len(candidate)
        self._used, self._cached = end, self._cached + 1

    def _draw_candidate(self, number: int, word: Sequence[int]) -> Sequence[int]:
        """The candidate of this number for a word."""
        texts = [piece for token in word if (piece := self._pieces[token]) is not None]
        if not texts:
            return word
        text = "".join(texts)
        # Seeding with a string does not use hash(), which differs between processes.
        generator = random.Random(f"{number} {text}")
        segments = self._segment(text, self._scores, self._alpha, generator)
        # A model with a small coverage may lack single characters; then the word is not changed.
        known = all(segment in self._ids for segment in segments)
        return [self._ids[segment] for segment in segments] if known else word


def _ranges(starts: IdArray, sizes: IdArray) -> IdArray:
    """`start, ..., start + size - 1` for each start and size, concatenated."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


def _grow(array: NDArray[Any], size: int, *, fill: int = 0) -> NDArray[Any]:
    """The array with at least `size` rows; a longer one has at least twice as many as before."""
    if size <= len(array):
        return array
    more = np.full((max(size, 2 * len(array)) - len(array), *array.shape[1:]), fill, array.dtype)
    return np.concatenate([array, more])


def merge_with_dropout(
    text: str, scores: Mapping[str, float], alpha: float, generator: random.Random
) -> list[str]:
    """BPE merges from characters, the best pair first; each step drops a pair with probability `alpha`."""
    symbols = list(text)
    while True:
        merges = [
            (-score, index)
            for index, (left, right) in enumerate(pairwise(symbols))
            if (score := scores.get(left + right)) is not None and generator.random() >= alpha
        ]
        if not merges:
            return symbols
        index = min(merges)[1]
        symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]


def draw_from_lattice(
    text: str, scores: Mapping[str, float], alpha: float, generator: random.Random
) -> list[str]:
    """A segmentation of the text, drawn with the weight exp(alpha * sum of the scores of its pieces)."""
    arrivals: list[list[tuple[int, float]]] = [[]]  # for each end: where its last piece may begin, log weight
    totals = [0.0]  # log of the summed weights of all segmentations up to each end
    for end in range(1, len(text) + 1):
        arcs = [
            (begin, totals[begin] + alpha * score)
            for begin in range(end)
            if (score := scores.get(text[begin:end])) is not None and totals[begin] > -math.inf
        ]
        top = max((weight for _, weight in arcs), default=-math.inf)
        totals.append(top + math.log(sum(math.exp(weight - top) for _, weight in arcs)) if arcs else top)
        arrivals.append(arcs)
    assert arrivals[-1], "text made of pieces has a segmentation"
    segments: list[str] = []
    end = len(text)
    while end:
        weights = [math.exp(weight - totals[end]) for _, weight in arrivals[end]]
        [(begin, _)] = generator.choices(arrivals[end], weights)
        segments.append(text[begin:end])
        end = begin
    return segments[::-1]
