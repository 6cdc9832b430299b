from __future__ import annotations

import json
from pathlib import Path

import pytest

from trmt.errors import TrmtError
from trmt.training.logbook import RECENT, Clock, Logbook


def test_lines_are_added_and_half_ones_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    Logbook(path, step=0).write("begin", 0, data="ü\n")
    with path.open("ab") as stream:
        stream.write(b'{"event": "tr')
    Logbook(path, step=3).write("resume", 3)
    entries = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [(entry["event"], entry["step"]) for entry in entries] == [("begin", 0), ("resume", 3)]
    assert entries[0]["data"] == "ü\n"


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    log = Logbook(tmp_path / "gone" / "log.jsonl", step=0)
    with pytest.raises(TrmtError, match=r"cannot write .*log\.jsonl: No such file"):
        log.write("begin", 0)


def test_the_clock_leaves_out_what_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(tokens=50)
    now[0] = 102.0
    assert clock.lap() == 2.0
    now[0] = 900.0
    clock.skip()
    now[0] = 903.0
    assert clock.lap() == 3.0
    assert clock.speed(1050) == pytest.approx(200.0)
    now[0] = 904.0
    clock.lap()
    assert clock.speed(1150) == pytest.approx(100.0)


def test_a_lap_with_a_pause_takes_what_laps_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(tokens=0)
    for _ in range(4):
        now[0] += 2.0
        assert clock.lap() == 2.0
    now[0] += 1000.0
    assert clock.lap(paused=True) == 2.0
    now[0] += 1.0
    assert clock.lap(paused=True) == 1.0, "a pause makes no lap longer"
    assert clock.usual() == 2.0
    assert clock.speed(1100) == pytest.approx(100.0)


def test_the_usual_lap_is_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(tokens=0)
    assert clock.usual() == 0.0
    for seconds in [9.0] * 50 + [1.0] * RECENT:
        now[0] += seconds
        clock.lap()
    assert clock.usual() == pytest.approx(1.0)
