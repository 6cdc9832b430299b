"""The named rules by which training pairs are left out.

The first rule that a pair breaks takes it and counts it, in the order of `RULES`. This file sees piece counts
and hashes only, never text beyond one pair.
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

RULES = ("empty", "too long", "ratio", "in dev set", "duplicate")
KEPT = len(RULES)  # the verdict on a pair that breaks none

# What short sentences may differ by before the ratio counts: "Danke!" is "Thank you very much indeed!".
RATIO_SLACK = 8

CHUNK = 1 << 20  # hashes in memory while they are dealt out to buckets
BUCKET = 1 << 21  # hashes that one bucket is meant to hold: it is sorted in memory
MOST_BUCKETS = 64  # each is an open file

_NUMBERED = np.dtype([("hash", "<u8"), ("number", "<u8")])


@dataclass(frozen=True)
class Limits:
    """How long and how unequal the sides of a training pair may be."""

    max_length: int = 250
    """The most pieces that either side may have."""
    max_ratio: float = 3.0
    """How many times as many pieces the longer side may have, beyond a slack for short sentences; 0: any."""

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ConfigError(f"--max-length {self.max_length} would leave no pair; choose at least 1")
        if self.max_ratio and not 1 <= self.max_ratio < math.inf:
            raise ConfigError(
                f"--max-ratio {self.max_ratio} would leave no pair; choose at least 1, or 0 for any"
            )


def judge(source: NDArray[np.int64], target: NDArray[np.int64], *, limits: Limits) -> NDArray[np.uint8]:
    """For each pair, given the pieces of both sides, the number of the rule that takes it, or `KEPT`.

    The proportion is one of pieces: in characters, a Chinese sentence is a third of its English translation,
    while a tokenizer learnt from both cuts them into similar numbers of pieces.
    """
    shorter, longer = np.minimum(source, target), np.maximum(source, target)
    verdicts = np.full(len(source), KEPT, np.uint8)
    if limits.max_ratio:
        verdicts[longer > limits.max_ratio * shorter + RATIO_SLACK] = RULES.index("ratio")
    verdicts[longer > limits.max_length] = RULES.index("too long")
    verdicts[shorter == 0] = RULES.index("empty")
    return verdicts


def pair_hashes(sources: Sequence[str], targets: Sequence[str]) -> NDArray[np.uint64]:
    """64 bits for each pair of normalised texts.

    Two different pairs among n share theirs, and one is taken for a duplicate, with probability n² / 2⁶⁵:
    three in a million for ten million pairs.
    """
    # A newline is in no text, so no two pairs can be joined to the same string.
    joined = b"".join(
        blake2b(f"{source}\n{target}".encode(), digest_size=8).digest()
        for source, target in zip(sources, targets, strict=True)
    )
    return np.frombuffer(joined, "<u8")


def first_occurrences(
    hashes: Path, mask: Path, *, chunk: int = CHUNK, bucket: int = BUCKET
) -> NDArray[np.bool_]:
    """Which entries of a file of 64-bit hashes are the first of their value, as a mask kept in a file.

    Memory does not grow with their number: hashes are dealt out by their leading bits to buckets on disk,
    with their position, and each bucket is sorted alone. Copies within a chunk go before that, so that no
    bucket overflows with one hash that is everywhere.
    """
    count = hashes.stat().st_size // 8
    if not count:
        return np.zeros(0, np.bool_)
    first: NDArray[np.bool_] = np.memmap(mask, np.bool_, "w+", shape=(count,))
    buckets = min(-(-count // bucket), MOST_BUCKETS)
    paths = [hashes.with_name(f"{hashes.name}.{number}") for number in range(buckets)]
    _deal_out(hashes, paths, chunk)
    for path in paths:
        numbered = np.fromfile(path, _NUMBERED)
        # A bucket is in the order of the chunks and holds a hash once for each, so its first is the earliest.
        _, at = np.unique(numbered["hash"], return_index=True)
        first[numbered["number"][at]] = True
        path.unlink()
    return first


def _deal_out(hashes: Path, buckets: Sequence[Path], chunk: int) -> None:
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
