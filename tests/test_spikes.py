"""Runs that meet spikes and NaN: left out, gone back over, or stopped, and exact all the same."""

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
from trmt.objectives.translation import Translation
from trmt.sets.batches import RaggedBatch
from trmt.training.checkpointer import Keeper, Progress
from trmt.training.distributed import Team
from trmt.training.guard import ENOUGH, HIGH, NOT_FINITE, Verdict
from trmt.training.learner import Learner
from trmt.training.run import train
from trmt.training.spikes import FAILED_STEPS, ROLLBACKS, SUSPECTS, GoBack, Rollback, Spikes, read

BEGUN, LAST = 72, 90
CHANGES: dict[str, Any] = {
    "batches": {"tokens": 150},
    "optim": {"ema": 0.9, "clip": 1.0},
    "training": {"steps": LAST, "save_every": 6, "keep_last": 4, "log_every": 7},
    "validation": {"every": 1000},
}

Change = Callable[[Loss], Loss]


def steep(loss: Loss) -> Loss:
    """A gradient a thousand times as large."""
    return Loss(loss.total * 1000, loss.nll, loss.tokens)


def high(loss: Loss) -> Loss:
    """A loss as if the weights had been ruined, with an ordinary gradient."""
    return Loss(loss.total, loss.nll + 9 * loss.tokens, loss.tokens)


def nan(loss: Loss) -> Loss:
    return Loss(loss.total * torch.nan, loss.nll * torch.nan, loss.tokens)


def poison(monkeypatch: pytest.MonkeyPatch, steps: Collection[int], change: Change) -> None:
    """Change the loss of these steps, counted from 1, whenever they are taken."""
    learn, loss = Learner.learn, Translation.loss
    now: list[int] = []

    def learned(self: Learner, examples: list[RaggedBatch], step: int) -> Any:
        now[:] = [step + 1]
        try:
            return learn(self, examples, step)
        finally:
            now.clear()

    def changed(self: Translation, net: Any, batch: Any) -> Loss:
        found = loss(self, net, batch)
        return change(found) if now and now[0] in steps else found

    monkeypatch.setattr(Learner, "learn", learned)
    monkeypatch.setattr(Translation, "loss", changed)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return toy.recipe(tmp_path_factory.mktemp("recipe"), CHANGES)


@pytest.fixture(scope="module")
def begun(toy_set: Path, recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has seen enough steps to know what is usual."""
    run = tmp_path_factory.mktemp("begun") / "run"
    assert BEGUN > ENOUGH
    return train(options(run, toy_set, recipe, f"training.steps={BEGUN}"))


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return copied(begun, tmp_path / "run")


def copied(begun: Path, place: Path) -> Path:
    return Path(shutil.copytree(begun, place))


def live(run: Path, step: int) -> dict[str, torch.Tensor]:
    tensors = load_file(run / f"step-{step:08d}/training/state.safetensors")
    return {
        name: tensor for name, tensor in tensors.items() if name.partition(":")[0] not in ("guard", "mean")
    }


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("change", "event"), [(steep, "spike"), (nan, "bad gradient")])
def test_a_spike_is_skipped_and_resuming_is_exact(
    toy_set: Path,
    recipe: str,
    begun: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    event: str,
) -> None:
    poison(monkeypatch, {80}, change)
    train(options(run, toy_set, recipe))
    assert [(entry["step"], entry["taken"]) for entry in log(run, event)] == [(80, False)]
    parted = copied(begun, tmp_path / "parted")
    for steps in (79, 82, LAST):
        train(options(parted, toy_set, recipe, f"training.steps={steps}"))
    assert final(parted, LAST)[:2] == final(run, LAST)[:2]
    losses = {entry["step"]: entry["loss"] for entry in log(run, "train")}
    assert losses.items() <= {entry["step"]: entry["loss"] for entry in log(parted, "train")}.items()


@pytest.mark.parametrize("policy", ["skip", "ignore"])
def test_skipping_leaves_everything_untouched(
    toy_set: Path, recipe: str, run: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    poison(monkeypatch, range(79, 85), steep)
    train(options(run, toy_set, recipe, f"training.on_spike={policy}"))
    assert same(live(run, 78), live(run, 84)) == (policy == "skip")
    assert not same(live(run, 84), live(run, LAST))
    spikes = [(entry["step"], entry["taken"]) for entry in log(run, "spike")]
    assert spikes == [(step, policy == "ignore") for step in range(79, 85)]


def test_a_high_loss_is_said_and_the_step_taken(
    toy_set: Path,
    recipe: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poison(monkeypatch, range(79, 85), high)
    train(options(run, toy_set, recipe))
    assert [entry["step"] for entry in log(run, "spike")] == [*range(79, 85)]
    assert all(entry["taken"] for entry in log(run, "spike"))
    assert not same(live(run, 78), live(run, 84))
    assert capsys.readouterr().err.count("far above the usual") == 1, "a plateau is said once"


@pytest.mark.parametrize("change", [steep, high, nan])
def test_stopping_gives_advice_that_works(
    toy_set: Path, recipe: str, run: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    poison(monkeypatch, {77}, change)
    with pytest.raises(TrmtError, match=r"step 77: .*training\.on_spike=rollback.*optim\.lr"):
        train(options(run, toy_set, recipe, "training.on_spike=stop"))
    assert checkpoints.steps(run)[-1].step == BEGUN
    train(options(run, toy_set, recipe, "training.on_spike=rollback"))
    assert checkpoints.steps(run)[-1].step == LAST


def left_out(folder: Path, *steps: int) -> None:
    """A run that is going to leave these steps out."""
    folder.mkdir(exist_ok=True)
    entry = {"to": 0, "at": 1, "why": "told to", "left_out": steps}
    (folder / ROLLBACKS).write_text(json.dumps([entry]), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "steps"), [(steep, [79]), (nan, [79]), (high, [*range(79 - SUSPECTS, 80)])]
)
def test_rolling_back_is_the_run_without_those_batches(
    toy_set: Path,
    recipe: str,
    begun: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Change,
    steps: list[int],
) -> None:
    to = (steps[0] - 1) // 6 * 6
    twin = copied(begun, tmp_path / "twin")
    left_out(twin, *steps)
    for step in range(to + 6, BEGUN + 1, 6):
        shutil.rmtree(twin / f"step-{step:08d}")
    train(options(twin, toy_set, recipe, "training.on_spike=rollback"))
    poison(monkeypatch, {79}, change)
    train(options(run, toy_set, recipe, "training.on_spike=rollback"))
    (rollback,) = read(run)
    assert (rollback.to, rollback.at, list(rollback.left_out)) == (to, 79, steps)
    assert [(entry["step"], entry["to"]) for entry in log(run, "rollback")] == [(79, to)]
    assert [entry["step"] for entry in log(run, "left out")] == steps
    for step in (84, LAST):
        assert final(run, step)[:2] == final(twin, step)[:2]
    assert final(run, LAST)[2] == final(twin, LAST)[2]
    aside = sorted(path.name for path in run.glob("rolled-back-*"))
    assert aside == [f"rolled-back-step-{step:08d}" for step in range(to + 6, 79, 6)]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("death", ["before the way is noted", "after it"])
def test_a_rollback_that_is_killed_is_exact(
    toy_set: Path,
    recipe: str,
    begun: Path,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    death: str,
) -> None:
    rolls = ("training.on_spike=rollback",)
    poison(monkeypatch, {79}, high)
    whole = copied(begun, tmp_path / "whole")
    train(options(whole, toy_set, recipe, *rolls))

    take_up, taken_up = Keeper.take_up, [0]

    def dying(self: Keeper, *state: Any) -> Progress:
        taken_up[0] += 1
        if taken_up[0] == 2:  # the first is where this process begins
            raise Killed
        return take_up(self, *state)

    def die(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if death == "after it":
            patch.setattr(Keeper, "take_up", dying)
        else:
            patch.setattr("trmt.training.spikes.write_json", die)
        with pytest.raises(Killed):
            train(options(run, toy_set, recipe, *rolls))
    assert len(read(run)) == (death == "after it")
    train(options(run, toy_set, recipe, *rolls))
    assert final(run, LAST) == final(whole, LAST)
    assert read(run) == read(whole)


def test_rollbacks_without_end_stop_with_advice(
    toy_set: Path, recipe: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, range(79, 84), steep)
    with pytest.raises(TrmtError, match=r"after each of 3 rollbacks to step 78; .*optim\.lr"):
        train(options(run, toy_set, recipe, "training.on_spike=rollback", "training.log_every=1"))
    assert [rollback.left_out for rollback in read(run)] == [(79,), (80,), (81,)]


def test_without_a_checkpoint_before_it_there_is_no_way_back(
    toy_set: Path,
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fresh = tmp_path / "fresh"
    poison(monkeypatch, {3}, nan)
    train(options(fresh, toy_set, recipe, "training.on_spike=rollback", "training.steps=6"))
    assert "step 3: the gradient is not finite; there is no checkpoint before it" in capsys.readouterr().err
    assert not read(fresh) and checkpoints.steps(fresh)[-1].step == 6


def test_rollbacks_that_cannot_be_read_are_not_forgotten(toy_set: Path, recipe: str, tmp_path: Path) -> None:
    left_out(tmp_path / "run", 3, 4)
    assert read(tmp_path / "run") == [Rollback(0, 1, "told to", (3, 4))]
    path = tmp_path / "run" / ROLLBACKS
    path.write_text('[{"to": 3}]', encoding="utf-8")
    with pytest.raises(TrmtError, match=r"rollbacks\.json needs a value"):
        read(tmp_path / "run")
    path.write_text("[", encoding="utf-8")
    with pytest.raises(BundleError, match=r"cannot read .*rollbacks\.json"):
        train(options(tmp_path / "run", toy_set, recipe))


# The policy by itself


def policy(folder: Path, name: str, *, half: bool = False) -> Spikes:
    return Spikes(folder, policy=name, half=half, log=lambda *_, **__: None, team=Team())


def test_a_checkpoint_that_a_suspect_made_is_not_gone_back_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [Checkpoint(tmp_path / str(step), step) for step in (60, 66, 72, 78)]
    monkeypatch.setattr("trmt.training.spikes.whole_points", lambda folder: points)
    with pytest.raises(GoBack) as back:
        policy(tmp_path, "rollback").hear(Verdict(72 + SUSPECTS, HIGH, norm=1.0, loss=20.0))
    assert back.value.point.step == 66
    assert read(tmp_path)[0].left_out == tuple(range(72, 72 + SUSPECTS + 1))


def test_failures_count_only_in_a_row(tmp_path: Path) -> None:
    spikes = policy(tmp_path, "skip")
    for _ in range(3):
        for step in range(1, FAILED_STEPS):
            spikes.hear(Verdict(step, NOT_FINITE, norm=math.nan, loss=1.0))
        spikes.hear(Verdict(FAILED_STEPS, 0, norm=1.0, loss=1.0))
    with pytest.raises(TrmtError, match="fell apart"):
        for step in range(FAILED_STEPS):
            spikes.hear(Verdict(step, NOT_FINITE, norm=math.nan, loss=1.0))


def test_a_loss_scale_that_is_being_found_is_no_reason_to_stop(tmp_path: Path) -> None:
    policy(tmp_path, "stop", half=True).hear(Verdict(1, NOT_FINITE, norm=math.inf, loss=1.0))
    with pytest.raises(TrmtError, match="stop"):
        policy(tmp_path, "stop").hear(Verdict(1, NOT_FINITE, norm=math.inf, loss=1.0))
