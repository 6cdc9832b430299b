"""Limits of text files, which may expand to far more than they are: of a line, and of all lines."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO, cast

from trmt.errors import DataError

MAX_LINE = 64 << 20  # bytes of a line
EXPANSION = 200  # times its size that a file may expand to; text compresses to a fifth or a tenth
ALWAYS = 1 << 30  # bytes that a file may expand to in any case


def bounded_lines(stream: BinaryIO, name: str, *, first: int, size: int | None) -> Iterator[bytes]:
    """The lines of a stream with their line ends; one that is too long is a DataError, and too many are.

    `first` is the number of the first line, and `size` that of the file, None if it is not known.
    """
    most = math.inf if size is None else most_expanded(size)
    total, number = 0, first
    for number, line in enumerate(iter(partial(_buffered(stream).readline, MAX_LINE + 1), b""), first):
        if len(line) > MAX_LINE:
            raise too_long(f"{name}, line {number}")
        total += len(line)
        if total > most:
            raise expanded_too_far(name, f"line {number:,}")
        yield line


def most_expanded(size: int) -> int:
    """The bytes that a file of this size may expand to."""
    return max(EXPANSION * size, ALWAYS)


def too_long(where: str) -> DataError:
    """The error for a line, or a text of a row, that is too long."""
    return DataError(
        f"{where}: more than {MAX_LINE >> 20} MiB, which is the limit of a line; correct the file"
    )


def expanded_too_far(name: str, by: str) -> DataError:
    """The error for a file that has expanded too far by a line or row."""
    return DataError(
        f"{name} expands to more than {EXPANSION} times its size by {by}, which is the limit; check it, and "
        "decompress it yourself if it is right"
    )


def _buffered(stream: BinaryIO) -> BinaryIO:
    """The stream itself, or if its `readline` takes no limit, one that reads from it."""
    try:
        stream.readline(0)
    except TypeError:  # as those of fsspec's stores
        return io.BufferedReader(cast(Any, stream))
    return stream
