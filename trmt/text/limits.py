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
MAX_ROWS = 1 << 24  # of a row group of a Parquet file, which is read at once
MAX_GROUP = 4 << 30  # bytes of a row group before it was compressed


def bounded_lines(stream: BinaryIO, name: str, *, first: int, size: int | None) -> Iterator[bytes]:
    """The lines of a stream with their line ends; one that is too long is a DataError, and too many are.

    `first` is the number of the first line, and `size` that of the file, None if it is not known.
    """
    most = math.inf if size is None else max(EXPANSION * size, ALWAYS)
    total, number = 0, first
    for number, line in enumerate(iter(partial(_buffered(stream).readline, MAX_LINE + 1), b""), first):
        if len(line) > MAX_LINE:
            raise DataError(
                f"{name}, line {number}: more than {MAX_LINE >> 20} MiB, which is the limit of a line; "
                "correct the file"
            )
        total += len(line)
        if total > most:
            raise DataError(
                f"{name} expands to more than {EXPANSION} times its size by line {number:,}, which is the "
                "limit; check it, and decompress it yourself if it is right"
            )
        yield line


def _buffered(stream: BinaryIO) -> BinaryIO:
    """The stream itself, or if its `readline` takes no limit, one that reads from it."""
    try:
        stream.readline(0)
    except TypeError:  # as those of fsspec's stores
        return io.BufferedReader(cast(Any, stream))
    return stream


def check_row_groups(name: str, stream: BinaryIO) -> None:
    """Refuse a Parquet file with a part that is read at once and is too large; a damaged one is passed."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        metadata = read_metadata(stream)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    except (ArrowException, OSError, ValueError):
        return  # reading it will report the error
    for group in groups:
        if not 0 <= group.num_rows <= MAX_ROWS or not 0 <= group.total_byte_size <= MAX_GROUP:
            raise DataError(
                f"{name} has a row group of {group.num_rows:,} rows and {group.total_byte_size:,} bytes, but "
                f"{MAX_ROWS:,} rows and {MAX_GROUP:,} bytes are the limit; write it with smaller row groups"
            )
