from __future__ import annotations

import itertools
import time

import pytest

from trmt import clock, console


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
    assert lines[0] == "reading: 1 of 4 pairs, 2 min 00 s left  fine"
    assert lines[-1] == "reading: 4 of 4 pairs, 0 s left  fine"


def test_earlier_work_does_not_count_for_the_estimate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = itertools.count(0, 40)
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    with console.progress("training", 100, unit="steps", done=90) as bar:
        bar.advance()
    assert capsys.readouterr().err == "training: 91 of 100 steps, 6 min 00 s left\n"


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
    lines = capsys.readouterr().err.splitlines()
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
