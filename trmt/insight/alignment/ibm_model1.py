"""Word alignment by IBM Model 1 (Brown et al. 1993), with a prior that prefers the diagonal.

The translation probabilities p(target piece | source piece) are estimated by expectation maximisation over
the distinct pieces of each pair; an empty source piece explains target pieces that translate nothing. Model 1
ignores positions. When links are chosen, a prior for links near the diagonal is added, as in fast_align (Dyer
et al. 2013). A cell is one source piece together with one target piece of the same pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trmt.sets.shards import Split
from trmt.text.tokenizer import Tokenizer

BLOCK = 1 << 13  # pairs that are read together
MAX_CELLS = 1 << 25  # of the sample of pairs; about 60 bytes of memory for each
ITERATIONS = 5
EMPTY_PROBABILITY = 0.08  # that a target piece translates the empty piece
TENSION = 4.0  # how strongly the diagonal is preferred
UNSEEN = 1e-9  # probability of two pieces that never occur together

IdArray = NDArray[np.int64]


class Cooccurrences(NamedTuple):
    """The cells of a sample of pairs."""

    cells: IdArray  # index into `keys` of each cell
    groups: IdArray  # number of the pair and target piece of each cell
    keys: IdArray  # source * target vocabulary + target of the distinct cells, ascending


def cooccurrences(
    split: Split,
    *,
    vocabularies: tuple[int, int],
    max_cells: int,
    sides: tuple[str, str] = ("source", "target"),
) -> Cooccurrences:
    """The cells of randomly chosen pairs, `max_cells` or slightly more.

    The empty piece has the id after all others of the first side. `vocabularies` and `sides` are in the order
    of the direction: sides ("target", "source") are the reverse direction.
    """
    order = np.random.default_rng(1).permutation(len(split))
    keys: list[IdArray] = []
    groups: list[IdArray] = []
    cell_count = group_count = 0
    for begin in range(0, len(order), BLOCK):
        if cell_count >= max_cells:
            break
        chosen = np.sort(order[begin : begin + BLOCK])
        block, group = _cells(split, chosen, vocabularies, sides)
        keys.append(block)
        groups.append(group + group_count)
        group_count += int(group[-1]) + 1 if len(group) else 0
        cell_count += len(block)
    together = np.concatenate(keys) if keys else np.empty(0, np.int64)
    keys.clear()
    unique, cells = np.unique(together, return_inverse=True)
    return Cooccurrences(cells, np.concatenate(groups) if groups else together, unique)


def _cells(
    split: Split, pairs: IdArray, vocabularies: tuple[int, int], sides: tuple[str, str]
) -> tuple[IdArray, IdArray]:
    """The key and the group of each cell of these pairs."""
    empty, target_vocabulary = vocabularies
    (source, source_pair), (target, target_pair) = (
        _distinct(*split.gather(f"{side}.ids", pairs), size)
        for side, size in zip(sides, vocabularies, strict=True)
    )
    source = np.concatenate([source, np.full(len(pairs), empty)])
    source_pair = np.concatenate([source_pair, np.arange(len(pairs))])
    order = np.argsort(source_pair, kind="stable")
    source = source[order]
    sizes = np.bincount(source_pair, minlength=len(pairs))
    begins = np.cumsum(sizes) - sizes
    repeats = sizes[target_pair]  # cells of each target piece
    ends = np.cumsum(repeats)
    within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - repeats, repeats)
    index = np.repeat(begins[target_pair], repeats) + within
    keys = source[index] * target_vocabulary + np.repeat(target, repeats)
    return keys, np.repeat(np.arange(len(target)), repeats)


def _distinct(values: NDArray[np.generic], lengths: IdArray, size: int) -> tuple[IdArray, IdArray]:
    """The distinct values of each sequence, and the indices of their sequences."""
    sequences = np.repeat(np.arange(len(lengths)), lengths)
    unique = np.unique(sequences * size + values.astype(np.int64))
    return unique % size, unique // size


def expectation_maximisation(
    found: Cooccurrences, *, target_vocabulary: int, iterations: int
) -> NDArray[np.float64]:
    """p(target | source) for each of the keys, starting from a uniform distribution."""
    source = found.keys // target_vocabulary
    probability: NDArray[np.float64] = np.ones(len(found.keys))
    for _ in range(iterations):
        expected = probability[found.cells]
        expected /= np.bincount(found.groups, expected)[found.groups]
        counts = np.bincount(found.cells, expected, minlength=len(found.keys)).astype(np.float64)
        probability = counts / np.bincount(source, counts)[source]
    return probability


@dataclass(frozen=True)
class Model1:
    """The translation probabilities of one direction."""

    keys: IdArray  # source * target vocabulary + target, ascending
    probabilities: NDArray[np.float64]  # p(target | source) of each key
    empty: int  # the id of the empty source piece
    target_vocabulary: int

    @classmethod
    def train(
        cls, split: Split, tokenizer: Tokenizer, *, reverse: bool = False, max_cells: int = MAX_CELLS
    ) -> Model1:
        """Train on the pairs of a prepared set; `reverse` takes the target as the source."""
        sizes, sides = (tokenizer.source.vocabulary, tokenizer.target.vocabulary), ("source", "target")
        if reverse:
            sizes, sides = sizes[::-1], sides[::-1]
        found = cooccurrences(split, vocabularies=sizes, max_cells=max_cells, sides=sides)
        probabilities = expectation_maximisation(found, target_vocabulary=sizes[1], iterations=ITERATIONS)
        return cls(found.keys, probabilities, sizes[0], sizes[1])

    def probability(self, source: IdArray, target: IdArray) -> NDArray[np.float64]:
        """p(target piece | source piece) for all combinations: [target, source]."""
        wanted = source[None, :] * self.target_vocabulary + target[:, None]
        index = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return np.where(self.keys[index] == wanted, self.probabilities[index], UNSEEN)

    def align(self, source: Sequence[int], target: Sequence[int]) -> list[int]:
        """For each target piece, the position of the most probable source piece; -1 for the empty piece."""
        source_ids, target_ids = np.array(source, np.int64), np.array(target, np.int64)
        prior = (1 - EMPTY_PROBABILITY) * _diagonal(len(source), len(target))
        aligned = prior * self.probability(source_ids, target_ids)
        empty = EMPTY_PROBABILITY * self.probability(np.array([self.empty]), target_ids)[:, 0]
        return np.where(aligned.max(1) >= empty, aligned.argmax(1), -1).tolist()


def _diagonal(source_length: int, target_length: int) -> NDArray[np.float64]:
    """The prior probability of each source position for each target position: [target, source]."""
    source, target = ((np.arange(length) + 0.5) / length for length in (source_length, target_length))
    weight = np.exp(-TENSION * np.abs(source[None, :] - target[:, None]))
    return weight / weight.sum(1, keepdims=True)
