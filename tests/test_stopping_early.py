"""When training ends by itself, what is said of it, and the schedule of fine-tuning."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import toy
from tests.contracts.test_training import final, log
from tests.toy import options
from trmt.bundles import checkpoints
from trmt.errors import ConfigError
from trmt.sets.index import FORMAT
from trmt.training import fine_tuning, overfitting, planning
from trmt.training.history import TRAIN, VALIDATE, History
from trmt.training.planning import TrainOptions
from trmt.training.recipe import Recipe, TrainingConfig, load_recipe, read_recipe
from trmt.training.run import TrainingRun, train
from trmt.training.state import TrainProgress
from trmt.training.stopping import ending
from trmt.training.validation import ValidationResult

CHRF = ["validation.metric=chrf", "validation.sentences=5", "validation.every=1", "training.steps=20"]


def scripted(values: list[float]) -> Callable[..., ValidationResult]:
    """Validations with these scores, one after the other; the last one repeats."""
    left = list(values)

    def validate(*_: Any) -> ValidationResult:
        value = left.pop(0) if len(left) > 1 else left[0]
        return ValidationResult(({"metric": "chrf", "value": value, "signature": "s", "set": "dev"},))

    return validate


# Patience


def test_training_ends_when_the_dev_set_stands_still(
    toy_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    recipe = toy.recipe(tmp_path, {"training": {"patience": 3}})
    train(options(run, toy_set, recipe, *CHRF), scripted([10.0, 30.0, 30.0]))
    assert checkpoints.list_checkpoints(run)[-1].step == 5
    said = capsys.readouterr().err
    assert re.search(
        r"done: 5 steps in .* of validation, ended because the last 3 validations brought no better dev chrF",
        said,
    )
    assert f"best: dev chrF 30.00 at step 2 -> {run}\nnext: trmt average {run}" in said
    (end,) = log(run, "end")
    assert "no better dev chrF" in end["reason"]
    train(options(run, toy_set, recipe, *CHRF), scripted([0.0]))
    said = capsys.readouterr().err
    assert "has ended at step 5 because" in said and "raise training.patience to go on" in said


@pytest.mark.parametrize("warmup", [0, 1000])
def test_only_a_score_above_all_before_is_called_the_best(
    toy_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], warmup: int
) -> None:
    recipe = toy.recipe(tmp_path, {"optim": {"warmup": warmup}})
    settings = (*CHRF, "training.steps=6", "training.patience=0")
    train(options(tmp_path / "run", toy_set, recipe, *settings), scripted([5.0, 3.0, 6.0, 6.0, 4.0, 7.0]))
    said = capsys.readouterr().err
    assert re.findall(r"step (\d+): .*\(best\)", said) == ["1", "3", "6"]


def test_without_patience_training_never_ends_early(toy_set: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(options(run, toy_set, toy.recipe(tmp_path), *CHRF, "training.patience=0"), scripted([10.0, 5.0]))
    assert checkpoints.list_checkpoints(run)[-1].step == 20
    (end,) = log(run, "end")
    assert end["reason"] == "training.steps = 20 is reached"


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_resumed_run_ends_early_at_the_same_step(toy_set: Path, tmp_path: Path, stop: int) -> None:
    values = [10.0, 30.0, 20.0, 29.0, 25.0]
    recipe = toy.recipe(tmp_path, {"training": {"patience": 3}})
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(options(whole, toy_set, recipe, *CHRF), scripted(values))
    train(options(resumed, toy_set, recipe, *CHRF, f"training.steps={stop}"), scripted(values))
    train(options(resumed, toy_set, recipe, *CHRF), scripted(values[stop:]))
    assert final(resumed, 5) == final(whole, 5)
    assert [each["step"] for each in log(resumed, "validate")] == [1, 2, 3, 4, 5]


def test_validations_during_the_warm_up_do_not_end_training() -> None:
    progress = TrainProgress()
    for step in range(1, 9):
        progress.step = step
        progress.add_score(1.0, lower_is_better=False, warmup=6)
    assert progress.validations_since_best == 3, "steps 6, 7 and 8"


@pytest.mark.parametrize(
    ("training", "last_step", "expected"),
    [
        ({"steps": 9}, 9, "training.steps"),
        ({"steps": 99, "epochs": 1}, 9, "training.epochs"),
        ({"steps": 99, "patience": 4}, 99, "training.patience"),
        ({"steps": 99, "patience": 5}, 99, None),
        ({"steps": 99, "patience": 0}, 99, None),
    ],
)
def test_the_setting_that_ended_a_run_is_named(
    training: dict[str, Any], last_step: int, expected: str | None
) -> None:
    progress = TrainProgress(step=9, validations_since_best=4)
    found = ending(Recipe(training=TrainingConfig(**training)), progress, last_step=last_step)
    assert (found and found.setting) == expected


# A resumed run keeps what it began with


def begin(run: Path, data: Path, recipe: str, *settings: str, **more: Any) -> None:
    train(options(run, data, recipe, "training.steps=3", *settings, **more))


def resumed(run: Path, data: Path, recipe: str, *settings: str, **more: Any) -> Recipe:
    """The recipe with which a run goes on."""
    return TrainingRun.from_options(options(run, data, recipe, *settings, **more)).recipe


@pytest.fixture
def unsaid(tmp_path: Path) -> str:
    """A recipe that does not name patience."""
    path = Path(toy.recipe(tmp_path))
    text, count = re.subn("patience = 0\n", "", path.read_text("utf-8"))
    assert count == 1
    path.write_text(text, "utf-8")
    return str(path)


def test_a_new_run_has_patience_and_an_old_one_without_it_stays_without(
    toy_set: Path, tmp_path: Path, unsaid: str
) -> None:
    run = tmp_path / "run"
    assert resumed(run, toy_set, unsaid).training.patience == TrainingConfig().patience > 0
    begin(run, toy_set, unsaid, "training.patience=0")
    assert resumed(run, toy_set, unsaid).training.patience == 0
    assert resumed(run, toy_set, unsaid, "training.patience=4").training.patience == 4
    config = run / "config.toml"
    config.write_text(config.read_text("utf-8").replace("patience = 0\n", ""), "utf-8")
    assert read_recipe(config).training.patience == 0, "of a version without patience"
    assert resumed(run, toy_set, unsaid).training.patience == 0


def test_a_run_with_the_recipe_that_another_version_selected_is_resumed(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data/some"
    shutil.copytree(toy_set, data)
    few = ["validation.metric=loss", "validation.sentences=0", "training.steps=1", 'training.device="cpu"']

    def chosen() -> str:
        return TrainingRun.from_options(TrainOptions(data=data, settings=few)).folder.name

    assert chosen() == "some-transformer-low-resource"
    train(TrainOptions(data=data, recipe="transformer-tiny", settings=few))
    assert chosen() == "some-transformer-tiny"
    assert "recipe: transformer-tiny (of a run on this data)" in capsys.readouterr().err
    (tmp_path / "models/some-transformer-tiny/origin.json").write_text(
        '{"data": "other", "fingerprint": "other"}', "utf-8"
    )
    assert chosen() == "some-transformer-low-resource", "a run on other data is another run"


# Fine-tuning


@pytest.fixture
def parent(toy_set: Path, tmp_path: Path) -> Path:
    run = tmp_path / "parent"
    train(options(run, toy_set, toy.recipe(tmp_path)))
    return run


def test_fine_tuning_has_a_schedule_of_its_own(
    toy_set: Path, tmp_path: Path, parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, name = tmp_path / "tuned", "transformer-tiny"
    plain = load_recipe(name)
    found = resumed(run, toy_set, name, init_from=parent)
    assert found.optim.lr == pytest.approx(fine_tuning.highest_rate(plain) / 10)
    assert found.optim.warmup < plain.optim.warmup
    assert found.training.steps < plain.training.steps
    assert found.validation.every < plain.validation.every
    assert found.training.patience > 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("fine-tuning: "))
    assert f"optim.lr = {found.optim.lr}" in line and f"training.steps = {found.training.steps}" in line
    assert resumed(run, toy_set, name).optim == plain.optim, "only with --init-from"


def test_settings_of_the_user_replace_the_schedule_of_fine_tuning(
    toy_set: Path, tmp_path: Path, parent: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, name = tmp_path / "tuned", "transformer-tiny"
    found = resumed(run, toy_set, name, "optim.lr=1e-5", "training.steps=7", init_from=parent)
    assert (found.optim.lr, found.training.steps) == (1e-5, 7)
    assert "optim.lr" not in capsys.readouterr().err
    found = resumed(run, toy_set, name, "optim.schedule=paper", init_from=parent)
    assert (found.optim.lr, found.optim.warmup) == (2e-3, 400), "a rate is for one schedule"
    mine = toy.recipe(tmp_path)
    assert resumed(run, toy_set, mine, init_from=parent).optim == load_recipe(mine).optim


def test_a_resumed_fine_tuning_keeps_its_schedule(
    toy_set: Path, tmp_path: Path, parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, name = tmp_path / "tuned", "transformer-tiny"
    few = ["validation.metric=loss", "validation.sentences=0", "training.steps=2", 'training.device="cpu"']
    train(options(run, toy_set, name, *few, init_from=parent))
    begun = read_recipe(run / "config.toml")
    monkeypatch.setattr(fine_tuning, "RATE", 0.5)  # as another version might choose
    for found in (
        resumed(run, toy_set, name, *few, init_from=parent),
        TrainingRun.from_options(TrainOptions(run=run, settings=few)).recipe,
    ):
        assert found == begun
    # A run of a version without such a schedule has that of its recipe, and keeps it.
    shutil.rmtree(run)
    with monkeypatch.context() as patch:
        patch.setattr(planning, "_fine_tuning", lambda *_, **__: {})
        train(options(run, toy_set, name, *few, init_from=parent))
    assert resumed(run, toy_set, name, *few, init_from=parent).optim == load_recipe(name).optim


def test_pretrained_models_and_encoders_are_trained_by_the_whole_recipe(
    toy_set: Path, tmp_path: Path, parent: Path
) -> None:
    name = "transformer-tiny"
    run = tmp_path / "tuned"
    encoder = Path(f"{parent}:encoder")
    settings = ("network.d_model=16", "network.feed_forward=32", "network.heads=2")
    try:
        found = resumed(run, toy_set, name, *settings, init_from=encoder)
    except ConfigError as error:  # the toy has other sizes
        pytest.fail(str(error))
    assert found.optim == load_recipe(name).optim
    record = parent / "data.json"
    index = {"format": FORMAT, "kind": "documents", "languages": ["x", ""]}
    index |= {"corpora": [], "files": {}, "splits": {}}
    record.write_text(json.dumps(index), "utf-8")
    assert resumed(run, toy_set, name, init_from=parent).optim == load_recipe(name).optim


# Overfitting


def history(train_losses: list[float], dev_losses: list[float]) -> History:
    """Ten training entries before each validation, at every hundredth step."""
    found = History()
    for number, (train_loss, dev_loss) in enumerate(zip(train_losses, dev_losses, strict=True), start=1):
        for tenth in range(10):
            step = 100 * number - 90 + 10 * tenth
            found.add({"event": TRAIN, "step": step, "loss": train_loss + 0.001 * (tenth % 2)})
        found.add(
            {"event": VALIDATE, "step": 100 * number, "scores": [{"metric": "loss", "value": dev_loss}]}
        )
    return found


FALLING = [3.0 - 0.1 * number for number in range(20)]


@pytest.mark.parametrize(
    ("dev", "shown"),
    [
        ([3.2, 3.0, 2.8, 2.82, 2.83, 2.85], 6),  # at validation 6, three above the lowest
        ([3.2, 3.0, 2.8, 2.82, 2.79, 2.85], 0),  # too few since the lowest
        ([3.2, 3.0, 2.8, 2.801, 2.802, 2.803], 0),  # noise
        ([3.2, 3.0, 2.8, 2.82, 2.83, 2.801], 0),  # back again
        ([3.2, 3.0, 2.9, 2.8, 2.7, 2.6], 0),
    ],
)
def test_overfitting_is_a_rising_dev_loss_at_a_falling_training_loss(dev: list[float], shown: int) -> None:
    found = overfitting.find(history(FALLING[: len(dev)], dev))
    assert (found is not None) == bool(shown)
    if found:
        assert (found.since, found.dev_loss) == (300, (2.8, 2.85))
        assert found.train_loss == pytest.approx((2.8, 2.5), abs=0.01)
    level = overfitting.find(history([2.0] * len(dev), dev))
    assert level is None, "the training loss stands still, too"


def test_overfitting_is_named_once_for_each_lowest_dev_loss() -> None:
    dev = [2.8, 2.9, 3.0, 3.1, 3.2, 2.7, 2.9, 2.8, 2.9, 3.0]
    named = [
        count for count in range(1, len(dev) + 1) if overfitting.find(history(FALLING[:count], dev[:count]))
    ]
    assert named == [4, 9]


def test_a_run_names_overfitting_with_numbers_and_advice(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = overfitting.Overfitting(300, (2.8, 2.82), (1.61, 1.24))
    answers = iter([None, found, None, None])
    monkeypatch.setattr(overfitting, "find", lambda history: next(answers, None))
    run = tmp_path / "run"
    train(options(run, toy_set, toy.recipe(tmp_path), "training.patience=5"))
    said = capsys.readouterr().err
    assert (
        "overfitting: since step 300 the training loss fell from 1.61 to 1.24 and the dev loss rose from "
        "2.80 to 2.82; training ends when 5 validations in a row bring no better dev loss; more text, a "
        "higher network.dropout (now 0.2)" in said
    )
    assert [each["since"] for each in log(run, "overfitting")] == [300]
    without = replace(load_recipe("transformer-tiny"), training=TrainingConfig(steps=1, patience=0))
    assert "set training.patience" in overfitting.describe(found, without)
