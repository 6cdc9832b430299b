from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from tests import toy
from trmt.errors import DataError
from trmt.training.history import TRAIN, VALIDATE, History, best, numeric_values
from trmt.training.run import train as train_run


def train(step: int, loss: float | None = None, **more: Any) -> dict[str, Any]:
    return {"event": TRAIN, "step": step, "time": 1.5, "loss": 1.0 / step if loss is None else loss, **more}


def validate(step: int, **scores: float) -> dict[str, Any]:
    named = [{"metric": name, "value": value} for name, value in scores.items()]
    return {"event": VALIDATE, "step": step, "scores": named, "seconds": 3.5}


def history(*entries: dict[str, Any]) -> History:
    found = History()
    for entry in entries:
        found.add(entry)
    return found


def steps(found: History, event: str = TRAIN, name: str = "loss") -> list[int]:
    return [point.step for point in found.curve(event, name)]


def test_a_resumed_run_has_each_step_once_with_its_last_value() -> None:
    found = history(
        {"event": "begin", "step": 0},
        *(train(step, loss=1.0) for step in range(100, 901, 100)),
        validate(800, chrf=20.0),
        {"event": "resume", "step": 800},
        train(900, loss=2.0),
        train(1000, loss=2.0),
    )
    assert steps(found) == list(range(100, 1001, 100))
    assert [point.value for point in found.curve(TRAIN, "loss")] == [1.0] * 8 + [2.0] * 2
    assert steps(found, VALIDATE, "chrf") == [800]


def test_steps_before_a_new_start_do_not_count() -> None:
    found = history(train(5), train(10), {"event": "begin", "step": 0}, train(5, loss=9.0))
    assert [point.value for point in found.curve(TRAIN, "loss")] == [9.0]


def test_a_rollback_removes_the_steps_after_its_checkpoint() -> None:
    found = history(
        train(10), train(20), validate(20, loss=3.0), train(30), {"event": "rollback", "step": 30, "to": 10}
    )
    assert steps(found) == [10]
    assert found.metrics() == [] or not found.curve(VALIDATE, "loss")
    # An event about an earlier step is not a rollback.
    found = history(train(10), train(20), {"event": "skipped", "step": 12})
    assert steps(found) == [10, 20]


def test_after_any_number_of_interruptions_the_curve_is_that_of_the_last_attempt() -> None:
    for seed in range(50):
        generator = random.Random(seed)
        found, truth, step = History(), {}, 0
        for _ in range(200):
            if step and generator.random() < 0.15:
                step = generator.randrange(step + 1)
                found.add({"event": "resume", "step": step})
                truth = {at: value for at, value in truth.items() if at <= step}
            step += 1
            if step % 3 == 0:
                truth[step] = generator.random()
                found.add(train(step, loss=truth[step]))
        assert {point.step: point.value for point in found.curve(TRAIN, "loss")} == truth
        assert steps(found) == sorted(truth)
        assert [entry["step"] for entry in found.entries] == sorted(truth)


def test_values_that_are_not_finite_are_not_in_curves() -> None:
    found = history(
        train(1), {**train(2), "loss": None}, train(3, loss=math.nan), train(4, loss=math.inf), train(5)
    )
    assert steps(found) == [1, 5]


def test_numeric_values_are_floats_and_scores() -> None:
    entry = train(3, loss=0.5, lr=0.1, epoch=1, tokens=7, elapsed=2.5, memory=9)
    assert numeric_values(entry) == {"loss": 0.5, "lr": 0.1}
    assert numeric_values(validate(3, chrf=5, loss=0.25)) == {"chrf": 5.0, "loss": 0.25}


def test_points_have_tokens_and_hours() -> None:
    [point, older] = history(train(3, tokens=900, elapsed=7200), train(4)).curve(TRAIN, "loss")
    assert (point.tokens, point.hours) == (900, 2.0)
    assert (older.tokens, older.hours) == (None, None)


def test_a_log_is_read_line_by_line_without_a_partial_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = "\n".join(json.dumps(train(step)) for step in (1, 2))
    path.write_text(f'{whole}\nnonsense\n[1]\n{{"event": "train"}}\n{{"event": "train", "step": 3, "lo')
    read = History.read(path)
    assert steps(read) == [1, 2]
    assert read.damaged == 3


def test_a_missing_log_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*log\.jsonl: No such file.*trmt train"):
        History.read(tmp_path / "log.jsonl")


def test_the_last_entries_are_found() -> None:
    found = history(train(1), validate(1, chrf=1.0), train(2), validate(2, chrf=2.0, loss=1.0), train(3))
    latest, before = found.last(VALIDATE), found.last(VALIDATE, back=1)
    assert latest and before and (latest["step"], before["step"]) == (2, 1)
    assert found.last(VALIDATE, back=2) is None
    assert found.metrics() == ["chrf", "loss"]


def test_the_best_loss_is_the_lowest() -> None:
    found = history(
        *(validate(step, chrf=value, loss=value) for step, value in ((1, 5.0), (2, 7.0), (3, 7.0)))
    )
    high, low = best(found.curve(VALIDATE, "chrf"), "chrf"), best(found.curve(VALIDATE, "loss"), "loss")
    assert high and low and (high.step, low.step) == (2, 1)
    assert best([], "chrf") is None


def test_a_run_can_be_resumed_with_and_without_its_log(toy_set: Path, tmp_path: Path) -> None:
    recipe, folder = toy.recipe(tmp_path), tmp_path / "run"
    train_run(toy.options(folder, toy_set, recipe, "training.steps=4"))
    train_run(toy.options(folder, toy_set, recipe, "training.steps=6"))
    assert steps(History.read(folder / "log.jsonl")) == [2, 4, 6]
    (folder / "log.jsonl").unlink()
    train_run(toy.options(folder, toy_set, recipe, "training.steps=8"))
    assert steps(History.read(folder / "log.jsonl")) == [8]
