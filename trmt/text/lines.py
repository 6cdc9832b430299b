"""The lines of UTF-8 text files, plain or compressed, local or behind a URL, and of standard input."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from trmt.errors import DataError
from trmt.storage.compression import DamagedText, Decompressed
from trmt.storage.files import open_file, size_and_version
from trmt.text.limits import bounded_lines
from trmt.text.ranges import FileSlice, open_slice

STDIN = "-"
BOM = b"\xef\xbb\xbf"
BUFFER = 1 << 18  # bytes

TextFile = str | Path | FileSlice


def read_lines(file: TextFile) -> Iterator[str]:
    """The lines of a UTF-8 file or of a slice of it, plain or compressed, or of standard input for `-`.

    Only `\\n` ends a line, and a `\\r` right before it is dropped with it; every other character, such as a
    lone CR or U+2028, is text. The last line needs no newline.
    """
    name = display_name(file)
    before = number = lines_before(file)
    with ExitStack() as stack:
        stream = open_text(file, stack)
        try:
            lines = bounded_lines(stream, name, first=before + 1, size=_size(file))
            for number, raw in enumerate(lines, start=before + 1):
                if number == 1:
                    raw = raw.removeprefix(BOM)
                    if not raw:  # the file holds a byte order mark and nothing else
                        return
                if raw.endswith(b"\n"):
                    raw = raw[:-2] if raw.endswith(b"\r\n") else raw[:-1]
                yield raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}, line {number}: not valid UTF-8 (byte 0x{error.object[error.start]:02x} at "
                f"position {error.start + 1} of the line); convert the file to UTF-8, for example with iconv"
            ) from error
        except DamagedText as error:
            raise DamagedText(name, error.reason, after_line=number) from error
        except OSError as error:
            raise DataError(
                f"cannot read {name}: {error.strerror or error}; check the path and its permissions"
            ) from error


def open_text(file: TextFile, stack: ExitStack) -> BinaryIO:
    """The uncompressed bytes of a file, which `stack` closes."""
    if str(file) == STDIN:
        return _decompressed(sys.stdin.buffer, display_name(file))
    name = file.path if isinstance(file, FileSlice) else str(file)
    stream = stack.enter_context(open_file(name))
    if not isinstance(file, FileSlice):
        return _decompressed(stream, name)
    stream = stack.enter_context(open_slice(stream, file))
    return _decompressed(stream, name) if file.compressed else stream


def _decompressed(stream: BinaryIO, name: str) -> BinaryIO:
    return io.BufferedReader(Decompressed(stream, name), BUFFER)


def _size(file: TextFile) -> int | None:
    """The size of a file as it is stored; None for standard input, and for a slice of plain text."""
    if str(file) == STDIN or (isinstance(file, FileSlice) and not file.compressed):
        return None
    return size_and_version(file.path if isinstance(file, FileSlice) else str(file))[0]


def lines_before(file: TextFile) -> int:
    """How many lines of the file come before the first line of a slice."""
    return file.range.first if isinstance(file, FileSlice) else 0


def display_name(file: TextFile) -> str:
    """The name of a file in messages."""
    if isinstance(file, FileSlice):
        return file.path
    return "standard input" if str(file) == STDIN else str(file)
