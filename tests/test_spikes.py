"""Runs with spikes and NaN: steps are skipped, rolled back or end the run, and resuming stays exact."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import toy
from tests.contracts.test_training import final, log
from tests.toy import options
from trmt.bundles import checkpoints
from trmt.bundles.checkpoints import Checkpoint
from trmt.errors import BundleError, TrmtError
from trmt.objectives.base import Loss
from trmt.objectives.translation import TranslationObjective
from trmt.sets.batches import RaggedBatch
from trmt.training import run as run_module
from trmt.training.checkpointer import Checkpointer
from trmt.training.distributed import Distributed
from trmt.training.guard import LOSS_SPIKE, MIN_STEPS, NOT_FINITE, StepReport
from trmt.training.run import train
from trmt.training.spikes import (
    MAX_SKIPPED_IN_A_ROW,
    ROLLBACKS,
    SUSPECT_STEPS,
    Rollback,
    SpikePolicy,
    read_rollbacks,
)
from trmt.training.state import TrainProgress, TrainState
from trmt.training.step import train_step

STARTED, LAST = 72, 90
CHANGES: dict[str, Any] = {
    "batches": {"tokens": 150},
    "optim": {"ema": 0.9, "clip": 1.0},
    "training": {"steps": LAST, "save_every": 6, "keep_last": 4, "log_every": 7},
    "validation": {"every": 1000},
}

Change = Callable[[Loss], Loss]


def gradient_spike(loss: Loss) -> Loss:
    """A gradient a thousand times as large."""
    return Loss(loss.total * 1000, loss.nll, loss.tokens)


def loss_spike(loss: Loss) -> Loss:
    """A higher loss with the same gradient."""
    return Loss(loss.total, loss.nll + 9 * loss.tokens, loss.tokens)


def nan(loss: Loss) -> Loss:
    return Loss(loss.total * torch.nan, loss.nll * torch.nan, loss.tokens)


def change_loss(monkeypatch: pytest.MonkeyPatch, steps: Collection[int], change: Change) -> None:
    """Change the loss of these steps, counted from 1, whenever they are taken."""
    loss = TranslationObjective.loss
    current: list[int] = []

    def recorded(state: TrainState, batches: list[RaggedBatch]) -> Any:
        current[:] = [state.progress.step + 1]
        try:
            return train_step(state, batches)
        finally:
            current.clear()

    def changed(self: TranslationObjective, net: Any, batch: Any) -> Loss:
        found = loss(self, net, batch)
        return change(found) if current and current[0] in steps else found

    monkeypatch.setattr(run_module, "train_step", recorded)
    monkeypatch.setattr(TranslationObjective, "loss", changed)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return toy.recipe(tmp_path_factory.mktemp("recipe"), CHANGES)


@pytest.fixture(scope="module")
def started(toy_set: Path, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with enough steps for the guard to find spikes."""
    run = tmp_path_factory.mktemp("started") / "run"
    assert STARTED > MIN_STEPS
    return train(options(run, toy_set, recipe, f"training.steps={STARTED}"))


@pytest.fixture
def run(started: Path, tmp_path: Path) -> Path:
    return copy(started, tmp_path / "run")


def copy(started: Path, folder: Path) -> Path:
    return Path(shutil.copytree(started, folder))


def weights_and_moments(run: Path, step: int) -> dict[str, torch.Tensor]:
    tensors = load_file(run / f"step-{step:08d}/training/state.safetensors")
    return {
        name: tensor for name, tensor in tensors.items() if name.partition(":")[0] not in ("guard", "ema")
    }


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("change", "event"), [(gradient_spike, "spike"), (nan, "bad gradient")])
def test_a_spike_is_skipped_and_resuming_is_exact(
    toy_set: Path,
    recipe: str,
    started: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    event: str,
) -> None:
    change_loss(monkeypatch, {80}, change)
    train(options(run, toy_set, recipe))
    assert [(entry["step"], entry["taken"]) for entry in log(run, event)] == [(80, False)]
    resumed = copy(started, tmp_path / "resumed")
    for steps in (79, 82, LAST):
        train(options(resumed, toy_set, recipe, f"training.steps={steps}"))
    assert final(resumed, LAST)[:2] == final(run, LAST)[:2]
    losses = {entry["step"]: entry["loss"] for entry in log(run, "train")}
    assert losses.items() <= {entry["step"]: entry["loss"] for entry in log(resumed, "train")}.items()


@pytest.mark.parametrize("policy", ["skip", "ignore"])
def test_skipped_steps_change_neither_weights_nor_moments(
    toy_set: Path, recipe: str, run: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    change_loss(monkeypatch, range(79, 85), gradient_spike)
    train(options(run, toy_set, recipe, f"training.on_spike={policy}"))
    states = [weights_and_moments(run, step) for step in (78, 84, LAST)]
    assert same(states[0], states[1]) == (policy == "skip")
    assert not same(states[1], states[2])
    spikes = [(entry["step"], entry["taken"]) for entry in log(run, "spike")]
    assert spikes == [(step, policy == "ignore") for step in range(79, 85)]


def test_a_loss_spike_is_warned_of_and_the_step_is_taken(
    toy_set: Path,
    recipe: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change_loss(monkeypatch, range(79, 85), loss_spike)
    train(options(run, toy_set, recipe))
    assert [entry["step"] for entry in log(run, "spike")] == [*range(79, 85)]
    assert all(entry["taken"] for entry in log(run, "spike"))
    assert not same(weights_and_moments(run, 78), weights_and_moments(run, 84))
    assert capsys.readouterr().err.count("far above that of recent steps") == 1, "one warning for a plateau"


@pytest.mark.parametrize("change", [gradient_spike, loss_spike, nan])
def test_the_advice_on_stopping_works(
    toy_set: Path, recipe: str, run: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    change_loss(monkeypatch, {77}, change)
    with pytest.raises(TrmtError, match=r"step 77: .*training\.on_spike=rollback.*optim\.lr"):
        train(options(run, toy_set, recipe, "training.on_spike=stop"))
    assert checkpoints.list_checkpoints(run)[-1].step == STARTED
    train(options(run, toy_set, recipe, "training.on_spike=rollback"))
    assert checkpoints.list_checkpoints(run)[-1].step == LAST


def exclude_steps(folder: Path, *steps: int) -> None:
    """Let a run skip these steps, as after a rollback."""
    folder.mkdir(exist_ok=True)
    entry = {"to": 0, "at": 1, "why": "for a test", "left_out": steps}
    (folder / ROLLBACKS).write_text(json.dumps([entry]), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "steps"), [(gradient_spike, [79]), (nan, [79]), (loss_spike, [*range(79 - SUSPECT_STEPS, 80)])]
)
def test_a_rollback_gives_the_run_without_those_steps(
    toy_set: Path,
    recipe: str,
    started: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    steps: list[int],
) -> None:
    to = (steps[0] - 1) // 6 * 6
    expected = copy(started, tmp_path / "expected")
    exclude_steps(expected, *steps)
    for step in range(to + 6, STARTED + 1, 6):
        shutil.rmtree(expected / f"step-{step:08d}")
    train(options(expected, toy_set, recipe, "training.on_spike=rollback"))
    change_loss(monkeypatch, {79}, change)
    train(options(run, toy_set, recipe, "training.on_spike=rollback"))
    (rollback,) = read_rollbacks(run)
    assert (rollback.to, rollback.at, list(rollback.left_out)) == (to, 79, steps)
    assert [(entry["step"], entry["to"]) for entry in log(run, "rollback")] == [(79, to)]
    assert [entry["step"] for entry in log(run, "left out")] == steps
    for step in (84, LAST):
        assert final(run, step)[:2] == final(expected, step)[:2]
    assert final(run, LAST)[2] == final(expected, LAST)[2]
    aside = sorted(path.name for path in run.glob("rolled-back-*"))
    assert aside == [f"rolled-back-step-{step:08d}" for step in range(to + 6, 79, 6)]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("moment", ["before rollbacks.json", "after it"])
def test_a_killed_rollback_is_made_again(
    toy_set: Path,
    recipe: str,
    started: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    policy = "training.on_spike=rollback"
    change_loss(monkeypatch, {79}, loss_spike)
    uninterrupted = copy(started, tmp_path / "uninterrupted")
    train(options(uninterrupted, toy_set, recipe, policy))

    restore, calls = Checkpointer.restore, [0]

    def killed_at_second(self: Checkpointer, saved: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:  # the first call is at the start of the process
            raise Killed
        restore(self, saved)

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "after it":
            patch.setattr(Checkpointer, "restore", killed_at_second)
        else:
            patch.setattr("trmt.training.spikes.write_verified_json", killed)
        with pytest.raises(Killed):
            train(options(run, toy_set, recipe, policy))
    assert len(read_rollbacks(run)) == (moment == "after it")
    train(options(run, toy_set, recipe, policy))
    assert final(run, LAST) == final(uninterrupted, LAST)
    assert read_rollbacks(run) == read_rollbacks(uninterrupted)


def test_repeated_rollbacks_end_training_with_advice(
    toy_set: Path, recipe: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_loss(monkeypatch, range(79, 84), gradient_spike)
    with pytest.raises(TrmtError, match=r"after each of 3 rollbacks to step 78; .*optim\.lr"):
        train(options(run, toy_set, recipe, "training.on_spike=rollback", "training.log_every=1"))
    assert [rollback.left_out for rollback in read_rollbacks(run)] == [(79,), (80,), (81,)]


def test_without_an_earlier_checkpoint_there_is_no_rollback(
    toy_set: Path,
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fresh = tmp_path / "fresh"
    change_loss(monkeypatch, {3}, nan)
    train(options(fresh, toy_set, recipe, "training.on_spike=rollback", "training.steps=6"))
    assert "step 3: the gradient is not finite; there is no checkpoint before it" in capsys.readouterr().err
    assert not read_rollbacks(fresh) and checkpoints.list_checkpoints(fresh)[-1].step == 6


def test_a_damaged_list_of_rollbacks_is_an_error(toy_set: Path, recipe: str, tmp_path: Path) -> None:
    exclude_steps(tmp_path / "run", 3, 4)
    assert read_rollbacks(tmp_path / "run") == [Rollback(0, 1, "for a test", (3, 4))]
    path = tmp_path / "run" / ROLLBACKS
    path.write_text('[{"to": 3}]', encoding="utf-8")
    with pytest.raises(TrmtError, match=r"rollbacks\.json\S* needs a value"):
        read_rollbacks(tmp_path / "run")
    path.write_text("[", encoding="utf-8")
    with pytest.raises(BundleError, match=r"rollbacks\.json is not valid JSON"):
        train(options(tmp_path / "run", toy_set, recipe))


# The policy without a run


def make_policy(folder: Path, name: str, *, fp16: bool = False) -> SpikePolicy:
    return SpikePolicy(folder, policy=name, fp16=fp16, log=lambda *_, **__: None, distributed=Distributed())


def test_a_checkpoint_after_a_suspect_step_is_not_rolled_back_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [Checkpoint(tmp_path / str(step), step) for step in (60, 66, 72, 78)]
    monkeypatch.setattr(checkpoints, "resumable_checkpoints", lambda folder: found)
    report = StepReport(72 + SUSPECT_STEPS, LOSS_SPIKE, norm=1.0, loss=20.0)
    checkpoint = make_policy(tmp_path, "rollback").handle(report, TrainProgress())
    assert checkpoint and checkpoint.step == 66
    assert read_rollbacks(tmp_path)[0].left_out == tuple(range(72, 72 + SUSPECT_STEPS + 1))


def test_skipped_steps_count_only_in_a_row(tmp_path: Path) -> None:
    policy, progress = make_policy(tmp_path, "skip"), TrainProgress()
    for _ in range(3):
        for step in range(1, MAX_SKIPPED_IN_A_ROW):
            policy.handle(StepReport(step, NOT_FINITE, norm=math.nan, loss=1.0), progress)
        policy.handle(StepReport(MAX_SKIPPED_IN_A_ROW, 0, norm=1.0, loss=1.0), progress)
    with pytest.raises(TrmtError, match="has diverged"):
        for step in range(MAX_SKIPPED_IN_A_ROW):
            policy.handle(StepReport(step, NOT_FINITE, norm=math.nan, loss=1.0), progress)


def test_infinities_in_fp16_are_no_reason_to_stop(tmp_path: Path) -> None:
    report = StepReport(1, NOT_FINITE, norm=math.inf, loss=1.0)
    make_policy(tmp_path, "stop", fp16=True).handle(report, TrainProgress())
    with pytest.raises(TrmtError, match="stop"):
        make_policy(tmp_path, "stop").handle(report, TrainProgress())
