"""Messages, progress and tables for the user, on standard error: standard output is for data.

Progress is a bar on a terminal, and a plain line with the time every half minute elsewhere. Only this file,
terminal.py and training/display.py import Rich.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from trmt import clock

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
PLAIN_INTERVAL = 30.0  # seconds between progress lines where there is no terminal

_quiet = False
_main_process = True  # of several processes, only this one prints messages
_live: Console | None = None  # the console of the bar on the screen: messages go above it


def set_quiet(quiet: bool) -> None:
    """Silence everything but errors and warnings."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether only errors and warnings are printed."""
    return _quiet


def set_main_process(main: bool) -> None:
    """Silence everything but errors in this process unless it is the main one (rank 0)."""
    global _main_process
    _main_process = main


def _silent() -> bool:
    return _quiet or not _main_process


def stderr() -> Console:
    """A Rich console on standard error."""
    if _live is not None:
        return _live
    from trmt.terminal import plain_console

    # Not cached: tests and callers replace sys.stderr.
    return plain_console(stderr=True)


def stdout() -> Console:
    """A Rich console on standard output."""
    from trmt.terminal import plain_console

    return plain_console()


def is_terminal() -> bool:
    """Whether standard error is a terminal that progress can be drawn on."""
    if _silent() or sys.stderr is None or not sys.stderr.isatty():
        return False
    return os.environ.get("TERM") not in ("dumb", "unknown")


def say(message: str) -> None:
    """Print one line of information: what was chosen, what was written."""
    if not _silent():
        stderr().print(message, style="default")


def log(message: str) -> None:
    """Print one line about the progress of a long job; where it is not a terminal, with the time."""
    say(message if is_terminal() else f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")


def warn(message: str) -> None:
    """Print one line about something that is probably not what the user wants."""
    if _main_process:
        stderr().print(f"warning: {_printable(message)}", style="yellow")


def fail(message: str) -> None:
    """Print the one line of an error."""
    stderr().print(f"error: {_printable(message)}", style="red")


def _printable(message: str) -> str:
    """A message without control characters, which names in damaged files may have."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], message)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, data: bool = False) -> None:
    """Print a small table; columns of numbers are right-aligned.

    `data` is for what a command was called for: it goes to standard output, also if messages are silenced.
    """
    if not _main_process or (_quiet and not data):
        return
    from rich.table import Table
    from rich.text import Text

    body = [list(row) for row in rows]
    terminal = stdout() if data else stderr()
    widths = [max(map(len, cells)) for cells in zip(columns, *body, strict=True)]
    # Rich would wrap a title to the width of the table.
    terminal.print(title)
    natural = sum(widths) + 3 * len(widths) + 1
    if terminal.is_terminal and natural > terminal.width:  # cells would be folded within words
        for row in body:
            terminal.print(
                ", ".join(f"{name} {cell}" for name, cell in zip(columns, row, strict=True) if cell)
            )
        return
    grid = Table()
    for index, column in enumerate(columns):
        numeric = bool(body) and all(_is_number(row[index]) for row in body if row[index])
        grid.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in body:
        grid.add_row(*(Text(cell) for cell in row))
    terminal.print(grid, soft_wrap=False, width=natural)


def _is_number(cell: str) -> bool:
    return cell.strip(" %+-").replace(",", "").replace(".", "").split(" ")[0].isdigit()


class ProgressBar(Protocol):
    """A display of how much of the work is done."""

    def advance(self, amount: float = 1, note: str = "") -> None: ...


class _NoProgress:
    def advance(self, amount: float = 1, note: str = "") -> None:
        pass


class _ProgressLines:
    """Progress for log files: a line every half minute, none for work that takes less."""

    def __init__(self, title: str, total: float | None, unit: str, done: int, *, at_most: bool) -> None:
        self.title, self.total, self.unit, self.at_most = title, total, unit, at_most
        self.done_before, self.done = done, float(done)
        self.started = self.printed = clock.now()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        now = clock.now()
        if now - self.printed < PLAIN_INTERVAL:
            return
        self.printed = now
        of = f" of {self.total:,.0f}" if self.total else ""
        log(f"{self.title}: {self.done:,.0f}{of} {self.unit}{self._eta(now)}{'  ' + note if note else ''}")

    def _eta(self, now: float) -> str:
        if not self.total:
            return f" in {duration(now - self.started)}"
        if self.done <= self.done_before:  # after a rollback of a training run
            return ""
        left = (now - self.started) * (self.total - self.done) / (self.done - self.done_before)
        return f", {'at most ' if self.at_most else ''}{duration(left)} left"


@contextmanager
def progress(
    title: str,
    total: float | None = None,
    *,
    unit: str = "lines",
    done: int = 0,
    at_most: bool = False,
) -> Iterator[ProgressBar]:
    """Progress with an estimate of the time left: a bar on a terminal, plain lines elsewhere.

    `done` is how much an earlier process did; it does not count for the estimate. `at_most` says that it may
    end before the total is reached.
    """
    if _silent():
        yield _NoProgress()
        return
    if not is_terminal():
        yield _ProgressLines(title, total, unit, done, at_most=at_most)
        return
    from trmt.terminal import open_bar

    with live_console() as console, open_bar(console, title, total, unit=unit, done=done) as bar:
        yield bar


@contextmanager
def live_console() -> Iterator[Console]:
    """A console for a live display; until the block ends, messages are printed above the display."""
    global _live
    before, console = _live, stderr()
    _live = console
    try:
        yield console
    finally:
        _live = before


def duration(seconds: float) -> str:
    """A time span for people: 42 s, 3 min 20 s, 2 h 05 min; a question mark if it is not a number."""
    if not math.isfinite(seconds):
        return "?"
    rounded = round(max(seconds, 0))
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
