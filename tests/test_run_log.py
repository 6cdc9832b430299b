from __future__ import annotations

import json
from pathlib import Path

import pytest

from trmt.errors import TrmtError
from trmt.training.run_log import RECENT, RunLog, StepClock


def test_lines_are_appended_and_a_partial_one_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    RunLog(path, step=0).write("begin", 0, data="ü\n")
    with path.open("ab") as stream:
        stream.write(b'{"event": "tr')
    RunLog(path, step=3).write("resume", 3)
    entries = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [(entry["event"], entry["step"]) for entry in entries] == [("begin", 0), ("resume", 3)]
    assert entries[0]["data"] == "ü\n"


def test_a_log_that_cannot_be_written_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "gone" / "log.jsonl", step=0)
    with pytest.raises(TrmtError, match=r"cannot write .*log\.jsonl: No such file"):
        log.write("begin", 0)


def test_skipped_time_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = StepClock(tokens=50)
    now[0] = 102.0
    assert clock.end_step() == 2.0
    now[0] = 900.0
    clock.skip()
    now[0] = 903.0
    assert clock.end_step() == 3.0
    assert clock.tokens_per_second(1050) == pytest.approx(200.0)
    now[0] = 904.0
    clock.end_step()
    assert clock.tokens_per_second(1150) == pytest.approx(100.0)


def test_a_step_with_a_pause_counts_as_a_usual_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = StepClock(tokens=0)
    for _ in range(4):
        now[0] += 2.0
        assert clock.end_step() == 2.0
    now[0] += 1000.0
    assert clock.end_step(paused=True) == 2.0
    now[0] += 1.0
    assert clock.end_step(paused=True) == 1.0, "a pause does not make a step longer"
    assert clock.mean_step() == 2.0
    assert clock.tokens_per_second(1100) == pytest.approx(100.0)


def test_the_usual_step_is_the_mean_of_recent_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = StepClock(tokens=0)
    assert clock.mean_step() == 0.0
    for seconds in [9.0] * 50 + [1.0] * RECENT:
        now[0] += seconds
        clock.end_step()
    assert clock.mean_step() == pytest.approx(1.0)
