"""Compressed text: gzip, bzip2, xz and zstandard, known by their first bytes.

All text that trmt reads comes through `Decompressed`, from files, URLs and standard input. A stream that is
damaged or ends too early is an error, never a shorter text.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from importlib import import_module
from typing import Any, BinaryIO, NoReturn, Protocol, cast

from trmt.errors import ConfigError, DataError
from trmt.storage.files import open_file
from trmt.storage.urls import read_errors

CHUNK = 1 << 16  # bytes that are read at a time
MAX_OUTPUT = 1 << 20  # bytes that are decompressed at a time, whatever a small input expands to
MAX_MEMORY = 1 << 29  # bytes of memory that an xz file may ask for; those of `xz -9` take an eighth

_Piece = bytes | None  # None: nothing has arrived yet on a stream that does not block

# The first bytes of each format. Those of bzip2 are more than its name, because a text may begin with "BZh".
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")
_STARTS: Sequence[tuple[bytes, str]] = (
    (b"\x1f\x8b\x08", "gzip"),
    *((b"BZh%d%b" % (level, block), "bzip2") for level in range(1, 10) for block in _BZIP2_BLOCKS),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstandard"),
    *((b"%c\x2a\x4d\x18" % number, "zstandard") for number in range(0x50, 0x60)),  # a frame to skip
)
MAX_START = max(len(start) for start, _ in _STARTS)
SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstandard"}


class DamagedText(DataError):
    """Compressed text that cannot be read to its end."""

    def __init__(self, name: str, reason: str, *, after_line: int | None = None) -> None:
        where = "" if after_line is None else f" after line {after_line}"
        super().__init__(f"{name} is damaged{where} ({reason}); download or compress it again")
        self.reason = reason


class _Decoder(Protocol):
    """What bz2, lzma and zstd have: output of limited size, and the bytes after the end of the data."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _GzipDecoder:
    """zlib's decompressor with the attributes of the others."""

    def __init__(self) -> None:
        self.inner = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self.inner.eof

    @property
    def unused_data(self) -> bytes:
        return self.inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        out = self.inner.decompress(self.inner.unconsumed_tail + data, max_length)
        self.needs_input = len(out) < max_length and not self.inner.unconsumed_tail
        return out


def compression_of(first: bytes) -> str | None:
    """The format that text with these first bytes is compressed in; None if it is not compressed."""
    return next((format for start, format in _STARTS if first.startswith(start)), None)


def suffix_of(name: str) -> str:
    """The end of a file name that says how the file is compressed; empty if there is none."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def without_suffix(name: str) -> str:
    """A file name without `suffix_of` it."""
    return name[: len(name) - len(suffix_of(name))]


def is_compressed(location: str) -> bool:
    """Whether a file is compressed, or named as if it were."""
    with open_file(location) as stream, read_errors(location):
        return compression_of(stream.read(MAX_START)) is not None or bool(suffix_of(location))


class Decompressed(io.RawIOBase):
    """The text of a stream of bytes, decompressed if its first bytes are those of a format.

    It hands on whatever has arrived, so that a program which writes a line into a pipe gets its answer. A
    name that ends in .gz and the like is a promise: other contents are an error. The stream is not closed.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.stream, self.name = stream, name
        self._chunks = self._read_chunks()
        self._pieces = self._read_pieces()
        self._text = memoryview(b"")  # decoded and not handed on

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if not self._text:
            piece = next(self._pieces, b"")
            if piece is None:
                return None
            self._text = memoryview(piece)
        size = min(len(self._text), len(buffer))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def _read_chunks(self) -> Iterator[_Piece]:
        read = cast(Callable[[int], _Piece], getattr(self.stream, "read1", self.stream.read))
        while (data := read(CHUNK)) != b"":
            yield data

    def _read_pieces(self) -> Iterator[_Piece]:
        first = yield from self._enough(b"")
        format = compression_of(first)
        if format is None and (suffix := suffix_of(self.name)):
            self._fail(f"it is not compressed, although its name ends in {suffix}")
        if format is None:
            yield from (each for each in (first,) if each)
            yield from self._chunks
            return
        while first:
            decoder = _decoder(format, self.name)
            yield from self._member(decoder, first)
            # Compressed files may be concatenated, and padded with zeros.
            first = yield from self._enough(decoder.unused_data, skip=b"\0")
            if first and compression_of(first) != format:
                self._fail("something else follows the compressed text")

    def _enough(self, first: bytes, *, skip: bytes = b"") -> Generator[_Piece, None, bytes]:
        """`first` with as many further bytes as it takes to tell a format; all of them at the end."""
        first = first.lstrip(skip) if skip else first
        while any(start.startswith(first) and start != first for start, _ in _STARTS):
            data = next(self._chunks, b"")
            if data == b"":
                break
            if data is None:
                yield None
                continue
            first = (first + data).lstrip(skip) if skip else first + data
        return first

    def _member(self, decoder: _Decoder, data: _Piece) -> Iterator[_Piece]:
        """The text of one compressed file of those that may be concatenated."""
        while not decoder.eof:
            if data == b"" and decoder.needs_input:
                data = next(self._chunks, b"")
                if data == b"":
                    self._fail("it ends too early")
            if data is None:
                yield None
                data = b""
                continue
            try:
                text = decoder.decompress(data, MAX_OUTPUT)
            except Exception as error:  # each format has its own exceptions
                self._fail(" ".join(str(error).split()).rstrip(".") or type(error).__name__)
            data = b""
            if text:
                yield text

    def _fail(self, reason: str) -> NoReturn:
        raise DamagedText(self.name, reason)


def _decoder(format: str, name: str) -> _Decoder:
    if format == "gzip":
        return _GzipDecoder()
    if format == "bzip2":
        return cast(_Decoder, bz2.BZ2Decompressor())
    if format == "xz":
        return cast(_Decoder, lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_MEMORY))
    return cast(_Decoder, _zstd(name).ZstdDecompressor())


def compressing(stream: BinaryIO, name: str) -> BinaryIO:
    """A stream that compresses what is written to it as the end of a file name says, or `stream` itself.

    It must be closed; `stream` stays open.
    """
    format = SUFFIXES.get(suffix_of(name))
    if format == "gzip":
        return cast(BinaryIO, gzip.GzipFile(filename="", fileobj=stream, mode="wb", mtime=0))
    if format == "bzip2":
        return cast(BinaryIO, bz2.BZ2File(stream, "wb"))
    if format == "xz":
        return cast(BinaryIO, lzma.LZMAFile(stream, "wb"))
    return cast(BinaryIO, _zstd(name).ZstdFile(stream, "wb")) if format else stream


def _zstd(name: str) -> Any:
    """The module for zstandard: from Python 3.14 on in its library, before in a package."""
    for module in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(module)
        except ImportError:
            continue
    raise ConfigError(
        f"{name} is compressed with zstandard, which this Python cannot read by itself; "
        "pip install 'trmt[zstd]', or use another format"
    )
