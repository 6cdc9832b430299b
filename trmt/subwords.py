"""Subword sampling: the same text in other pieces, at random and yet alike in every process.

For BPE it is the dropout of Provilkov et al. (2020); for unigram models a draw among all ways to write the
text, in proportion to their probabilities raised to alpha (Kudo 2018). A sentence is cut into words. Each
word has a fixed number of candidates, drawn by generators that are keyed by the word and the candidate's
number, and a seed only chooses among them: nothing depends on what was drawn before, so all can be kept.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

MARK = "\u2581"  # what sentencepiece writes for white space, and so the beginning of a word
CANDIDATES = 32  # for each word
LONGEST_WORD = 12  # in pieces; where no white space ends a word, it is cut
KEPT = 1 << 18  # candidates in memory, some 100 MB


class Sampler:
    """Draws other pieces for sentences of ids.

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
        self._candidate = lru_cache(KEPT)(self._drawn)

    def sample(self, sentences: Sequence[Sequence[int]], *, seed: int) -> list[list[int]]:
        """The sentences in other pieces: a pure function of the model, alpha, the sentences and the seed."""
        flat = np.fromiter(chain.from_iterable(sentences), np.int64)
        offsets = np.cumsum([0, *map(len, sentences)])
        begins = self._cut(flat, offsets[:-1])
        ids = flat.tolist()
        chosen = np.random.default_rng(seed).integers(CANDIDATES, size=len(begins)).tolist()
        edges = pairwise([*begins.tolist(), len(ids)])
        words = [
            self._candidate(number, tuple(ids[begin:end]))
            for number, (begin, end) in zip(chosen, edges, strict=True)
        ]
        return [
            list(chain.from_iterable(words[first:last]))
            for first, last in pairwise(np.searchsorted(begins, offsets).tolist())
        ]

    def _cut(self, ids: NDArray[np.int64], sentences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where words begin, given where sentences do."""
        begins = self._begins[ids]
        begins[1:] |= self._whole[ids[:-1]]
        begins[sentences[sentences < len(ids)]] = True
        places = np.arange(len(ids))
        since = places - np.maximum.accumulate(np.where(begins, places, 0))
        return np.flatnonzero(since % LONGEST_WORD == 0)

    def _drawn(self, number: int, word: tuple[int, ...]) -> tuple[int, ...]:
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
        return tuple(self._ids[segment] for segment in segments) if known else word


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
