"""Subword sampling: the same text in other pieces, at random and yet alike in every process.

For BPE it is the dropout of Provilkov et al. (2020); for unigram models a draw among all ways to write the
text, in proportion to their probabilities raised to alpha (Kudo 2018). A sentence is cut into words. Each
word has a fixed number of candidates, drawn by generators that are keyed by the word and the candidate's
number, and a seed only chooses among them: nothing depends on what was drawn before, so all can be kept.
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

MARK = "\u2581"  # what sentencepiece writes for white space, and so the beginning of a word
CANDIDATES = 32  # for each word
LONGEST_WORD = 12  # in pieces; where no white space ends a word, it is cut
KEPT = 1 << 22  # candidates in memory, some 100 MB
KEPT_WORDS = 1 << 19  # whose candidates these are; their tables take as much again
NOTHING = -1  # behind the pieces of a word; where no candidate is drawn yet

Ids = NDArray[np.int64]
Table = NDArray[Any]


class Sampler:
    """Draws other pieces for sentences of ids; any number of threads may share it.

    `pieces` holds the text behind each id, or None for one that stays as it is and belongs to no word; the
    scores are those of the sentencepiece model, `alpha` is as in `Side.sample`.
    """

    def __init__(self, pieces: Sequence[str | None], scores: Sequence[float], *, alpha: float) -> None:
        self._pieces, self._alpha = pieces, alpha
        self._ids = {piece: token for token, piece in enumerate(pieces) if piece is not None}
        self._scores = {piece: scores[token] for piece, token in self._ids.items()}
        self._whole = np.array([piece is None for piece in pieces])
        self._begins = np.array([piece is None or piece.startswith(MARK) for piece in pieces])
        # The scores of BPE pieces count their merges; those of unigram pieces are log probabilities.
        by_merges = all(score == int(score) for score in self._scores.values())
        self._segment = merge_with_dropout if by_merges else draw_from_lattice
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._words: dict[bytes, int] = {}
        self._starts = np.empty((0, CANDIDATES), np.int32)  # of each word's candidates in the pool
        self._sizes = np.empty((0, CANDIDATES), np.int16)
        self._pool = np.empty(0, np.int32)
        self._used = self._kept = 0  # pieces in the pool, and how many candidates they are

    def sample(self, sentences: Sequence[Sequence[int]], *, seed: int) -> list[list[int]]:
        """The sentences in other pieces: a pure function of the model, alpha, the sentences and the seed."""
        flat = np.fromiter(chain.from_iterable(sentences), np.int64)
        lengths = np.fromiter(map(len, sentences), np.int64, len(sentences))
        ids, lengths = self.draw(flat, lengths, seed=seed)
        return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(lengths) else []

    def draw(self, ids: Ids, lengths: Ids, *, seed: int) -> tuple[Ids, Ids]:
        """The same for sentences one after the other and their lengths, without a loop over the words."""
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        begins = self._cut(ids, offsets[:-1])
        chosen = np.random.default_rng(seed).integers(CANDIDATES, size=len(begins))
        with self._lock:
            if self._kept > KEPT or len(self._words) > KEPT_WORDS:
                self._forget()
            words = self._known(ids, begins, chosen)
            starts, sizes = (table[words, chosen].astype(np.int64) for table in (self._starts, self._sizes))
            drawn = self._pool[_ranges(starts, sizes)].astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        return drawn, np.diff(ends[np.searchsorted(begins, offsets)])

    def _cut(self, ids: Ids, sentences: Ids) -> Ids:
        """Where words begin, given where sentences do."""
        begins = self._begins[ids]
        begins[1:] |= self._whole[ids[:-1]]
        begins[sentences[sentences < len(ids)]] = True
        places = np.arange(len(ids))
        since = places - np.maximum.accumulate(np.where(begins, places, 0))
        return np.flatnonzero(since % LONGEST_WORD == 0)

    def _known(self, ids: Ids, begins: Ids, chosen: Ids) -> Ids:
        """The number of each word, whose chosen candidate is in the pool from now on."""
        sizes = np.diff(begins, append=len(ids))
        rows = np.full((len(begins), LONGEST_WORD), NOTHING, np.int32)
        columns = np.arange(len(ids)) - np.repeat(begins, sizes)
        rows[np.repeat(np.arange(len(begins)), sizes), columns] = ids
        keys: list[bytes] = rows.view(f"V{rows.itemsize * LONGEST_WORD}").ravel().tolist()
        words = np.array([self._words.setdefault(key, len(self._words)) for key in keys], np.int64)
        self._starts = _with_room(self._starts, len(self._words), fill=NOTHING)
        self._sizes = _with_room(self._sizes, len(self._words))
        for place in np.flatnonzero(self._starts[words, chosen] == NOTHING).tolist():
            word, number = int(words[place]), int(chosen[place])
            if self._starts[word, number] == NOTHING:  # it may stand in the batch twice
                pieces = rows[place, : sizes[place]].tolist()
                self._keep(word, number, self._drawn(number, pieces))
        return words

    def _keep(self, word: int, number: int, candidate: Sequence[int]) -> None:
        end = self._used + len(candidate)
        self._pool = _with_room(self._pool, end)
        self._pool[self._used : end] = candidate
        self._starts[word, number], self._sizes[word, number] = self._used, len(candidate)
        self._used, self._kept = end, self._kept + 1

    def _drawn(self, number: int, word: Sequence[int]) -> Sequence[int]:
        """The candidate of this number for a word."""
        texts = [piece for token in word if (piece := self._pieces[token]) is not None]
        if not texts:
            return word
        text = "".join(texts)
        # A string is hashed in full for the seed, and not by hash(), which differs between processes.
        generator = random.Random(f"{number} {text}")
        segments = self._segment(text, self._scores, self._alpha, generator)
        # A model with a small coverage may lack single characters; then the word stays as it is.
        known = all(segment in self._ids for segment in segments)
        return [self._ids[segment] for segment in segments] if known else word


def _ranges(starts: Ids, sizes: Ids) -> Ids:
    """`start, start + 1, ...` of each, `size` of them, one after the other."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


def _with_room(array: Table, size: int, *, fill: int = 0) -> Table:
    """The array with room for `size` rows; it doubles, so that growing costs little."""
    if size <= len(array):
        return array
    more = np.full((max(size, 2 * len(array)) - len(array), *array.shape[1:]), fill, array.dtype)
    return np.concatenate([array, more])


def merge_with_dropout(
    text: str, scores: Mapping[str, float], alpha: float, generator: random.Random
) -> list[str]:
    """The characters merged, the best pair first, where each step overlooks a pair by chance `alpha`."""
    symbols = list(text)
    while True:
        merges = [
            (-score, place)
            for place, (left, right) in enumerate(pairwise(symbols))
            if (score := scores.get(left + right)) is not None and generator.random() >= alpha
        ]
        if not merges:
            return symbols
        place = min(merges)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]


def draw_from_lattice(
    text: str, scores: Mapping[str, float], alpha: float, generator: random.Random
) -> list[str]:
    """A way to write the text in pieces, drawn with weights of exp(alpha * the sum of its scores)."""
    arrivals: list[list[tuple[int, float]]] = [[]]  # for each end: where its last piece may begin, log weight
    totals = [0.0]  # log of the summed weights of all ways up to here
    for end in range(1, len(text) + 1):
        arcs = [
            (begin, totals[begin] + alpha * score)
            for begin in range(end)
            if (score := scores.get(text[begin:end])) is not None and totals[begin] > -math.inf
        ]
        top = max((weight for _, weight in arcs), default=-math.inf)
        totals.append(top + math.log(sum(math.exp(weight - top) for _, weight in arcs)) if arcs else top)
        arrivals.append(arcs)
    assert arrivals[-1], "text made of pieces can be written in pieces"
    segments: list[str] = []
    end = len(text)
    while end:
        weights = [math.exp(weight - totals[end]) for _, weight in arrivals[end]]
        [(begin, _)] = generator.choices(arrivals[end], weights)
        segments.append(text[begin:end])
        end = begin
    return segments[::-1]
