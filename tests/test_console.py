from __future__ import annotations

import io
import itertools
import re
import time

import pytest
from rich.console import ConsoleDimensions, Group
from rich.text import Text

from trmt import clock, console, terminal


def test_messages_go_to_standard_error_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 100
    console.say(f"[bold]not markup[/bold] :smile: {long}")
    console.warn("careful")
    console.fail("no")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        f"[bold]not markup[/bold] :smile: {long}",
        "warning: careful",
        "error: no",
    ]


def test_quiet_keeps_warnings_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_quiet(True)
    console.say("a")
    console.table("title", ["x"], [["1"]])
    with console.progress("work", 3) as bar:
        bar.advance(3)
    console.warn("b")
    console.fail("c")
    assert capsys.readouterr().err.splitlines() == ["warning: b", "error: c"]


def test_a_table_shows_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("counts", ["what", "how many"], [["[red]", "12"], ["other", "1,345"]])
    shown = capsys.readouterr().err
    for word in ("counts", "what", "how many", "[red]", "12", "1,345"):
        assert word in shown


def test_without_a_terminal_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("work", 10) as bar:
        for _ in range(10):
            bar.advance()
    assert capsys.readouterr().err == ""


def test_without_a_terminal_long_work_prints_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = itertools.count(0, 40)
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    with console.progress("reading", 4, unit="pairs") as bar:
        for _ in range(4):
            bar.advance(1, "fine")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert without_time(lines[0]) == "reading: 1 of 4 pairs, 2 min 00 s left  fine"
    assert without_time(lines[-1]) == "reading: 4 of 4 pairs, 0 s left  fine"


def without_time(line: str) -> str:
    """The line, which must begin with date and time."""
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line), line
    return line[20:]


def test_progress_without_a_total_counts_up_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = itertools.count(0, 40)
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    with console.progress("translating") as bar:
        bar.advance(1_000)
    assert without_time(capsys.readouterr().err) == "translating: 1,000 lines in 40 s\n"


def test_earlier_work_does_not_count_for_the_estimate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = itertools.count(0, 40)
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    with console.progress("training", 100, unit="steps", done=90) as bar:
        bar.advance()
    assert without_time(capsys.readouterr().err) == "training: 91 of 100 steps, 6 min 00 s left\n"


def test_work_that_may_end_early_has_at_most_so_much_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = itertools.count(0, 40)
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    with console.progress("training", 10, unit="steps", at_most=True) as bar:
        bar.advance()
    assert without_time(capsys.readouterr().err) == "training: 1 of 10 steps, at most 6 min 00 s left\n"


def test_suspended_time_does_not_count_for_the_estimate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with console.progress("training", 4, unit="steps") as bar:
        for pause in (0, 86_400):
            now[0] += 40 + pause
            clock.exclude(pause)
            bar.advance()
        bar.advance(-3)  # a rollback
        now[0] += 40
        bar.advance()
    lines = [without_time(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[1] == "training: 2 of 4 steps, 1 min 20 s left"
    assert lines[-1] == "training: 0 of 4 steps"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (-3, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (float("nan"), "?"),
        (float("inf"), "?"),
    ],
)
def test_durations_are_rounded_for_people(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_other_processes_print_errors_only(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_main_process(False)
    try:
        console.say("hello")
        console.warn("careful")
        console.table("numbers", ["a"], [["1"]])
        with console.progress("work", 3) as bar:
            bar.advance()
        assert capsys.readouterr().err == ""
        console.fail("broken")
        assert capsys.readouterr().err == "error: broken\n"
    finally:
        console.set_main_process(True)


# On a terminal


WIDTHS = [20, 40, 60, 61, 79, 80, 120, 300]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("total", [None, 12_345_678])
def test_a_bar_shows_what_fits_and_cuts_nothing(
    monkeypatch: pytest.MonkeyPatch, width: int, total: int | None
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar = terminal.Bar("dropping duplicates", total, "pairs", 0)
    now[0] = 100.0
    bar.advance(1_234_567, "loss 2.345  12,345 tokens/s")
    line = bar.line(width - 1).plain
    assert len(line) < width and "…" not in line
    if width >= 60:
        assert "dropping duplicates" in line and ("1,234,567" in line or "10%" in line)
        assert ("15 min 00 s left" in line) == (total is not None)
    if width >= 300:
        assert "1,234,567" in line and "loss 2.345  12,345 tokens/s" in line and "1 min 40 s elapsed" in line
        assert ("━" in line) == (total is not None)


class Screen:
    """A terminal that wraps its lines anew when it is resized, with what is above it."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.lines: list[str] = [""]  # logical lines
        self.row = 0  # of the cursor, counted in rows from the top
        self.column = 0

    def rows(self) -> list[tuple[int, int]]:
        """(logical line, where it begins in it) of each row."""
        return [
            (number, start)
            for number, line in enumerate(self.lines)
            for start in range(0, max(len(line), 1), self.width)
        ]

    def resize(self, width: int) -> None:
        number, start = self.rows()[self.row]
        at = start + self.column
        self.width = width
        self._move_to(number, at)

    def _move_to(self, line: int, at: int) -> None:
        """Put the cursor behind so many characters of a logical line."""
        rows = self.rows()
        self.row = max(
            index for index, (one, begin) in enumerate(rows) if one == line and begin <= max(at - 1, 0)
        )
        self.column = at - rows[self.row][1]

    def write(self, text: str) -> None:
        for found in re.finditer(r"\x1b\[([\d;?]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+", text):
            self._do(found[0], found[1], found[2])

    def _do(self, text: str, number: str | None, command: str | None) -> None:
        line, start = self.rows()[self.row]
        if command == "A":
            self.row = max(self.row - int(number or 1), 0)
        elif command == "K":
            before, after = self.lines[line][:start], self.lines[line][start + self.width :]
            self.lines[line : line + 1] = [*([before] if start else []), "", *([after] if after else [])]
        elif text == "\r":
            self.column = 0
        elif text == "\n":
            self.row += 1
            self.column = 0
            if self.row == len(self.rows()):
                self.lines.append("")
        elif command is None:
            at = start + self.column
            before = self.lines[line].ljust(at)
            self.lines[line] = before[:at] + text + before[at + len(text) :]
            self._move_to(line, at + len(text))

    def shown(self) -> list[str]:
        return [line for line in self.lines if line.strip()]


@pytest.mark.parametrize("widths", [(100, 60), (100, 30, 100), (60, 59, 58, 57), (100, 20, 50, 25)])
def test_resizing_leaves_nothing_behind(widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in terminal.CUTTING:
        monkeypatch.delenv(name, raising=False)
    screen = Screen(widths[0])

    class Stream(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            screen.write(text)
            return len(text)

    drawn = terminal.plain_console(file=Stream(), force_terminal=True, width=widths[0], height=40)
    view = Group(*(Text(f"line {number} ".ljust(widths[0] - 1, "x"), no_wrap=True) for number in range(5)))
    drawn.print("a message")
    with terminal.ResizableLive(view, console=drawn, auto_refresh=False, redirect_stdout=False) as live:
        live.refresh()
        for width in widths[1:]:
            screen.resize(width)
            drawn.size = ConsoleDimensions(width, 40)
            live.refresh()
            drawn.print(f"now {width} wide")
            heads = [line[:6] for line in screen.shown() if line.startswith("line")]
            assert heads == [f"line {number}" for number in range(5)], screen.lines
    said = [line for line in screen.shown() if not line.startswith("line")]
    assert said == ["a message", *(f"now {width} wide" for width in widths[1:])]
