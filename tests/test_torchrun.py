"""Training with torchrun: processes that are killed, hang or run out of memory, and other numbers of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import toy
from tests.contracts.test_training import final, log
from tests.processes import ROOT
from tests.recorded_train import sentences
from tests.test_training import ENDLESS, newest
from trmt.bundles import bundles, checkpoints
from trmt.training.run import TrainingRun

STARTS = count()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL"),
]

# With a large epsilon Adam does not amplify rounding errors, and without dropout the number of processes does
# not matter.
COMPARABLE = {"optim": {"ema": 0.9, "clip": 1.0, "epsilon": 1e-3}, "network": {"dropout": 0.0}}
OFTEN = {
    "batches": {"tokens": 150},
    "training": {"save_every": 5, "keep_last": 3},
    "validation": {"every": 20},
}


def torchrun(
    run: Path, data: Path, recipe: str, *settings: str, size: int, **options: Any
) -> subprocess.Popen[str]:
    """`trmt train` on `size` processes by tests/recorded_train.py; `launch` are options of torchrun."""
    launch = options.pop("launch", ())
    pairs = run.parent / "pairs"
    pairs.mkdir(exist_ok=True)
    module = [] if size == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(size), *launch]
    command = [sys.executable, *module, "-m", "tests.recorded_train", "train", str(run)]
    return subprocess.Popen(
        [*command, "--data", str(data), "--recipe", recipe, *settings],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "RECORDED_TRAIN": json.dumps({"folder": str(pairs), "number": next(STARTS), **options}),
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    printed = process.communicate(timeout=180)[1]
    assert process.returncode == 0, printed
    return printed


def wait_until_saved(process: subprocess.Popen[str], run: Path, *, since: int) -> None:
    deadline = time.monotonic() + 120
    while newest(run) <= since and process.poll() is None:
        assert time.monotonic() < deadline, f"no step after {since} in {run}"
        time.sleep(0.01)


def rank_of(torchrun: subprocess.Popen[str], rank: int) -> int:
    """The process ID of this rank."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    for child in children:
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"{children} are not rank {rank}")


def errors(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("error: ")]


def kill(process: subprocess.Popen[str], rank: int) -> list[str]:
    """Kill one process of a run; returns the errors once all have ended, which takes less than a minute."""
    began = time.monotonic()
    os.kill(rank_of(process, rank), signal.SIGKILL)
    printed = process.communicate(timeout=120)[1]
    assert time.monotonic() - began < 60
    assert process.returncode != 0
    return errors(printed)


def test_more_or_fewer_processes_train_on_the_same_pairs_in_each_step(toy_set: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", toy.recipe(tmp_path, OFTEN)
    process = torchrun(run, toy_set, recipe, *ENDLESS, size=2)
    wait_until_saved(process, run, since=0)
    [error] = kill(process, 1)
    assert "has died or is out of reach" in error and "the same command goes on" in error
    first = newest(run)
    process = torchrun(run, toy_set, recipe, *ENDLESS, size=3)
    wait_until_saved(process, run, since=first)
    process.terminate()
    [error] = errors(process.communicate(timeout=120)[1])
    second = newest(run)
    assert f"stopped by SIGTERM after step {second:,}, which is saved" in error
    assert log(run, "interrupted")[0]["step"] == second > first
    last = second + 6
    finish(torchrun(run, toy_set, recipe, "--set", f"training.steps={last}", size=1))
    assert newest(run) == last
    assert [entry["processes"] for entry in log(run, "begin") + log(run, "resume")] == [2, 3, 1]
    check_pairs(tmp_path / "pairs", toy_set, last)


def check_pairs(recorded: Path, data: Path, last: int) -> None:
    """Check that all processes together trained on the pairs of the plan, in every step."""
    recipe = str(recorded.parent / "transformer.toml")
    batches = TrainingRun.from_options(toy.options(recorded.parent / "other", data, recipe)).batches
    expected, epoch = [], 0
    while len(expected) < last:
        for step in batches.plan(epoch):
            columns = [batches.load(pairs).columns.values() for pairs in step]
            expected.append(sorted([list(p) for c in columns for p in zip(*map(sentences, c), strict=True)]))
        epoch += 1
    attempts: dict[int, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for path in recorded.iterdir():
        for line in path.read_text().splitlines():
            step, pairs = json.loads(line)
            attempts[step][path.name[:5]] += pairs
    for step in range(last):
        # A killed process may have begun a step that a later attempt took again.
        assert sorted(attempts[step][max(attempts[step])]) == expected[step]


@pytest.mark.parametrize("shard", ["false", "true"])
def test_a_run_restarted_by_torchrun_ends_with_the_same_bytes(
    toy_set: Path, tmp_path: Path, shard: str
) -> None:
    recipe = toy.recipe(tmp_path, OFTEN)  # with dropout
    settings = ("--set", "training.steps=60", "--set", f"training.shard={shard}")
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    finish(torchrun(uninterrupted, toy_set, recipe, *settings, size=2))
    process = torchrun(run, toy_set, recipe, *settings, size=2, launch=("--max-restarts", "1"))
    wait_until_saved(process, run, since=0)
    os.kill(rank_of(process, 0), signal.SIGKILL)
    finish(process)
    assert len(log(run, "resume")) == 1
    one, two = (checkpoints.step_folder(folder, 60) for folder in (run, uninterrupted))
    for path in (one / "weights.safetensors", *one.glob("training/*.safetensors")):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes(), path
    if shard == "false":
        assert final(run, 60) == final(uninterrupted, 60)


def test_a_sharded_run_out_of_memory_goes_on_with_micro_batches_and_on_any_number_of_processes(
    toy_set: Path, tmp_path: Path
) -> None:
    recipe = toy.recipe(tmp_path, {**OFTEN, **COMPARABLE})
    run, one = tmp_path / "run", tmp_path / "one"
    shard = ("--set", "training.shard=true")
    restart = ("--max-restarts", "1")
    steps = ("--set", "training.steps=12")
    process = torchrun(run, toy_set, recipe, *shard, *steps, size=2, launch=restart, out_of_memory=[1, 0, 7])
    [error] = errors(finish(process))
    assert "rank 1 on" in error and "out of memory" in error and "2 micro-batches" in error
    assert checkpoints.list_checkpoints(run)[-1].load_state()[0]["halvings"] == 1
    finish(torchrun(run, toy_set, recipe, *shard, "--set", "training.steps=19", size=3))
    assert len(list((checkpoints.step_folder(run, 19) / "training").glob("slices-*-of-00003*"))) == 3
    finish(torchrun(run, toy_set, recipe, *shard, "--set", "training.steps=25", size=1))
    finish(torchrun(one, toy_set, recipe, "--set", "training.steps=25", size=1))
    states = [load_file(checkpoints.step_folder(f, 25) / "training/state.safetensors") for f in (run, one)]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        torch.testing.assert_close(
            states[0][name], states[1][name], rtol=5e-3, atol=1e-5, equal_nan=True, msg=name
        )
    # A sharded checkpoint is an ordinary bundle too.
    merged = bundles.load_bundle(checkpoints.step_folder(run, 19))
    assert all(tensor.isfinite().all() for tensor in merged.net.state_dict().values())
    check_pairs(tmp_path / "pairs", toy_set, 25)


def test_all_ranks_roll_back(toy_set: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", toy.recipe(tmp_path, OFTEN)
    policy = ("--set", "training.on_spike=rollback", "--set", "training.steps=20")
    finish(torchrun(run, toy_set, recipe, *policy, size=2, nan=[1, 7]))
    [rollback] = json.loads((run / "rollbacks.json").read_bytes())["rollbacks"]
    assert (rollback["to"], rollback["at"], rollback["left_out"]) == (5, 8, [8])
    assert newest(run) == 20
    assert len(log(run, "rollback")) == len(log(run, "left out")) == 1


def test_a_process_that_hangs_ends_the_run(toy_set: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", toy.recipe(tmp_path, OFTEN)
    process = torchrun(run, toy_set, recipe, *ENDLESS, size=2, heartbeat_timeout=3.0)
    wait_until_saved(process, run, since=0)
    other, stopped = rank_of(process, 0), rank_of(process, 1)
    os.kill(stopped, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{other}/cmdline").exists() and Path(f"/proc/{other}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(stopped, signal.SIGKILL)  # torchrun does this half a minute after SIGTERM
    [error] = errors(process.communicate(timeout=60)[1])
    assert process.returncode != 0
    assert "rank 1 has sent no heartbeat for 3 s" in error


def test_a_checkpoint_with_a_damaged_slice_is_skipped(toy_set: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", toy.recipe(tmp_path, OFTEN)
    shard = ("--set", "training.shard=true")
    finish(torchrun(run, toy_set, recipe, *shard, "--set", "training.steps=10", size=2))
    broken = checkpoints.step_folder(run, 10) / "training/slices-00001-of-00002.safetensors"
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)
    printed = finish(torchrun(run, toy_set, recipe, *shard, "--set", "training.steps=12", size=2))
    assert printed.count(f"{broken} is not as it was written") == 1
    assert f"resuming {run} at step 5" in printed
    assert newest(run) == 12
