"""What can happen to long runs, with real processes: kills at any moment, full disks, pauses, two at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import toy
from tests.contracts.test_training import HARD, final, log
from tests.test_training import ENDLESS, check_same_as_uninterrupted, kill, newest, spawn, wait_for
from tests.toy import options
from trmt.bundles import checkpoints
from trmt.errors import TrmtError
from trmt.training.checkpointer import Checkpointer
from trmt.training.run import TrainingRun, train
from trmt.training.stopping import Interrupted
from trmt.training.validation import ValidationResult

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
ALL: dict[str, Any] = {
    "batches": {"tokens": 150, "accumulate": 2, "subword_alpha": 0.2},
    "optim": {"ema": 0.9, "clip": 1.0},
    "training": {"save_every": 5, "keep_best": 3, "patience": 100_000, "log_every": 4},
    "validation": {"every": 10, "metric": "chrf", "sentences": 10},
}
KILLS = 20


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _no_survivors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kill the processes that a failed test leaves behind."""
    started: list[subprocess.Popen[bytes]] = []
    original = subprocess.Popen.__init__

    def recorded(self: subprocess.Popen[bytes], *rest: Any, **more: Any) -> None:
        original(self, *rest, **more)
        started.append(self)

    monkeypatch.setattr(subprocess.Popen, "__init__", recorded)
    yield
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


# Killed


@posix
@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(toy_set: Path, tmp_path: Path, run: Path) -> None:
    """While starting, resuming, training, saving, validating or removing checkpoints."""
    recipe = toy.recipe(tmp_path, ALL)
    generator = np.random.default_rng(11)
    since = 0
    for number in range(KILLS):
        process = spawn(run, toy_set, recipe, *ENDLESS)
        if number % 4:
            target = since + int(generator.integers(1, 4)) * 5
            while newest(run) < target and process.poll() is None:
                time.sleep(0.001)
        else:  # soon after the start
            wait_for(process, run, "lock")
        time.sleep(float(generator.uniform(0, 0.3)))
        kill(process)
        since = newest(run)
    check_same_as_uninterrupted(run, toy_set, recipe)
    losses = {entry["step"]: entry["loss"] for entry in log(tmp_path / "uninterrupted", "train")}
    assert {entry["step"]: entry["loss"] for entry in log(run, "train")} == losses


@pytest.mark.parametrize("moment", ["after saving", "after scoring", "before pruning"])
def test_a_killed_validation_is_repeated(
    toy_set: Path, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    recipe = toy.recipe(tmp_path, {**HARD, "training": {**HARD["training"], "keep_best": 2, "keep_last": 1}})
    train(options(tmp_path / "uninterrupted", toy_set, recipe))

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    functions = {
        "after saving": (TrainingRun, "validate"),
        "after scoring": (
            checkpoints,
            "write_verified_json",
        ),  # the manifest has the scores, the state has not
        "before pruning": (Checkpointer, "prune"),
    }
    save = checkpoints.save_checkpoint

    def saved(*rest: Any, **more: Any) -> Any:
        checkpoint = save(*rest, **more)
        if more["step"] == 6:
            monkeypatch.setattr(*functions[moment], killed)
        return checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_checkpoint", saved)
        with pytest.raises(Killed):
            train(options(run, toy_set, recipe))
    monkeypatch.undo()
    train(options(run, toy_set, recipe))
    assert final(run) == final(tmp_path / "uninterrupted")
    assert scores(run) == scores(tmp_path / "uninterrupted")


def scores(run: Path) -> list[Any]:
    """The checkpoints that were kept, with their scores."""
    return [(checkpoint.step, checkpoint.score()) for checkpoint in checkpoints.list_checkpoints(run)]


# Signals


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_validation_at_once(toy_set: Path, tmp_path: Path, run: Path, number: int) -> None:
    recipe = toy.recipe(tmp_path, {**HARD, "validation": {"every": 2, "metric": "chrf", "sentences": 5}})

    def scored(*_: Any) -> ValidationResult:
        return ValidationResult(({"metric": "chrf", "value": 5.0, "signature": "scripted"},))

    def endless(*_: Any) -> ValidationResult:
        if newest(run) == 4:
            os.kill(os.getpid(), number)
            raise AssertionError("the validation went on")
        return scored()

    train(options(tmp_path / "uninterrupted", toy_set, recipe), scored)
    with pytest.raises(Interrupted, match="after step 4, which is saved") as caught:
        train(options(run, toy_set, recipe), endless)
    assert caught.value.exit_code == 128 + number
    assert [entry["step"] for entry in log(run, "validate")] == [2]
    assert checkpoints.list_checkpoints(run)[-1].score() is None
    train(options(run, toy_set, recipe), scored)
    assert [entry["step"] for entry in log(run, "validate")] == [2, 4, 6, 8, 10]
    assert final(run) == final(tmp_path / "uninterrupted")
    assert scores(run) == scores(tmp_path / "uninterrupted")


@posix
@pytest.mark.slow
def test_a_run_ends_soon_after_sigterm(toy_set: Path, tmp_path: Path, run: Path) -> None:
    """As before the SIGKILL of a scheduler, while the validation would take an hour; everything is saved."""
    recipe = toy.recipe(tmp_path, ALL)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom tests.toy import options\n"
        "from trmt.errors import TrmtError\nfrom trmt.training.run import train\n"
        "try:\n    train(options(*map(Path, sys.argv[1:3]), *sys.argv[3:]), lambda *_: time.sleep(3600))\n"
        "except TrmtError as error:\n    print(error)\n    sys.exit(error.exit_code)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run), str(toy_set), recipe, ENDLESS[1]], stdout=subprocess.PIPE
    )
    wait_for(process, run, "step-00000010")
    process.terminate()
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"stopped by SIGTERM after step 10, which is saved" in said
    assert checkpoints.list_checkpoints(run)[-1].load_state()[0]["progress"]["validation_pending"]
    assert not (run / "lock").exists()


# Paused


@posix
@pytest.mark.slow
def test_a_pause_does_not_count_as_training_time(toy_set: Path, tmp_path: Path, run: Path) -> None:
    pause = 5.0
    recipe = toy.recipe(tmp_path, {**ALL, "training": {**ALL["training"], "log_every": 1}})
    process = spawn(run, toy_set, recipe, *ENDLESS)
    wait_for(process, run, "step-00000010")
    process.send_signal(signal.SIGSTOP)
    time.sleep(pause)
    process.send_signal(signal.SIGCONT)
    wait_for(process, run, f"step-{newest(run) + 10:08d}")
    process.terminate()
    process.communicate(timeout=60)
    entries = log(run, "train") + log(run, "validate")
    times = sorted(entry["time"] for entry in entries)
    assert max(after - before for before, after in pairwise(times)) >= pause
    progress = checkpoints.list_checkpoints(run)[-1].load_state()[0]["progress"]
    assert progress["seconds"] < times[-1] - times[0] - 0.9 * pause + 1
    # A step that included the pause would be slower than this.
    speeds = [entry["tokens_per_second"] for entry in log(run, "train")]
    assert min(speeds) > progress["target_tokens"] / progress["step"] / pause


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk; mounting it needs rights that not every user has."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("this user cannot mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # its tensors may still be mapped


def test_a_full_disk_loses_nothing(toy_set: Path, tmp_path: Path, small_disk: Path) -> None:
    recipe = toy.recipe(tmp_path, {**HARD, "training": {**HARD["training"], "keep_best": 0, "keep_last": 2}})
    train(options(tmp_path / "uninterrupted", toy_set, recipe))
    run = small_disk / "run"
    train(options(run, toy_set, recipe, "training.steps=2"))
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space"):
        while True:
            stream.write(bytes(4096))
    os.truncate(ballast, ballast.stat().st_size - 60_000)  # free space for half a checkpoint
    with pytest.raises(
        TrmtError, match=r"cannot write .*step-00000004.*No space left on device.*free some space"
    ):
        train(options(run, toy_set, recipe))
    assert [checkpoint.step for checkpoint in checkpoints.list_checkpoints(run)] == [2]
    assert not list(run.glob(".partial*"))
    ballast.unlink()
    train(options(run, toy_set, recipe))
    assert final(run) == final(tmp_path / "uninterrupted")


# Two processes


@posix
@pytest.mark.slow
def test_a_second_process_on_a_run_is_refused(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path, {**ALL, "validation": {"every": 10}})
    first = spawn(run, toy_set, recipe, *ENDLESS)
    wait_for(first, run, "step-*")
    second = spawn(run, toy_set, recipe, *ENDLESS)
    _, said = second.communicate(timeout=120)
    assert second.returncode == 1
    assert f"process {first.pid} on" in said.decode() and "is at work in" in said.decode()
    since = newest(run)
    wait_for(first, run, f"step-{since + 10:08d}")
    kill(first)
    train(options(run, toy_set, recipe, f"training.steps={newest(run) + 5}"))
    entries = [json.loads(line)["event"] for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    assert entries.count("begin") == 1 and entries.count("resume") == 1
