"""Which target piece translates which source piece: Model 1 of Brown et al. 1993, by expectation and maximum.

It is computed over the different pieces of each pair, with an empty source piece beside them that takes what
nothing else explains. A cell is one target piece of a pair beside one source piece of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trmt.sets.shards import Split

BLOCK = 1 << 13  # pairs looked at together

Ids = NDArray[np.int64]


class Probabilities(NamedTuple):
    """p(target | source) of what occurs together, in the order of the sources, then of the targets."""

    source: Ids
    target: Ids
    value: NDArray[np.float64]


class Sample(NamedTuple):
    """What was counted in some of the pairs."""

    pairs: int
    cells: Ids  # number of the source and target piece that each cell is about
    groups: Ids  # cells of the same target piece of the same pair have the same number
    keys: Ids  # source * vocabulary + target of each of these numbers, ascending


def sample(
    split: Split,
    *,
    vocabularies: tuple[int, int],
    most: int,
    sides: tuple[str, str] = ("source", "target"),
) -> Sample:
    """Cells of pairs from all of the split, `most` or little more; the empty piece is behind all others.

    Turned `sides` make the target what is translated from; `vocabularies` are in their order.
    """
    # A run through the split in steps that visit each pair once, so that any beginning is spread evenly.
    order = np.random.default_rng(1).permutation(len(split))
    keys: list[Ids] = []
    groups: list[Ids] = []
    pairs = count = begun = 0
    for at in range(0, len(order), BLOCK):
        if count >= most:
            break
        chosen = np.sort(order[at : at + BLOCK])
        block, group = _cells(split, chosen, vocabularies, sides)
        keys.append(block)
        groups.append(group + begun)
        begun += int(group[-1]) + 1 if len(group) else 0
        pairs, count = pairs + len(chosen), count + len(block)
    together = np.concatenate(keys) if keys else np.empty(0, np.int64)
    keys.clear()
    unique, cells = np.unique(together, return_inverse=True)
    return Sample(pairs, cells, np.concatenate(groups) if groups else together, unique)


def _cells(
    split: Split, pairs: Ids, vocabularies: tuple[int, int], sides: tuple[str, str]
) -> tuple[Ids, Ids]:
    """The key and the group of each cell of these pairs."""
    empty, width = vocabularies
    (source, source_pair), (target, target_pair) = (
        _different(*split.gather(f"{side}.ids", pairs), size)
        for side, size in zip(sides, vocabularies, strict=True)
    )
    every = np.arange(len(pairs))
    source = np.concatenate([source, np.full(len(pairs), empty)])
    source_pair = np.concatenate([source_pair, every])
    order = np.argsort(source_pair, kind="stable")
    source = source[order]
    sizes = np.bincount(source_pair, minlength=len(pairs))
    begins = np.cumsum(sizes) - sizes
    repeats = sizes[target_pair]  # cells of each target piece
    ends = np.cumsum(repeats)
    within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - repeats, repeats)
    place = np.repeat(begins[target_pair], repeats) + within
    return source[place] * width + np.repeat(target, repeats), np.repeat(np.arange(len(target)), repeats)


def _different(values: NDArray[np.generic], lengths: Ids, size: int) -> tuple[Ids, Ids]:
    """The different values of each run, and the number of their runs."""
    runs = np.repeat(np.arange(len(lengths)), lengths)
    unique = np.unique(runs * size + values.astype(np.int64))
    return unique % size, unique // size


def model_one(found: Sample, *, target_vocabulary: int, iterations: int) -> Probabilities:
    """The probabilities after so many iterations, from equal ones."""
    source, target = found.keys // target_vocabulary, found.keys % target_vocabulary
    value: NDArray[np.float64] = np.ones(len(found.keys))
    for _ in range(iterations):
        share = value[found.cells]
        share /= np.bincount(found.groups, share)[found.groups]
        counted = np.bincount(found.cells, share, minlength=len(found.keys)).astype(np.float64)
        value = counted / np.bincount(source, counted)[source]
    return Probabilities(source, target, value)


def best(found: Probabilities, *, count: int, least: float) -> Iterator[tuple[int, Ids]]:
    """(source, its most probable targets, at most `count`, none less probable than `least`)."""
    enough = found.value >= least
    source, target = found.source[enough], found.target[enough]
    order = np.lexsort((target, -found.value[enough], source))
    source, target = source[order], target[order]
    begins = np.flatnonzero(np.diff(source, prepend=-1))
    for begin, end in zip(begins, [*begins[1:], len(source)], strict=True):
        yield int(source[begin]), target[begin : min(begin + count, end)]
