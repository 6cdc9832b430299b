"""Drawing on a terminal with Rich: consoles, one progress bar, and live views that can be resized."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.live import Live
from rich.live_render import LiveRender
from rich.segment import Segment
from rich.text import Text

from trmt import clock

BAR = 24  # columns of a bar
REFRESH = 4.0  # updates of a bar in a second
# Programs whose lines are cut off when the terminal gets narrower, and not wrapped.
CUTTING = ("XTERM_VERSION", "STY")


class PipedConsole(Console):
    """A console that raises BrokenPipeError if its reader has gone; Rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def plain_console(**where: Any) -> Console:
    """A console that prints text as it is, in one line however long."""
    return PipedConsole(highlight=False, soft_wrap=True, markup=False, emoji=False, **where)


class _Frame(LiveRender):
    """What a live view has drawn; it knows how many rows that takes after the terminal got narrower."""

    console: Console
    widths: tuple[int, ...] = ()  # of the lines that were drawn
    drawn_at = 0  # the width of the terminal then

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        segments = [each for each in super().__rich_console__(console, options) if isinstance(each, Segment)]
        lines = "".join(each.text for each in segments if not each.control).split("\n")
        self.widths, self.drawn_at = tuple(map(cell_len, lines)), options.size.width
        yield from segments

    def position_cursor(self) -> Any:
        self._count_rows()
        return super().position_cursor()

    def restore_cursor(self) -> Any:
        self._count_rows()
        return super().restore_cursor()

    def _count_rows(self) -> None:
        width = self.console.size.width
        if self._shape and width < self.drawn_at and not any(map(os.environ.get, CUTTING)):
            rows = sum(max(-(-columns // width), 1) for columns in self.widths)
            self._shape = (width, min(rows, self.console.size.height))


class ResizableLive(Live):
    """A live view of which nothing is left behind when the terminal gets narrower and wraps it."""

    def __init__(self, view: ConsoleRenderable, **options: Any) -> None:
        super().__init__(view, **options)
        frame = _Frame(view, vertical_overflow=self.vertical_overflow)
        frame.console = self.console
        self._live_render = frame


class Bar:
    """A progress bar in one line, with as many details as the width of the terminal allows."""

    def __init__(self, title: str, total: float | None, unit: str, done: int) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done_before, self.done, self.note = done, float(done), ""
        self.began = clock.now()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count work that was done."""
        self.done += amount
        self.note = note

    def __rich_console__(self, terminal: Console, options: ConsoleOptions) -> RenderResult:
        yield self.line(terminal.size.width - 1, plain=options.ascii_only)

    def line(self, width: int, *, plain: bool = False) -> Text:
        """The title and the count, and of the rest what fits."""
        from trmt.console import duration

        elapsed, taken = clock.now() - self.began, self.done - self.done_before
        of = f" of {self.total:,.0f}" if self.total else ""
        count = Text(f"{self.done:,.0f}{of} {self.unit}")
        left = ""
        if self.total and taken > 0:
            left = f"{duration(elapsed * max(self.total - self.done, 0) / taken)} left"
        share = min(self.done / self.total, 1.0) if self.total else 0.0
        optional = {  # the most important first
            "left": Text(left, "bold"),
            "note": Text(self.note),
            "bar": bar(share, BAR, plain=plain) if self.total else Text(),
            "elapsed": Text(f"{duration(elapsed)} elapsed", "dim"),
        }
        if left and cell_len(f"{self.title}  {count}  {left}") > width:
            count = Text(f"{share:.0%}")
        shown = {"title": Text(self.title), "count": count}
        for name, text in optional.items():
            taken_columns = sum(cell_len(each.plain) + 2 for each in shown.values())
            if text and taken_columns + cell_len(text.plain) <= width:
                shown[name] = text
        order = ("title", "bar", "count", "elapsed", "left", "note")
        line = Text("  ").join(shown[name] for name in order if name in shown)
        line.truncate(max(width, 1))  # of a terminal that is too narrow for anything
        line.no_wrap = True
        return line


def bar(share: float, columns: int, *, plain: bool) -> Text:
    """A bar of which a share is full."""
    full = int(share * columns)
    done, left = ("#", "-") if plain else ("━", "─")
    return Text.assemble((done * full, "green"), (left * (columns - full), "dim"))


@contextmanager
def open_bar(console: Console, title: str, total: float | None, *, unit: str, done: int) -> Iterator[Bar]:
    """A bar on a terminal until the block ends; then it disappears."""
    found = Bar(title, total, unit, done)
    with ResizableLive(found, console=console, transient=True, refresh_per_second=REFRESH):
        yield found
