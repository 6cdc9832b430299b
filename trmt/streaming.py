"""Streams of bytes, line by line: one line out for one line in, in order, as soon as it is ready."""

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
from trmt.errors import DataError
from trmt.translating import BREAKS, Candidate, Translation

BOM = b"\xef\xbb\xbf"
FIRST_WINDOW, WINDOW = 128, 4096  # lines translated together: few at first, so that the first are soon out
WINDOW_BYTES = 1 << 20  # so many lines end here if they are long, so that they too are soon out
PENDING = 64 << 20  # bytes read ahead of the translation, at most (a single line may be longer)
LINE_BYTES = 48  # what a line takes besides its bytes


class Translates(Protocol):
    """What turns lines into translations: a `Translator`, or several in processes of their own."""

    def ready(
        self, texts: Sequence[str], *, prefixes: Sequence[str] | None = None, first_key: int = 0
    ) -> Iterator[tuple[int, Translation]]:
        """(number of the line, its translation) as they become ready."""


@dataclass
class Report:
    """What happened to a stream; the numbers of lines count from 1."""

    lines: int = 0  # those that went before among them
    split: list[int] = field(default_factory=list)
    undecodable: list[int] = field(default_factory=list)
    prefix_cut: list[int] = field(default_factory=list)


def translate_stream(
    translator: Translates,
    source: BinaryIO,
    out: BinaryIO,
    *,
    as_json: bool = False,
    prefixed: bool = False,
    before: int = 0,
    window: int = WINDOW,
    waited_for: bool = True,
) -> Report:
    """Translate lines of bytes as they come; every line is answered by one line, in order.

    What continues a text of which so many lines went `before` is translated, and numbered, as in the whole.

    A reader that waits for the answer to a line gets it: what is there is translated at once, and only
    while that runs do further lines gather, `window` of them at most (or the usual number, if that is more).
    With `waited_for` off nobody reads along, so as many gather from the first. With `prefixed` each line is
    a source, a tab, and what its translation must begin with. Errors of `out` are its OSErrors; those of
    `source` are DataErrors.
    """
    report = Report(before)
    # Where the translations themselves are on the screen, a bar would run through them.
    with nullcontext() if out.isatty() else console.progress("translating") as bar:
        for lines in Reader(source).windows(max(window, WINDOW), waited_for=waited_for):
            if report.lines == 0:
                lines[0] = lines[0].removeprefix(BOM)
            texts, prefixes = zip(*(_decoded(raw, prefixed=prefixed) for raw in lines), strict=True)
            done = _in_order(translator.ready(texts, prefixes=prefixes, first_key=report.lines))
            for text, raw, translation in zip(texts, lines, done, strict=True):
                _note(report, raw, translation)
                shown = _as_json(report.lines, text, translation) if as_json else _plain(translation)
                out.write(shown.encode() + (b"\r\n" if raw.endswith(b"\r") and not as_json else b"\n"))
            out.flush()
            if bar:
                bar.advance(len(lines))
    return report


def _note(report: Report, raw: bytes, translation: Translation) -> None:
    report.lines += 1
    if translation.status == "split":
        report.split.append(report.lines)
    if translation.prefix_cut:
        report.prefix_cut.append(report.lines)
    if not _is_utf8(raw):
        report.undecodable.append(report.lines)


def _decoded(raw: bytes, *, prefixed: bool) -> tuple[str, str]:
    text = raw.removesuffix(b"\r").decode("utf-8", errors="replace")
    source, _, prefix = text.partition("\t") if prefixed else (text, "", "")
    return source, prefix


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _plain(translation: Translation) -> str:
    """One line whatever is asked for: n-best translations stand behind one another, with tabs between."""
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
    # JSON may hold these as they are, but then it would not be one line for everybody.
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


class Reader:
    """Lines of a binary stream, read by a thread: whoever asks gets all that are there.

    The thread may still wait for input when the process ends. Standard input has to come unbuffered then:
    whoever waits in a buffered read holds a lock without which Python cannot exit.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.lines: deque[bytes] = deque()
        self.size = 0
        self.ended = False
        self.error: BaseException | None = None
        self.changed = threading.Condition()
        threading.Thread(target=self._read, name="trmt-reader", daemon=True).start()

    def windows(self, most: int = WINDOW, *, waited_for: bool = True) -> Iterator[list[bytes]]:
        """Lists of lines, without their newlines: at least one, at most so many.

        What is `waited_for` comes as soon as there is something, and few at first; otherwise lists are full.
        """
        size = min(FIRST_WINDOW, most) if waited_for else most
        while window := self._next(size, least=1 if waited_for else size):
            yield window
            size = min(2 * size, most)

    def _next(self, most: int, *, least: int) -> list[bytes]:
        window: list[bytes] = []
        filled = 0
        room = min(WINDOW_BYTES * max(most // WINDOW, 1), PENDING)
        with self.changed:
            self.changed.wait_for(lambda: len(self.lines) >= least or self.size >= room or self.ended)
            while self.lines and len(window) < most and filled < room:
                window.append(self.lines.popleft())
                filled += _size(window[-1:])
            self.size -= filled
            self.changed.notify_all()
        if not window and isinstance(self.error, OSError):
            reason = self.error.strerror or self.error
            raise DataError(
                f"cannot read the input: {reason}; what came before is translated"
            ) from self.error
        if not window and self.error:
            raise self.error
        return window

    def _read(self) -> None:
        parts: list[bytes] = []  # of the line that has not ended yet
        try:
            while chunk := self._chunk():
                first, *more = chunk.split(b"\n")
                parts.append(first)
                if more:
                    self._add([b"".join(parts), *more[:-1]])
                    parts = [more[-1]]
        except BaseException as error:  # handed over to whoever reads the lines
            self.error = error
        last = b"".join(parts)
        if last:
            self._add([last])
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def _chunk(self) -> bytes:
        """What is there, without waiting for more than something."""
        read = getattr(self.stream, "read1", self.stream.read)
        while (chunk := read(1 << 16)) is None:  # a stream that does not block has nothing yet
            time.sleep(0.01)
        return bytes(chunk)

    def _add(self, lines: list[bytes]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.size < PENDING)
            self.lines.extend(lines)
            self.size += _size(lines)
            self.changed.notify_all()


def _size(lines: Sequence[bytes]) -> int:
    return sum(map(len, lines)) + LINE_BYTES * len(lines)
