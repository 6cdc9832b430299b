"""Files split into ranges of whole lines, and the bytes of one range.

A range has its offsets, the number of lines before it, and the digest of its bytes. A reader of a range, on
any machine and at any later time, gets the bytes that the range was made from, or an error. Only `\\n` ends a
line.
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

CHUNK = 1 << 20  # bytes


@dataclass(frozen=True)
class LineRange:
    """Lines `first` to `first + lines` of a file, counted from 0, and the bytes from `begin` to `end`."""

    begin: int
    end: int
    first: int
    lines: int  # -1 if unknown
    digest: str


@dataclass(frozen=True)
class FileSlice:
    """The part of a file to read: a range, or all of a file that may be compressed."""

    path: str
    range: LineRange
    compressed: bool = False


# Which of the line ends in a chunk ends a range, as an index, given their offsets in the file, the number of
# the first of these lines (counted from 1), and where the range began; an index beyond the last means none of
# them.
_ChooseEnd = Callable[[NDArray[np.int64], int, int], int]


def split_by_size(stream: BinaryIO, *, size: int, every: int = 1) -> list[LineRange]:
    """Ranges of `size` bytes, extended to the end of a line; an empty file is one empty range.

    Each range but the last ends after a number of lines of the file that is a multiple of `every`.
    """

    def choose_end(ends: NDArray[np.int64], number: int, begin: int) -> int:
        at = int(np.searchsorted(ends, begin + size))
        return at + -(number + at) % every

    return _split(stream, choose_end)


def split_after_lines(stream: BinaryIO, numbers: Sequence[int]) -> list[LineRange]:
    """Ranges that end after these numbers of lines of the file, in ascending order, and one of the rest."""
    left = list(reversed(numbers))

    def choose_end(ends: NDArray[np.int64], number: int, begin: int) -> int:
        if not left or left[-1] >= number + len(ends):
            return len(ends)
        return left.pop() - number

    return _split(stream, choose_end)


def whole_file(stream: BinaryIO) -> LineRange:
    """One range of all bytes of a compressed file, whose lines are not counted."""
    digest, size = blake2b(digest_size=8), 0
    while chunk := stream.read(CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return LineRange(0, size, 0, -1, digest.hexdigest())


@dataclass
class _RangeBuilder:
    """The range that is being measured."""

    begin: int
    first: int
    lines: int = 0
    digest: Any = field(default_factory=lambda: blake2b(digest_size=8))

    def build(self, end: int) -> LineRange:
        return LineRange(self.begin, end, self.first, self.lines, self.digest.hexdigest())


def _split(stream: BinaryIO, choose_end: _ChooseEnd) -> list[LineRange]:
    found: list[LineRange] = []
    current = _RangeBuilder(0, 0)
    start, last = 0, b"\n"
    while chunk := stream.read(CHUNK):
        view, consumed = memoryview(chunk), 0  # bytes of the chunk that are in a range already
        ends = start + 1 + np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
        while len(ends):
            at = choose_end(ends, current.first + current.lines + 1, current.begin)
            if at >= len(ends):
                break
            end = int(ends[at])
            current.digest.update(view[consumed : end - start])
            current.lines += at + 1
            found.append(current.build(end))
            current = _RangeBuilder(end, current.first + current.lines)
            consumed, ends = end - start, ends[at + 1 :]
        current.digest.update(view[consumed:])
        current.lines += len(ends)
        start, last = start + len(chunk), chunk[-1:]
    current.lines += last != b"\n"  # the last line needs no newline
    if start > current.begin or not found:
        found.append(current.build(start))
    return found


def open_slice(stream: BinaryIO, part: FileSlice) -> io.BufferedReader:
    """The bytes of a slice of an open file, which is closed together with the returned reader."""
    return io.BufferedReader(_SliceReader(stream, part), CHUNK)


class _SliceReader(io.RawIOBase):
    """The bytes of a slice; at its end the digest is compared with that of the range."""

    def __init__(self, stream: BinaryIO, part: FileSlice) -> None:
        self.stream, self.slice = stream, part
        self.left = part.range.end - part.range.begin
        self.digest = blake2b(digest_size=8)
        stream.seek(part.range.begin)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(min(self.left, len(buffer)))
        self.left -= len(data)
        self.digest.update(data)
        intact = not self.left and self.digest.hexdigest() == self.slice.range.digest
        if not intact and (not data or not self.left):
            raise DataError(
                f"{self.slice.path} has changed since it was split into parts; restore it, or start again "
                "with a new output folder"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()
