"""Translation of byte streams: one output line for each input line, in order, as soon as it is ready."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO, Protocol

from trmt import console
from trmt.decoding.request import Batching
from trmt.errors import DataError
from trmt.storage.compression import DamagedText
from trmt.translating import BREAKS, Candidate, Translation

BOM = b"\xef\xbb\xbf"
FIRST_WINDOW, WINDOW = 128, 4096  # lines translated together; small at first, so that output starts early
WINDOW_BYTES = 1 << 20  # a window of WINDOW lines ends here if they are long, so that output keeps coming
MAX_PENDING_BYTES = 64 << 20  # read ahead of the translation (a single line may be longer)
LINE_OVERHEAD = 48  # bytes of memory that a line takes besides its text
CPU_CHUNK = (16, 512)  # lines handed to a process at a time: minimum and maximum
GPU_CHUNK_BATCHES = (1, 16)  # the same in batches: less than a batch takes as long as a whole one
CHUNKS_PER_WINDOW = 4  # chunks of maximum size for each process, so that all finish a window together


class LineTranslator(Protocol):
    """Translates lines: a `Translator`, or a `ParallelTranslator`."""

    def ready(
        self, texts: Sequence[str], *, prefixes: Sequence[str] | None = None, first_key: int = 0
    ) -> Iterator[tuple[int, Translation]]:
        """(index of the line, its translation), in the order in which they are ready."""


@dataclass
class StreamReport:
    """The number of lines translated, and which were special; line numbers count from 1."""

    lines: int = 0  # includes the `lines_before` of translate_stream
    split: list[int] = field(default_factory=list)
    undecodable: list[int] = field(default_factory=list)
    prefix_cut: list[int] = field(default_factory=list)


def chunk_sizes(device: str, batch: int) -> tuple[int, int]:
    """The minimum and maximum number of lines to hand to a process on this device at a time."""
    if device.startswith("cuda"):
        sentences = Batching.on(device, batch).sentences
        return GPU_CHUNK_BATCHES[0] * sentences, GPU_CHUNK_BATCHES[1] * sentences
    return CPU_CHUNK


def window_size(devices: Sequence[str], batch: int) -> int:
    """How many lines keep one process on each of these devices busy."""
    return CHUNKS_PER_WINDOW * len(devices) * chunk_sizes(devices[0], batch)[1]


def translate_stream(
    translator: LineTranslator,
    source: BinaryIO,
    out: BinaryIO,
    *,
    as_json: bool = False,
    prefixed: bool = False,
    lines_before: int = 0,
    window: int = WINDOW,
    interactive: bool = True,
) -> StreamReport:
    """Translate lines of bytes as they arrive; each gives one output line, in order.

    `lines_before` is the number of lines of the same text that were translated elsewhere: numbers of lines
    and random draws continue from there. With `interactive`, whatever has arrived is translated at once, and
    further lines gather only during a translation, at most `window` (or WINDOW, if that is more); without it
    every window is full. With `prefixed` each line is a source, a tab, and a prefix of its translation.
    Errors of writing to `out` are raised as OSError, errors of reading `source` as DataError.
    """
    report = StreamReport(lines_before)
    # A progress bar would break up translations that are printed to the same terminal.
    with nullcontext() if out.isatty() else console.progress("translating") as bar:
        for lines in LineReader(source).windows(max(window, WINDOW), interactive=interactive):
            if report.lines == 0:
                lines[0] = lines[0].removeprefix(BOM)
            texts, prefixes = zip(*(_split_prefix(raw, prefixed=prefixed) for raw in lines), strict=True)
            translations = _in_order(translator.ready(texts, prefixes=prefixes, first_key=report.lines))
            for text, raw, translation in zip(texts, lines, translations, strict=True):
                _record(report, raw, translation)
                line = _as_json(report.lines, text, translation) if as_json else _as_text(translation)
                out.write(line.encode() + (b"\r\n" if raw.endswith(b"\r") and not as_json else b"\n"))
            out.flush()
            if bar:
                bar.advance(len(lines))
    return report


def decode_line(raw: bytes) -> tuple[str, bool]:
    """The text of a line without its carriage return, and whether it was valid UTF-8."""
    raw = raw.removesuffix(b"\r")
    try:
        return raw.decode(), True
    except UnicodeDecodeError:
        return raw.decode(errors="replace"), False


def _record(report: StreamReport, raw: bytes, translation: Translation) -> None:
    report.lines += 1
    if translation.status == "split":
        report.split.append(report.lines)
    if translation.prefix_cut:
        report.prefix_cut.append(report.lines)
    if not decode_line(raw)[1]:
        report.undecodable.append(report.lines)


def _split_prefix(raw: bytes, *, prefixed: bool) -> tuple[str, str]:
    text, _ = decode_line(raw)
    source, _, prefix = text.partition("\t") if prefixed else (text, "", "")
    return source, prefix


def _as_text(translation: Translation) -> str:
    """The candidates of a line, separated by tabs."""
    return "\t".join(candidate.text for candidate in translation.candidates)


def _as_json(number: int, source: str, translation: Translation) -> str:
    best = translation.candidates[0] if translation.candidates else Candidate("", 0.0, 0.0)
    entry: dict[str, Any] = {
        "line": number,
        "source": source,
        "translation": translation.text,
        "score": best.score,
        "normalised": best.normalised,
        "status": translation.status,
    }
    if translation.prefix_cut:
        entry["prefix_cut"] = True
    if len(translation.candidates) > 1:
        entry["n_best"] = [asdict(candidate) for candidate in translation.candidates]
    # JSON allows these characters in strings, but some programs take them for the end of a line.
    return BREAKS.sub(_escaped, json.dumps(entry, ensure_ascii=False))


def _escaped(match: re.Match[str]) -> str:
    return "".join(f"\\u{ord(character):04x}" for character in match[0])


def _in_order(ready: Iterable[tuple[int, Translation]]) -> Iterator[Translation]:
    waiting: dict[int, Translation] = {}
    following = 0
    for number, translation in ready:
        waiting[number] = translation
        while following in waiting:
            yield waiting.pop(following)
            following += 1
    assert not waiting, "a line got no translation"


class LineReader:
    """Reads lines of a binary stream in a thread, so that they gather while others are translated.

    The thread may still wait for input when the process ends. Standard input must be unbuffered then: a
    thread waiting in a buffered read holds a lock that Python needs to exit.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.lines: deque[bytes] = deque()
        self.size = 0
        self.ended = False
        self.error: BaseException | None = None
        self.changed = threading.Condition()
        threading.Thread(target=self._read, name="trmt-reader", daemon=True).start()

    def windows(self, max_lines: int = WINDOW, *, interactive: bool = True) -> Iterator[list[bytes]]:
        """Lists of 1 to `max_lines` lines, without their newlines.

        With `interactive` a list comes as soon as there is a line, and lists are short at first; without it
        lists are full.
        """
        size = min(FIRST_WINDOW, max_lines) if interactive else max_lines
        while window := self._next(size, min_lines=1 if interactive else size):
            yield window
            size = min(2 * size, max_lines)

    def _next(self, max_lines: int, *, min_lines: int) -> list[bytes]:
        window: list[bytes] = []
        taken = 0
        max_bytes = min(WINDOW_BYTES * max(max_lines // WINDOW, 1), MAX_PENDING_BYTES)
        with self.changed:
            self.changed.wait_for(
                lambda: len(self.lines) >= min_lines or self.size >= max_bytes or self.ended
            )
            while self.lines and len(window) < max_lines and taken < max_bytes:
                window.append(self.lines.popleft())
                taken += _size(window[-1:])
            self.size -= taken
            self.changed.notify_all()
        if not window and isinstance(self.error, OSError):
            reason = self.error.strerror or self.error
            raise DataError(
                f"cannot read the input: {reason}; the lines before this are translated"
            ) from self.error
        if not window and isinstance(self.error, DamagedText):
            raise DataError(f"{self.error}; the lines before this are translated") from self.error
        if not window and self.error:
            raise self.error
        return window

    def _read(self) -> None:
        unfinished: list[bytes] = []  # pieces of the line whose end has not arrived yet
        try:
            while chunk := self._chunk():
                first, *more = chunk.split(b"\n")
                unfinished.append(first)
                if more:
                    self._add([b"".join(unfinished), *more[:-1]])
                    unfinished = [more[-1]]
        except BaseException as error:  # raised again in the thread that takes the lines
            self.error = error
        # After an error it is a line of which the rest is missing.
        if not self.error and (last := b"".join(unfinished)):
            self._add([last])
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def _chunk(self) -> bytes:
        """The bytes that have arrived; waits for at least one."""
        read = getattr(self.stream, "read1", self.stream.read)
        while (chunk := read(1 << 16)) is None:  # a non-blocking stream without data
            time.sleep(0.01)
        return bytes(chunk)

    def _add(self, lines: list[bytes]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.size < MAX_PENDING_BYTES)
            self.lines.extend(lines)
            self.size += _size(lines)
            self.changed.notify_all()


def _size(lines: Sequence[bytes]) -> int:
    return sum(map(len, lines)) + LINE_OVERHEAD * len(lines)
