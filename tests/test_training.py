from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from tests import toy
from tests.contracts.test_training import HARD, final, log, ranking
from tests.toy import options
from trmt.bundles import bundles, checkpoints
from trmt.bundles.checkpoints import find_bundle
from trmt.config import read_toml, to_toml, to_tree
from trmt.errors import BundleError, ConfigError, DataError, TrmtError
from trmt.objectives.base import Loss
from trmt.objectives.translation import TranslationObjective
from trmt.sets.batches import BatchConfig, Batches, RaggedBatch
from trmt.sets.preparing import PrepareOptions, prepare
from trmt.sets.shards import PreparedSet
from trmt.storage.locks import exclusive
from trmt.text.filters import LengthLimits
from trmt.text.tokenizer import Tokenizer
from trmt.training import run as run_module
from trmt.training.planning import TrainOptions
from trmt.training.recipe import load_recipe
from trmt.training.recipe_keys import recipe_keys
from trmt.training.run import TrainingRun, train
from trmt.training.state import TrainState
from trmt.training.step import train_step
from trmt.training.stopping import Interrupted
from trmt.training.validation import ValidationResult, dev_loss

ALL = {"batches": {"tokens": 150}, "training": {"steps": 150, "save_every": 10, "keep_last": 3}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"step-{step:08d}" / "weights.safetensors")


# Killed with SIGKILL


def spawn(run: Path, data: Path, recipe: str, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "trmt", "train", str(run), "--data", str(data), "--recipe", recipe]
    return subprocess.Popen(
        [*command, *more], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )


def wait_for(process: subprocess.Popen[bytes], run: Path, pattern: str) -> None:
    """Wait until a path in the run folder matches, or the process has ended."""
    deadline = time.monotonic() + 120
    while not list(run.glob(pattern)) and process.poll() is None:
        assert time.monotonic() < deadline, f"no {pattern} in {run}"
        time.sleep(0.001)


def newest(run: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max((int(path.name.removeprefix("step-")) for path in run.glob("step-*")), default=0)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said


def kill_after_progress(process: subprocess.Popen[bytes], run: Path, *, since: int, pause: float = 0) -> None:
    """Kill the process once it has saved a step after `since`."""
    deadline = time.monotonic() + 120
    while newest(run) <= since and process.poll() is None:
        assert time.monotonic() < deadline, f"no step after {since} in {run}"
        time.sleep(0.001)
    time.sleep(pause)
    kill(process)
    assert newest(run) > since


posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
# More steps than any machine takes before it is killed.
ENDLESS = ("--set", "training.steps=1000000")


@posix
def test_a_killed_run_ends_with_the_same_weights(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path, {**ALL, "validation": {"every": 30}})
    for _ in range(2):
        kill_after_progress(spawn(run, toy_set, recipe, *ENDLESS), run, since=newest(run))
    last = newest(run) + 25
    for folder in (run, tmp_path / "uninterrupted"):
        train(options(folder, toy_set, recipe, f"training.steps={last}"))
    assert len(log(run, "resume")) == 2
    assert final(run, last) == final(tmp_path / "uninterrupted", last)
    assert not list(run.glob(".partial*"))


def check_same_as_uninterrupted(run: Path, toy_set: Path, recipe: str) -> None:
    """Train a killed run a little further, and another run as far without a kill, and compare the two."""
    last, uninterrupted = newest(run) + 25, run.parent / "uninterrupted"
    for folder in (run, uninterrupted):
        process = spawn(folder, toy_set, recipe, "--set", f"training.steps={last}")
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert final(run, last) == final(uninterrupted, last)
    assert ranking(run) == ranking(uninterrupted) != []
    names = [sorted(path.name for path in folder.iterdir()) for folder in (run, uninterrupted)]
    assert names[0] == names[1]


@posix
@pytest.mark.slow
def test_a_run_killed_repeatedly_ends_with_the_same_weights(toy_set: Path, tmp_path: Path, run: Path) -> None:
    changes = {
        "batches": {"tokens": 150},
        "optim": {"ema": 0.9},
        "training": {"save_every": 5, "keep_best": 3, "patience": 100_000},
        "validation": {"every": 10, "metric": "chrf", "sentences": 10},
    }
    recipe = toy.recipe(tmp_path, changes)
    generator = np.random.default_rng(5)
    # First while a checkpoint is being written, then at random times.
    process = spawn(run, toy_set, recipe, *ENDLESS)
    wait_for(process, run, ".partial-step*")
    kill(process)
    for _ in range(4):
        process = spawn(run, toy_set, recipe, *ENDLESS)
        kill_after_progress(process, run, since=newest(run), pause=float(generator.uniform(0, 0.1)))
    check_same_as_uninterrupted(run, toy_set, recipe)


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [3, 4])  # 4 is validated, 3 is not
def test_a_signal_saves_and_ends(
    toy_set: Path, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, number: int, at: int
) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    train(options(tmp_path / "uninterrupted", toy_set, recipe))

    def signalled(state: TrainState, batches: list[RaggedBatch]) -> Any:
        if state.progress.step == at - 1:
            os.kill(os.getpid(), number)
        return train_step(state, batches)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "train_step", signalled)
        with pytest.raises(Interrupted, match=f"after step {at}, which is saved") as caught:
            train(options(run, toy_set, recipe))
    assert caught.value.exit_code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert checkpoints.list_checkpoints(run)[-1].step == at
    train(options(run, toy_set, recipe))
    assert final(run) == final(tmp_path / "uninterrupted")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_stops_at_a_signal(toy_set: Path, tmp_path: Path, run: Path, number: int) -> None:
    recipe = toy.recipe(tmp_path, ALL)
    process = spawn(run, toy_set, recipe, "--set", "training.steps=5000")
    wait_for(process, run, "step-00000010")
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"error: stopped by" in said
    assert b"Traceback" not in said
    assert log(run, "interrupted")[0]["signal"] == number


# Resumed


def test_a_finished_run_can_be_resumed_with_more_steps(
    toy_set: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    train(options(run, toy_set, recipe, "training.steps=4"))
    before = final(run, 4)
    capsys.readouterr()
    train(options(run, toy_set, recipe, "training.steps=4"))
    assert "has ended at step 4" in capsys.readouterr().err
    assert final(run, 4) == before
    train(options(run, toy_set, recipe))
    assert "training.steps: 4 -> 10" in capsys.readouterr().err
    assert checkpoints.list_checkpoints(run)[-1].step == 10


def test_naming_the_folder_is_enough_to_resume(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    train(options(run, toy_set, recipe, "training.steps=4", "optim.lr=0.002"))
    train(TrainOptions(run=run, data=toy_set, settings=["training.steps=6"]))
    assert checkpoints.list_checkpoints(run)[-1].step == 6


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("optim.lr=0.5", "optim.lr"),
        ("training.seed=2", "training.seed"),
        ("network.d_model=32", "network.d_model"),
        ("batches.tokens=151", "batches.tokens"),
        ("loss.label_smoothing=0.2", "loss.label_smoothing"),
        ("validation.every=4", "validation.every"),
        ("architecture=rnn", "architecture"),
    ],
)
def test_a_setting_that_must_not_change_is_named(
    toy_set: Path, tmp_path: Path, run: Path, setting: str, name: str
) -> None:
    recipe = toy.recipe(tmp_path)
    train(options(run, toy_set, recipe, "training.steps=1"))
    saved = (run / "config.toml").read_bytes()
    with pytest.raises(ConfigError, match=name):
        train(options(run, toy_set, recipe, "training.steps=2", setting))
    assert (run / "config.toml").read_bytes() == saved


def test_settings_that_may_change_are_changed(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path, {"training": {"steps": 2}})
    train(options(run, toy_set, recipe))
    may = ("training.log_every=1", "training.keep_best=2", "training.patience=4", "description=new")
    train(options(run, toy_set, recipe, "training.steps=3", *may))
    assert checkpoints.list_checkpoints(run)[-1].step == 3


def test_other_data_is_refused(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path)
    train(options(run, toy_set, recipe))
    other = toy.make_set(tmp_path / "other", seed=50)
    sizes = [f"network.{side}_vocabulary={60}" for side in ("source", "target")]
    with pytest.raises(DataError, match="is not the data"):
        train(options(run, other, recipe, *sizes, "training.steps=9"))


def test_another_number_of_threads_is_warned_of(
    toy_set: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy.recipe(tmp_path)
    train(options(run, toy_set, recipe))
    torch.set_num_threads(2)
    try:
        train(options(run, toy_set, recipe, "training.steps=7"))
    finally:
        torch.set_num_threads(1)
    assert "saved with threads 1 and goes on with 2" in capsys.readouterr().err


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        index = len(content) - 5
        path.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
    else:
        path.unlink()


DAMAGES = [
    ("training/state.safetensors", "truncated"),
    ("training/state.safetensors", "flipped"),
    ("training/state.safetensors", "missing"),
    ("training/state.json", "truncated"),
    ("training/state.json", "missing"),
    ("weights.safetensors", "truncated"),
]


@pytest.mark.parametrize(("name", "how"), DAMAGES)
def test_a_damaged_checkpoint_is_skipped(
    toy_set: Path,
    tmp_path: Path,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    how: str,
) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    train(options(tmp_path / "uninterrupted", toy_set, recipe))
    train(options(run, toy_set, recipe, "training.steps=4"))
    damage(run / "step-00000004" / name, how)
    capsys.readouterr()
    train(options(run, toy_set, recipe))
    assert final(run) == final(tmp_path / "uninterrupted")
    said = capsys.readouterr().err
    # Resuming does not need the weights of the bundle; without state.json a checkpoint counts as pruned.
    assert ("at step 4" in said) == (name == "weights.safetensors")
    assert ("damaged-step-00000004" in said) == (name.startswith("training") and (name, how) != DAMAGES[4])


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_anew(
    toy_set: Path, tmp_path: Path, run: Path
) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    train(options(run, toy_set, recipe, "training.steps=4"))
    for checkpoint in checkpoints.list_checkpoints(run):
        damage(checkpoint.folder / "training/state.safetensors", "truncated")
    for _ in range(2):
        with pytest.raises(BundleError, match=r"no checkpoint in .* can be resumed from"):
            train(options(run, toy_set, recipe))
    assert [checkpoint.step for checkpoint in checkpoints.list_checkpoints(run)] == [2, 4]


def test_a_run_of_an_older_version_is_refused(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    train(options(run, toy_set, recipe, "training.steps=4"))
    for path in run.glob("step-*/training/state.json"):
        path.write_text(json.dumps(json.loads(path.read_bytes()) | {"format": 1}))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    advice = f"{run} was begun by an older version of trmt .* finish it .* or start .* --init-from {run}"
    for again in (options(run, toy_set, recipe), TrainOptions(run=run)):
        with pytest.raises(BundleError, match=advice):
            train(again)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    train(options(tmp_path / "new", toy_set, recipe, "training.steps=1", init_from=run))
    assert checkpoints.list_checkpoints(tmp_path / "new")[-1].step == 1


# Errors


def nan_at(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the gradients of these steps, counted from 0, NaN."""
    loss = TranslationObjective.loss
    current: list[int] = []

    def recorded(state: TrainState, batches: list[RaggedBatch]) -> Any:
        current[:] = [state.progress.step]
        return train_step(state, batches)

    def broken(self: TranslationObjective, net: Any, batch: Any) -> Loss:
        found = loss(self, net, batch)
        if torch.is_grad_enabled() and current and current[0] in steps:
            return Loss(found.total * float("nan"), found.nll * float("nan"), found.tokens)
        return found

    monkeypatch.setattr(run_module, "train_step", recorded)
    monkeypatch.setattr(TranslationObjective, "loss", broken)


def test_a_step_without_a_finite_gradient_is_skipped(
    toy_set: Path, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy.recipe(tmp_path, {"training": {"steps": 4, "save_every": 1, "keep_last": 9, "log_every": 1}})
    nan_at({2}, monkeypatch)
    train(options(run, toy_set, recipe))
    assert [entry["step"] for entry in log(run, "bad gradient")] == [3]
    before, after, later = (weights(run, step) for step in (2, 3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], later[name]) for name in after)
    losses = [entry["loss"] for entry in log(run, "train")]
    assert losses[2] is None
    assert all(np.isfinite(loss) for loss in losses[:2] + losses[3:])


def test_twenty_skipped_steps_in_a_row_end_training_with_advice(
    toy_set: Path, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = toy.recipe(tmp_path, {"training": {"steps": 100}, "validation": {"every": 10}})
    nan_at(set(range(5, 100)), monkeypatch)
    with pytest.raises(TrmtError, match=r"20 steps in a row.*optim\.lr"):
        train(options(run, toy_set, recipe))
    assert len(log(run, "bad gradient")) == 20


@contextmanager
def memory_for(
    sentences: int, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> Iterator[list[int]]:
    """Raise `error` for batches of more sentences; yields the sizes of those that fitted."""
    loss = TranslationObjective.loss
    fitted: list[int] = []

    def limited(self: TranslationObjective, net: Any, batch: Any) -> Loss:
        if torch.is_grad_enabled() and len(batch.source) > sentences:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
        fitted.append(len(batch.source))
        return loss(self, net, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TranslationObjective, "loss", limited)
        yield fitted


def make_run(data: Path, recipe_file: str, *settings: str) -> TrainingRun:
    """A run that is not started, and has no folder."""
    vocabulary = {"source_vocabulary": 60, "target_vocabulary": 60}
    recipe = load_recipe(recipe_file, list(settings), network=vocabulary)
    tokenizer = bundles.Tokenizer.load(data / "tokenizer")
    return TrainingRun(
        data.parent / "nowhere", recipe, PreparedSet.open(data), tokenizer, options=TrainOptions()
    )


def state_and_batches(data: Path, recipe_file: str) -> tuple[TrainState, list[RaggedBatch]]:
    """A fresh state without dropout, and the two largest batches."""
    run = make_run(data, recipe_file, "network.dropout=0.0")
    batches = [run.batches.load(pairs) for step in run.batches.plan(0) for pairs in step]
    return run.state, sorted(batches, key=len)[-2:]


def gradients(state: TrainState) -> list[torch.Tensor]:
    return [p.grad.clone() for p in state.net.parameters() if p.grad is not None]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_short_memory_splits_batches_and_drops_nothing(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    recipe = toy.recipe(tmp_path)
    unlimited, batches = state_and_batches(toy_set, recipe)
    expected = train_step(unlimited, batches)
    limited, _ = state_and_batches(toy_set, recipe)
    with memory_for(7, monkeypatch, error) as fitted:
        found = train_step(limited, batches)
    total = sum(len(batch) for batch in batches)
    largest = max(len(batch) for batch in batches)
    count = 2**limited.micro_batches.halvings
    assert max(fitted) <= 7 < largest <= 7 * count < 4 * largest
    assert sum(fitted[-2 * count :]) == total
    assert found.tokens == expected.tokens
    assert float(found.nll) == pytest.approx(float(expected.nll), rel=1e-5)
    for ours, theirs in zip(gradients(limited), gradients(unlimited), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_a_pair_that_does_not_fit_into_memory_is_an_error(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    with (
        memory_for(0, monkeypatch, torch.OutOfMemoryError) as fitted,
        pytest.raises(TrmtError, match="a single pair does not fit into memory"),
    ):
        train(options(run, toy_set, toy.recipe(tmp_path)))
    assert not fitted


def test_running_out_of_memory_in_the_optimiser_is_an_error(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    def full(*_: Any) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("trmt.training.step.update_weights", full)
    with pytest.raises(TrmtError, match=r"not enough memory.*batches\.tokens"):
        train(options(run, toy_set, toy.recipe(tmp_path)))


def test_other_errors_are_not_taken_for_short_memory(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    def broken(*_: Any) -> Loss:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(TranslationObjective, "loss", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(options(run, toy_set, toy.recipe(tmp_path)))


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_leaves_the_checkpoint_before(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path, error: Exception
) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    train(options(tmp_path / "uninterrupted", toy_set, recipe))
    train(options(run, toy_set, recipe, "training.steps=4"))
    before = sorted(path.name for path in run.iterdir())

    def full(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(bundles, "save_file", full)
        with pytest.raises(TrmtError, match=r"cannot write .*step-00000006.*No space.*free some space"):
            train(options(run, toy_set, recipe))
    assert sorted(path.name for path in run.iterdir()) == before
    train(options(run, toy_set, recipe))
    assert final(run) == final(tmp_path / "uninterrupted")


def test_a_real_limit_on_file_size_is_an_error(toy_set: Path, tmp_path: Path, run: Path) -> None:
    resource = pytest.importorskip("resource")
    recipe = toy.recipe(tmp_path, HARD)
    train(options(run, toy_set, recipe, "training.steps=4"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    try:
        with pytest.raises(TrmtError, match=r"allow larger files"):
            train(options(run, toy_set, recipe))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [checkpoint.step for checkpoint in checkpoints.list_checkpoints(run)] == [2, 4]
    assert not list(run.glob(".partial*"))
    train(options(run, toy_set, recipe))
    assert checkpoints.list_checkpoints(run)[-1].step == 10


def test_a_log_that_cannot_be_written_is_an_error(toy_set: Path, tmp_path: Path, run: Path) -> None:
    (run / "log.jsonl").mkdir(parents=True)
    with pytest.raises(TrmtError, match=r"cannot write .*log\.jsonl"):
        train(options(run, toy_set, toy.recipe(tmp_path)))


# The end of training


def scripted(values: list[float]) -> Any:
    """A validation with these scores one after the other."""
    left = iter(values)

    def validate(*_: Any) -> ValidationResult:
        return ValidationResult(({"metric": "chrf", "value": next(left), "signature": "scripted"},))

    return validate


CHRF = ["validation.metric=chrf", "validation.sentences=5", "validation.every=1", "training.steps=20"]


def test_patience_ends_training_and_the_best_checkpoints_are_kept(
    toy_set: Path, tmp_path: Path, run: Path
) -> None:
    recipe = toy.recipe(tmp_path, {"training": {"patience": 3, "keep_best": 2, "keep_last": 1}})
    train(options(run, toy_set, recipe, *CHRF), scripted([10.0, 30.0, 20.0, 30.0, 25.0, 99.0]))
    found = checkpoints.list_checkpoints(run)
    assert [checkpoint.step for checkpoint in found] == [2, 4, 5], "the best two and the last"
    assert [checkpoint.step for checkpoint in checkpoints.ranked(found)] == [2, 4, 5]
    assert [checkpoint.resumable() for checkpoint in found] == [False, False, True]
    state = final(run, 5)[2]["progress"]
    assert (state["best"], state["validations_since_best"]) == (30.0, 3)


def test_patience_is_saved(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path, {"training": {"patience": 3}})
    values = [10.0, 9.0, 8.0]
    train(options(run, toy_set, recipe, *CHRF, "training.steps=3"), scripted(values))
    train(options(run, toy_set, recipe, *CHRF), scripted([7.0, 6.0]))
    assert checkpoints.list_checkpoints(run)[-1].step == 4


def test_a_score_of_nan_is_never_the_best(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path)
    values = [float("nan"), 5.0, float("nan"), 4.0]
    train(options(run, toy_set, recipe, *CHRF, "training.steps=4"), scripted(values))
    assert ranking(run)[:2] == [2, 4]
    assert final(run, 4)[2]["progress"]["best"] == 5.0


def test_training_works_without_a_dev_set(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = toy.make_set(tmp_path / "toy", dev=False)
    train(options(run, data, toy.recipe(tmp_path)))
    assert "no dev set" in capsys.readouterr().err
    found = checkpoints.list_checkpoints(run)
    assert found[-1].step == 6 and not found[-1].score()
    patient = ["training.steps=0", "training.patience=2"]
    with pytest.raises(ConfigError, match=r"patience needs a dev set .* --dev"):
        train(options(tmp_path / "other", data, toy.recipe(tmp_path), *patient))


def test_sentences_longer_than_the_network_allows_are_refused_at_the_start(
    toy_set: Path, tmp_path: Path, run: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"sentences of \d+ tokens, the network only has positions for 5; raise"
    ):
        train(options(run, toy_set, toy.recipe(tmp_path), "network.max_positions=5"))
    assert not run.exists()


def test_a_folder_without_checkpoints_is_started_anew(toy_set: Path, tmp_path: Path, run: Path) -> None:
    run.mkdir()
    (run / "config.toml").write_text("[optim]\nlr = 5.0\n[training]\nsteps = 3\n", encoding="utf-8")
    train(options(run, toy_set, toy.recipe(tmp_path)))
    assert checkpoints.list_checkpoints(run)[-1].step == 6


def test_a_run_remembers_its_data(
    toy_set: Path, separate_set: Path, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(options(run, toy_set, toy.recipe(tmp_path), "training.steps=3"))
    (tmp_path / "data").mkdir()
    shutil.copytree(separate_set, tmp_path / "data" / "newer")
    train(TrainOptions(run=run, settings=["training.steps=6"]))
    assert checkpoints.list_checkpoints(run)[-1].step == 6
    with pytest.raises(DataError, match="is not the data that"):
        train(TrainOptions(run=run, data=separate_set, settings=["training.steps=9"]))


def test_fine_tuning_without_a_checkpoint_starts_from_its_weights_again(
    toy_set: Path, tmp_path: Path, run: Path
) -> None:
    recipe = toy.recipe(tmp_path)
    parents = [tmp_path / "one", tmp_path / "two"]
    for number, parent in enumerate(parents):
        train(options(parent, toy_set, recipe, f"training.seed={number}"))
    uninterrupted = tmp_path / "uninterrupted"
    train(options(uninterrupted, toy_set, recipe, init_from=parents[0]))
    train(options(run, toy_set, recipe, init_from=parents[0]))
    for checkpoint in checkpoints.list_checkpoints(run):  # as if it had been stopped before the first one
        shutil.rmtree(checkpoint.folder)
    train(TrainOptions(run=run))
    assert final(run, 6)[:2] == final(uninterrupted, 6)[:2]
    with pytest.raises(ConfigError, match="was started with --init-from"):
        train(options(run, toy_set, recipe, init_from=parents[1]))


def test_a_run_is_locked_while_it_trains(toy_set: Path, tmp_path: Path, run: Path) -> None:
    with exclusive(run), pytest.raises(TrmtError, match=r"process \d+ .* is at work in .*; wait for it"):
        train(options(run, toy_set, toy.recipe(tmp_path)))
    assert not checkpoints.list_checkpoints(run)
    train(options(run, toy_set, toy.recipe(tmp_path)))
    assert checkpoints.list_checkpoints(run)[-1].step == 6 and not (run / "lock").exists()


def test_weights_of_nan_are_not_translated_with(
    toy_set: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> ValidationResult:
        raise AssertionError("translated with weights of NaN")

    diverging = ["optim.lr=1e30", "validation.every=2", "validation.metric=chrf", "validation.sentences=5"]
    with pytest.raises(TrmtError, match="training has diverged"):
        train(options(run, toy_set, toy.recipe(tmp_path), "training.steps=60", *diverging), refuse)
    assert "not a number" in capsys.readouterr().err


def test_sampled_subwords_never_exceed_the_positions_of_the_network(
    toy_set: Path, tmp_path: Path, run: Path
) -> None:
    longest = int(Batches(PreparedSet.open(toy_set), BatchConfig(), seed=1).lengths.max())
    settings = ["batches.subword_alpha=0.9", f"network.max_positions={longest}", "training.epochs=1"]
    train(options(run, toy_set, toy.recipe(tmp_path), *settings))
    assert checkpoints.list_checkpoints(run)


def test_epochs_end_training(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path, {"training": {"steps": 0, "epochs": 2}, "batches": {"tokens": 600}})
    train(options(run, toy_set, recipe))
    last = checkpoints.list_checkpoints(run)[-1]
    progress = final(run, last.step)[2]["progress"]
    assert progress["epoch"] == 2
    tokens = PreparedSet.open(toy_set).split("train").lengths("target.ids") + 1
    assert progress["target_tokens"] == 2 * int(tokens.sum())


# The start of training


def test_fine_tuning_starts_from_the_weights(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path, {"optim": {"ema": 0.9}})
    old = train(options(tmp_path / "old", toy_set, recipe))
    (expected,) = {s["value"] for s in checkpoints.list_checkpoints(old)[-1].manifest.scores}
    tiny = ("optim.lr=1e-12", "training.steps=1", "optim.ema=0.0")
    train(options(run, toy_set, recipe, *tiny, init_from=old))
    assert log(run, "validate")[0]["scores"][0]["value"] != log(old, "validate")[0]["scores"][0]["value"]
    (found,) = {s["value"] for s in checkpoints.list_checkpoints(run)[-1].manifest.scores}
    best = checkpoints.ranked(checkpoints.list_checkpoints(old))[0].manifest.scores[0]["value"]
    assert found == pytest.approx(best, rel=1e-6)
    assert best == pytest.approx(expected, rel=1)


def test_fine_tuning_uses_the_network_of_the_bundle(toy_set: Path, tmp_path: Path, run: Path) -> None:
    old = train(options(tmp_path / "old", toy_set, toy.recipe(tmp_path, architecture="rnn")))
    train(options(run, toy_set, toy.recipe(tmp_path), "training.steps=1", init_from=old))
    assert checkpoints.list_checkpoints(run)[-1].manifest.architecture == "rnn"


def test_fine_tuning_refuses_another_tokenizer(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path)
    old = train(options(tmp_path / "old", toy_set, recipe))
    other = toy.make_set(tmp_path / "other", seed=70)
    with pytest.raises(BundleError, match="another tokenizer") as caught:
        train(options(run, other, recipe, init_from=old))
    assert str(find_bundle(old) / "tokenizer") in str(caught.value)
    assert not run.exists()


def test_neither_a_bundle_nor_a_run_folder_can_run_code(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path)
    old = train(options(tmp_path / "old", toy_set, recipe))
    bundles.rewrite_manifest(find_bundle(old), architecture="os:system")
    with pytest.raises(ConfigError, match="--trust-code"):
        train(options(run, toy_set, recipe, init_from=find_bundle(old)))
    run.mkdir()
    text = (old / "config.toml").read_text("utf-8")
    (run / "config.toml").write_text(text.replace('"transformer"', '"os:system"'), "utf-8")
    with pytest.raises(ConfigError, match="--trust-code"):
        train(TrainOptions(run=run, data=toy_set))


def test_a_recipe_can_name_an_architecture_outside_of_trmt(toy_set: Path, tmp_path: Path, run: Path) -> None:
    path = "trmt.nets.transformer:Transformer"
    train(options(run, toy_set, toy.recipe(tmp_path), f'architecture="{path}"', "training.steps=1"))
    manifest = checkpoints.list_checkpoints(run)[-1].manifest
    assert manifest.architecture == path
    with pytest.raises(BundleError, match="--trust-code"):
        bundles.load_bundle(find_bundle(run))
    assert bundles.load_bundle(find_bundle(run), trust_code=True)


@pytest.mark.parametrize("tied", ["all", "none"])
def test_separate_vocabularies_tie_only_the_target_embeddings(
    separate_set: Path, tmp_path: Path, run: Path, tied: str
) -> None:
    recipe = toy.recipe(tmp_path, {"network": {"tied": tied}, "training": {"steps": 1}})
    train(options(run, separate_set, recipe))
    expected = {"all": "target", "none": "none"}[tied]
    assert checkpoints.list_checkpoints(run)[-1].manifest.network["tied"] == expected


def test_a_dry_run_writes_nothing(
    toy_set: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy.recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    train(options(run, toy_set, recipe, dry_run=True))
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr()
    for word in ("parameters", "steps per epoch", "activations", "optimiser", "MiB"):
        assert word in said.out, "the plan is what was asked for"
        assert word not in said.err


def test_the_newest_set_and_a_fitting_recipe_are_chosen(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(toy_set, tmp_path / "data/older")
    shutil.copytree(toy_set, tmp_path / "data/newer")
    os.utime(tmp_path / "data/older/index.json", (1, 1))
    folder = train(TrainOptions(dry_run=True))
    assert folder == Path("models/newer-transformer-low-resource")
    said = capsys.readouterr().err
    assert "newer (the newest)" in said
    assert "transformer-low-resource (fits" in said
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(DataError, match="run trmt prepare first"):
        train(TrainOptions())


# The log


def test_the_log_is_json_lines(toy_set: Path, tmp_path: Path, run: Path) -> None:
    train(options(run, toy_set, toy.recipe(tmp_path, {"training": {"steps": 6, "log_every": 2}})))
    entries = log(run, "train")
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    for entry in entries:
        assert 0 < entry["loss"] < 10
        assert entry["lr"] == pytest.approx(0.003)
        assert entry["tokens_per_second"] > 0
    assert len(log(run, "begin")) == len(log(run, "end")) == 1
    assert [entry["step"] for entry in log(run, "validate")] == [3, 6]


def test_a_partial_line_in_the_log_is_removed(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path)
    train(options(run, toy_set, recipe, "training.steps=2"))
    with (run / "log.jsonl").open("ab") as stream:
        stream.write(b'{"event": "tra')
    train(options(run, toy_set, recipe, "training.steps=4"))
    assert [len(log(run, event)) for event in ("begin", "resume", "end")] == [1, 1, 2]


@pytest.mark.parametrize("installed", [True, False])
def test_tensorboard_curves_are_written_where_it_is_installed(
    toy_set: Path, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    written: list[tuple[str, float, int]] = []
    opened: list[tuple[str, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, *, purge_step: int) -> None:
            opened.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None: ...

        def close(self) -> None:
            opened.append(("closed", 0))

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    # None in sys.modules makes the import fail.
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake if installed else None)  # type: ignore[arg-type]
    train(options(run, toy_set, toy.recipe(tmp_path)))
    if not installed:
        assert not written
        return
    assert opened == [(str(run / "tensorboard"), 1), ("closed", 0)]
    assert {name for name, _, _ in written} >= {"train/loss", "train/lr", "validate/loss"}
    losses = {entry["step"]: entry["loss"] for entry in log(run, "train")}
    assert {step: value for name, value, step in written if name == "train/loss"} == losses


# Gradients and losses


def test_accumulated_batches_give_the_gradients_of_one_batch(toy_set: Path, tmp_path: Path) -> None:
    one, batches = state_and_batches(toy_set, toy.recipe(tmp_path))
    two, _ = state_and_batches(toy_set, toy.recipe(tmp_path))
    at_once = train_step(one, [batches[0]])
    accumulated = train_step(two, batches[0].halve())
    assert at_once.tokens == accumulated.tokens
    assert float(at_once.nll) == pytest.approx(float(accumulated.nll), rel=1e-5)
    for ours, theirs in zip(gradients(two), gradients(one), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_the_dev_loss_is_the_mean_over_all_tokens(toy_set: Path, tmp_path: Path) -> None:
    run = make_run(toy_set, toy.recipe(tmp_path))
    assert run.validator
    state, dev = run.state, run.validator.batches
    with state.evaluating():
        found = dev_loss(state, dev)
        total = tokens = 0.0
        for pair in range(len(dev.split)):
            batch = state.objective.collate(dev.load(np.array([pair])), state.device)
            loss = state.objective.loss(state.net, batch)
            total, tokens = total + float(loss.nll), tokens + loss.tokens
    assert found == (pytest.approx(total / tokens, rel=1e-5), None)
    assert state.net.training


def test_bf16_learns(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path, {"training": {"steps": 40}, "validation": {"every": 20}})
    train(options(run, toy_set, recipe, "training.precision=bf16", "optim.lr=0.01"))
    first, last = (entry["scores"][0]["value"] for entry in log(run, "validate"))
    assert last < first
    assert log(run, "begin")[0]["precision"] == "bf16"
    assert {tensor.dtype for tensor in weights(run, 40).values()} == {torch.float32}


def test_the_config_in_the_run_folder_is_complete(toy_set: Path, tmp_path: Path, run: Path) -> None:
    train(options(run, toy_set, toy.recipe(tmp_path), "training.steps=1"))
    again = load_recipe(str(run / "config.toml"))
    assert to_tree(again)["network"]["source_vocabulary"] == 60
    assert again.training.steps == 1
    written = read_toml(run / "config.toml")
    for table, keys in recipe_keys(again).items():
        tree = written[table] if table else written
        assert not [key.path for key in keys if key.default is not None and key.name not in tree]


def test_a_config_with_other_bytes_of_the_same_meaning_can_be_resumed(
    toy_set: Path, tmp_path: Path, run: Path
) -> None:
    train(options(run, toy_set, toy.recipe(tmp_path), "training.steps=1"))
    complete = read_toml(run / "config.toml")
    sparse = read_toml(Path(toy.recipe(tmp_path)))
    sparse["training"]["steps"] = 1
    sparse["network"] |= {key: complete["network"][key] for key in ("source_vocabulary", "target_vocabulary")}
    reordered = {
        key: dict(reversed(value.items())) if isinstance(value, dict) else value
        for key, value in reversed(complete.items())
    }
    for tree in (reordered, sparse):  # older versions wrote no defaults of networks and objectives
        text = "# a comment\n\n" + to_toml(tree).replace(" = ", "  =  ")
        (run / "config.toml").write_text(text, encoding="utf-8")
        train(TrainOptions(run=run, data=toy_set))
        assert read_toml(run / "config.toml") == complete


def test_a_tokenizer_without_languages_does_not_lose_those_of_the_set(
    toy_set: Path, tmp_path: Path, run: Path
) -> None:
    loaded = Tokenizer.load(toy_set / "tokenizer")
    Tokenizer(replace(loaded.settings, languages=("", "")), loaded.models).save(tmp_path / "tokenizer")
    named = PrepareOptions(
        train=(str(toy_set.parent / "half.tsv"),),
        languages=("en", "zh"),
        out=tmp_path / "set",
        tokenizer=tmp_path / "tokenizer",
        limits=LengthLimits(max_ratio=0),
        workers=1,
    )
    train(options(run, prepare(named).folder, toy.recipe(tmp_path), "training.steps=1"))
    assert checkpoints.list_checkpoints(run)[-1].manifest.languages == ("en", "zh")


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning")  # of torch's compiler, about torch
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_a_compiled_network_learns_the_same(toy_set: Path, tmp_path: Path) -> None:
    """Batches padded to one shape, with the compiler: the same losses as without."""
    found = []
    for how in ("off", "on"):
        settings = [f"training.compile={how}", "network.dropout=0.0", "training.log_every=1"]
        train(options(tmp_path / how, toy_set, toy.recipe(tmp_path), *settings))
        found.append([entry["loss"] for entry in log(tmp_path / how, "train")])
    assert len(found[0]) == 6
    assert found[0] == pytest.approx(found[1], rel=1e-3)
