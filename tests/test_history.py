from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from tests import toy
from trmt.errors import DataError
from trmt.training.history import TRAIN, VALIDATE, History, best, numbers
from trmt.training.run import train as train_run


def train(step: int, loss: float | None = None, **more: Any) -> dict[str, Any]:
    return {"event": TRAIN, "step": step, "time": 1.5, "loss": 1.0 / step if loss is None else loss, **more}


def validate(step: int, **scores: float) -> dict[str, Any]:
    named = [{"metric": name, "value": value} for name, value in scores.items()]
    return {"event": VALIDATE, "step": step, "scores": named, "seconds": 3.5}


def history(*entries: dict[str, Any]) -> History:
    made = History()
    for entry in entries:
        made.add(entry)
    return made


def steps(made: History, event: str = TRAIN, name: str = "loss") -> list[int]:
    return [point.step for point in made.curve(event, name)]


def test_a_resumed_run_draws_each_step_once_with_its_last_value() -> None:
    made = history(
        {"event": "begin", "step": 0},
        *(train(step, loss=1.0) for step in range(100, 901, 100)),
        validate(800, chrf=20.0),
        {"event": "resume", "step": 800},
        train(900, loss=2.0),
        train(1000, loss=2.0),
    )
    assert steps(made) == list(range(100, 1001, 100))
    assert [point.value for point in made.curve(TRAIN, "loss")] == [1.0] * 8 + [2.0] * 2
    assert steps(made, VALIDATE, "chrf") == [800]


def test_what_was_killed_before_its_first_checkpoint_does_not_count() -> None:
    made = history(train(5), train(10), {"event": "begin", "step": 0}, train(5, loss=9.0))
    assert [point.value for point in made.curve(TRAIN, "loss")] == [9.0]


def test_going_back_over_a_spike_takes_back_what_came_after() -> None:
    made = history(
        train(10), train(20), validate(20, loss=3.0), train(30), {"event": "rollback", "step": 30, "to": 10}
    )
    assert steps(made) == [10]
    assert made.metrics() == [] or not made.curve(VALIDATE, "loss")
    # The log of a step may say something about an earlier one without going back.
    made = history(train(10), train(20), {"event": "skipped", "step": 12})
    assert steps(made) == [10, 20]


def test_however_often_it_is_interrupted_the_line_is_that_of_the_last_way() -> None:
    for seed in range(50):
        chooser = random.Random(seed)
        made, truth, step = History(), {}, 0
        for _ in range(200):
            if step and chooser.random() < 0.15:
                step = chooser.randrange(step + 1)
                made.add({"event": "resume", "step": step})
                truth = {at: value for at, value in truth.items() if at <= step}
            step += 1
            if step % 3 == 0:
                truth[step] = chooser.random()
                made.add(train(step, loss=truth[step]))
        assert {point.step: point.value for point in made.curve(TRAIN, "loss")} == truth
        assert steps(made) == sorted(truth)
        assert [entry["step"] for entry in made.entries] == sorted(truth)


def test_values_that_cannot_be_drawn_are_left_out() -> None:
    made = history(
        train(1), {**train(2), "loss": None}, train(3, loss=math.nan), train(4, loss=math.inf), train(5)
    )
    assert steps(made) == [1, 5]


def test_numbers_are_what_curves_are_drawn_of() -> None:
    entry = train(3, loss=0.5, lr=0.1, epoch=1, tokens=7, elapsed=2.5, memory=9)
    assert numbers(entry) == {"loss": 0.5, "lr": 0.1}
    assert numbers(validate(3, chrf=5, loss=0.25)) == {"chrf": 5.0, "loss": 0.25}


def test_points_know_tokens_and_hours() -> None:
    [point, older] = history(train(3, tokens=900, elapsed=7200), train(4)).curve(TRAIN, "loss")
    assert (point.tokens, point.hours) == (900, 2.0)
    assert (older.tokens, older.hours) == (None, None)


def test_a_log_is_read_line_by_line_and_half_a_line_is_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = "\n".join(json.dumps(train(step)) for step in (1, 2))
    path.write_text(f'{whole}\nnonsense\n[1]\n{{"event": "train"}}\n{{"event": "train", "step": 3, "lo')
    read = History.read(path)
    assert steps(read) == [1, 2]
    assert read.damaged == 3


def test_a_log_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*log\.jsonl: No such file.*trmt train"):
        History.read(tmp_path / "log.jsonl")


def test_the_last_entries_are_found() -> None:
    made = history(train(1), validate(1, chrf=1.0), train(2), validate(2, chrf=2.0, loss=1.0), train(3))
    latest, before = made.last(VALIDATE), made.last(VALIDATE, back=1)
    assert latest and before and (latest["step"], before["step"]) == (2, 1)
    assert made.last(VALIDATE, back=2) is None
    assert made.metrics() == ["chrf", "loss"]


def test_the_best_loss_is_the_lowest() -> None:
    made = history(
        *(validate(step, chrf=value, loss=value) for step, value in ((1, 5.0), (2, 7.0), (3, 7.0)))
    )
    high, low = best(made.curve(VALIDATE, "chrf"), "chrf"), best(made.curve(VALIDATE, "loss"), "loss")
    assert high and low and (high.step, low.step) == (2, 1)
    assert best([], "chrf") is None


def test_a_run_goes_on_from_its_past_and_without_its_log(toy_set: Path, tmp_path: Path) -> None:
    recipe, folder = toy.recipe(tmp_path), tmp_path / "run"
    train_run(toy.options(folder, toy_set, recipe, "training.steps=4"))
    train_run(toy.options(folder, toy_set, recipe, "training.steps=6"))
    assert steps(History.read(folder / "log.jsonl")) == [2, 4, 6]
    (folder / "log.jsonl").unlink()
    train_run(toy.options(folder, toy_set, recipe, "training.steps=8"))
    assert steps(History.read(folder / "log.jsonl")) == [8]
