"""Filters that drop training pairs: empty, too long, unequal in length, in the dev set, duplicate.

A pair counts for the first filter that drops it, in the order of `FILTERS`. Filters see numbers of pieces and
hashes of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trmt.errors import ConfigError

FILTERS = ("empty", "too long", "ratio", "in dev set", "duplicate")
KEPT = len(FILTERS)  # the result for a pair that no filter drops

# The difference in pieces that the ratio ignores: "Danke!" is "Thank you very much indeed!".
RATIO_SLACK = 8

CHUNK = 1 << 20  # hashes read at a time while they are distributed to buckets
BUCKET = 1 << 21  # hashes of one bucket, about: it is sorted in memory
MAX_BUCKETS = 64  # each is an open file

_NUMBERED = np.dtype([("hash", "<u8"), ("number", "<u8")])


@dataclass(frozen=True)
class LengthLimits:
    """The limits of the length filters."""

    max_length: int = 250  # pieces of either side
    max_ratio: float = 3.0  # pieces of the longer side per piece of the shorter, beyond RATIO_SLACK; 0: any

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ConfigError(f"--max-length {self.max_length} would drop every pair; choose at least 1")
        if self.max_ratio and not 1 <= self.max_ratio < math.inf:
            raise ConfigError(
                f"--max-ratio {self.max_ratio} would drop every pair; choose at least 1, or 0 for any"
            )


def filter_by_length(
    source: NDArray[np.int64], target: NDArray[np.int64], *, limits: LengthLimits
) -> NDArray[np.uint8]:
    """For each pair, given the numbers of pieces, the index of the filter that drops it, or `KEPT`.

    The ratio is one of pieces and not of characters: a Chinese sentence has a third of the characters of its
    English translation, but a similar number of pieces of a tokenizer trained on both.
    """
    shorter, longer = np.minimum(source, target), np.maximum(source, target)
    result = np.full(len(source), KEPT, np.uint8)
    if limits.max_ratio:
        result[longer > limits.max_ratio * shorter + RATIO_SLACK] = FILTERS.index("ratio")
    result[longer > limits.max_length] = FILTERS.index("too long")
    result[shorter == 0] = FILTERS.index("empty")
    return result


def pair_hashes(sources: Sequence[str], targets: Sequence[str]) -> NDArray[np.uint64]:
    """A 64-bit hash of each pair of normalised texts.

    Among n different pairs two collide, and one is dropped as a duplicate, with probability n² / 2⁶⁵: three
    in a million for ten million pairs.
    """
    # No text has a newline, so different pairs make different strings.
    joined = b"".join(
        blake2b(f"{source}\n{target}".encode(), digest_size=8).digest()
        for source, target in zip(sources, targets, strict=True)
    )
    return np.frombuffer(joined, "<u8")


def first_occurrences(
    hashes: Path, mask: Path, *, chunk: int = CHUNK, bucket: int = BUCKET
) -> NDArray[np.bool_]:
    """Which entries of a file of 64-bit hashes are the first of their value, as a mask mapped from a file.

    Memory does not grow with their number: hashes and their positions are distributed to buckets on disk by
    their leading bits, and each bucket is sorted alone. Duplicates within a chunk are removed before, so that
    a hash that is everywhere does not overflow its bucket.
    """
    count = hashes.stat().st_size // 8
    if not count:
        return np.zeros(0, np.bool_)
    first: NDArray[np.bool_] = np.memmap(mask, np.bool_, "w+", shape=(count,))
    buckets = min(-(-count // bucket), MAX_BUCKETS)
    paths = [hashes.with_name(f"{hashes.name}.{number}") for number in range(buckets)]
    _distribute(hashes, paths, chunk)
    for path in paths:
        numbered = np.fromfile(path, _NUMBERED)
        # A bucket is in the order of the chunks and has a hash at most once per chunk.
        _, at = np.unique(numbered["hash"], return_index=True)
        first[numbered["number"][at]] = True
        path.unlink()
    return first


def _distribute(hashes: Path, buckets: Sequence[Path], chunk: int) -> None:
    edges = np.array([(number << 64) // len(buckets) for number in range(1, len(buckets))], np.uint64)
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in buckets]
        source = stack.enter_context(hashes.open("rb"))
        begin = 0
        while raw := source.read(chunk * 8):
            values, at = np.unique(np.frombuffer(raw, "<u8"), return_index=True)
            numbered = np.empty(len(values), _NUMBERED)
            numbered["hash"], numbered["number"] = values, at + begin
            parts = np.split(numbered, np.searchsorted(values, edges))
            for file, part in zip(files, parts, strict=True):
                file.write(part.tobytes())
            begin += len(raw) // 8
