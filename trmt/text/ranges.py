"""Files cut into ranges of whole lines, and the bytes of one range, read again.

A range says where it begins and ends, how many lines stand before it, and the digest of its bytes: who
reads it, on whatever machine and however much later, gets what was there when the file was cut, or an error.
`\\n` alone ends a line. This file knows bytes, and nothing of what the lines mean.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from trmt.errors import DataError

CHUNK = 1 << 20


@dataclass(frozen=True)
class Range:
    """Lines `first` to `first + lines` of a file, counted from 0, and the bytes they take."""

    begin: int
    end: int
    first: int
    lines: int
    digest: str


@dataclass(frozen=True)
class Slice:
    """What to read of a file: a range, or all of one that can only be read from its beginning."""

    file: str
    range: Range
    packed: bool = False


# Which of the line ends in a chunk ends a range: their places in the file, the number of the first of them
# (counted from 1), and where the range began; a number beyond the last means none of them.
_Rule = Callable[[NDArray[np.int64], int, int], int]


def cut(stream: BinaryIO, *, size: int, every: int = 1) -> list[Range]:
    """Ranges that end where a line does, as soon as they have `size` bytes; an empty file is one empty range.

    Each but the last ends after a number of lines of the file that `every` divides.
    """

    def choose(ends: NDArray[np.int64], number: int, begin: int) -> int:
        at = int(np.searchsorted(ends, begin + size))
        return at + -(number + at) % every

    return _ranges(stream, choose)


def cut_after(stream: BinaryIO, numbers: Sequence[int]) -> list[Range]:
    """Ranges that end after these numbers of lines of the file, ascending, and one of what is behind."""
    left = list(reversed(numbers))

    def choose(ends: NDArray[np.int64], number: int, begin: int) -> int:
        if not left or left[-1] >= number + len(ends):
            return len(ends)
        return left.pop() - number

    return _ranges(stream, choose)


@dataclass
class _Open:
    """The range that is being measured."""

    begin: int
    first: int
    lines: int = 0
    digest: Any = field(default_factory=lambda: blake2b(digest_size=8))

    def closed(self, end: int) -> Range:
        return Range(self.begin, end, self.first, self.lines, self.digest.hexdigest())


def _ranges(stream: BinaryIO, choose: _Rule) -> list[Range]:
    found: list[Range] = []
    current = _Open(0, 0)
    start, last = 0, b"\n"
    while chunk := stream.read(CHUNK):
        view, place = memoryview(chunk), 0  # what stands in the chunk before `place` is told already
        ends = start + 1 + np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
        while len(ends):
            at = choose(ends, current.first + current.lines + 1, current.begin)
            if at >= len(ends):
                break
            end = int(ends[at])
            current.digest.update(view[place : end - start])
            current.lines += at + 1
            found.append(current.closed(end))
            current = _Open(end, current.first + current.lines)
            place, ends = end - start, ends[at + 1 :]
        current.digest.update(view[place:])
        current.lines += len(ends)
        start, last = start + len(chunk), chunk[-1:]
    current.lines += last != b"\n"  # the last line needs no newline
    if start > current.begin or not found:
        found.append(current.closed(start))
    return found


def whole(stream: BinaryIO) -> Range:
    """One range of everything, whose lines nobody has counted: it is packed."""
    digest, size = blake2b(digest_size=8), 0
    while chunk := stream.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return Range(0, size, 0, -1, digest.hexdigest())


def reading(stream: BinaryIO, place: Slice) -> io.BufferedReader:
    """The bytes of a slice of an open file, which is closed with what is returned."""
    return io.BufferedReader(_Bounded(stream, place), CHUNK)


class _Bounded(io.RawIOBase):
    """The bytes of a range; at its end it proves that they are those that were cut."""

    def __init__(self, stream: BinaryIO, place: Slice) -> None:
        self.stream, self.place = stream, place
        self.left = place.range.end - place.range.begin
        self.digest = blake2b(digest_size=8)
        stream.seek(place.range.begin)

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        data = self.stream.read(min(self.left, len(room)))
        self.left -= len(data)
        self.digest.update(data)
        done = not self.left and self.digest.hexdigest() == self.place.range.digest
        if not done and (not data or not self.left):
            raise DataError(
                f"{self.place.file} has changed since it was cut into parts; put it back as it was, or begin "
                "with a new output folder"
            )
        room[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()
