"""What a person sees: messages, progress and tables, always on standard error.

With display.py the only file that knows Rich. Standard output belongs to data. Progress is drawn only on a
terminal; elsewhere a plain line now and then says the same.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from trmt import pauses

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

PLAIN_INTERVAL = 30.0  # seconds between progress lines where no terminal is watching

_quiet = False
_following = False  # whether another process speaks for this one
_drawing: Console | None = None  # the console of the bar that is on the screen: lines go above it


def set_quiet(quiet: bool) -> None:
    """Silence everything but errors and warnings."""
    global _quiet
    _quiet = quiet


def set_following(following: bool) -> None:
    """Silence everything but errors: of several processes that do the same, one speaks."""
    global _following
    _following = following


def stderr() -> Console:
    """Standard error as Rich sees it."""
    from rich.console import Console

    if _drawing is not None:
        return _drawing
    # Made anew each time: tests and callers exchange sys.stderr, and a cached console would keep the old one.
    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def watched() -> bool:
    """Whether a person is looking at standard error, on a terminal that can be drawn on."""
    if _quiet or _following or sys.stderr is None or not sys.stderr.isatty():
        return False
    return os.environ.get("TERM") not in ("dumb", "unknown")


def say(message: str) -> None:
    """One line of information: what was chosen, what was written."""
    if not (_quiet or _following):
        stderr().print(message, style="default")


def warn(message: str) -> None:
    """One line about something that is probably not what the user wants."""
    if not _following:
        stderr().print(f"warning: {message}", style="yellow")


def fail(message: str) -> None:
    """The one line an error ends with."""
    stderr().print(f"error: {message}", style="red")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A small table; columns whose cells are numbers are set to the right."""
    if _quiet or _following:
        return
    from rich.table import Table
    from rich.text import Text

    body = [list(row) for row in rows]
    grid = Table()
    for index, column in enumerate(columns):
        numeric = bool(body) and all(_is_number(row[index]) for row in body if row[index])
        grid.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in body:
        grid.add_row(*(Text(cell) for cell in row))
    # Rich would fold a title to the width of the table.
    stderr().print(title)
    stderr().print(grid, soft_wrap=False)


def _is_number(cell: str) -> bool:
    return cell.strip(" %+-").replace(",", "").replace(".", "").split(" ")[0].isdigit()


class Progress(Protocol):
    """Something that can be told how far the work has come."""

    def advance(self, amount: float = 1, note: str = "") -> None: ...


class _Silent:
    def advance(self, amount: float = 1, note: str = "") -> None:
        pass


class _Lines:
    """Progress for log files: a line every half minute, none for work that ends before."""

    def __init__(self, title: str, total: float | None, unit: str, done: int) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.before, self.done = done, float(done)
        self.began = self.spoke = pauses.now()

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.done += amount
        now = pauses.now()
        if now - self.spoke < PLAIN_INTERVAL:
            return
        self.spoke = now
        of = f" of {self.total:,.0f}" if self.total else ""
        say(f"{self.title}: {self.done:,.0f}{of} {self.unit}{self._eta(now)}{'  ' + note if note else ''}")

    def _eta(self, now: float) -> str:
        if not self.total or self.done <= self.before:  # less, where a run has gone back
            return ""
        left = (now - self.began) * (self.total - self.done) / (self.done - self.before)
        return f", {duration(left)} left"


class _Bar:
    def __init__(self, bar: object, task: object) -> None:
        self.bar, self.task = bar, task

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.bar.update(self.task, advance=amount, note=note)  # type: ignore[attr-defined]


@contextmanager
def progress(
    title: str, total: float | None = None, *, unit: str = "lines", done: int = 0
) -> Iterator[Progress]:
    """Progress with an estimate of the time left: a bar on a terminal, plain lines elsewhere.

    `done` is what was done before, at another time.
    """
    if _quiet or _following:
        yield _Silent()
        return
    if not watched():
        yield _Lines(title, total, unit, done)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with drawing() as console, Bars(*columns, console=console, transient=True, get_time=pauses.now) as bars:
        yield _Bar(bars, bars.add_task(title, total=total, completed=done, note=""))


@contextmanager
def drawing() -> Iterator[Console]:
    """A console to draw on; until the block ends, messages go above what is drawn there."""
    global _drawing
    before, console = _drawing, stderr()
    _drawing = console
    try:
        yield console
    finally:
        _drawing = before


def duration(seconds: float) -> str:
    """A time span as people say it: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = round(max(seconds, 0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
