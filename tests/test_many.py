"""Training as torchrun starts it: processes that are killed, hang, or are short of memory, more or fewer."""

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
from tests.crews import ROOT
from tests.test_training import ENDLESS, newest
from tests.watched_train import sentences
from trmt.bundles import bundles, checkpoints
from trmt.training.run import Run

STARTS = count()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL"),
]

# Epsilon keeps Adam from making steps of rounding; without dropout any number of processes does the same.
SAME = {"optim": {"ema": 0.9, "clip": 1.0, "epsilon": 1e-3}, "network": {"dropout": 0.0}}
OFTEN = {
    "batches": {"tokens": 150},
    "training": {"save_every": 5, "keep_last": 3},
    "validation": {"every": 20},
}


def torchrun(
    run: Path, data: Path, recipe: str, *settings: str, size: int, **told: Any
) -> subprocess.Popen[str]:
    """`trmt train` on `size` processes, watched; `launch` are options of torchrun."""
    launch = told.pop("launch", ())
    seen = run.parent / "seen"
    seen.mkdir(exist_ok=True)
    module = [] if size == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(size), *launch]
    command = [sys.executable, *module, "-m", "tests.watched_train", "train", str(run)]
    return subprocess.Popen(
        [*command, "--data", str(data), "--recipe", recipe, *settings],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "WATCHED": json.dumps({"seen": str(seen), "number": next(STARTS), **told}),
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def done(process: subprocess.Popen[str]) -> str:
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 0, said
    return said


def until_saved(process: subprocess.Popen[str], run: Path, *, since: int) -> None:
    deadline = time.monotonic() + 120
    while newest(run) <= since and process.poll() is None:
        assert time.monotonic() < deadline, f"no step after {since} in {run}"
        time.sleep(0.01)


def rank_of(torchrun: subprocess.Popen[str], rank: int) -> int:
    """The process that is this rank."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    for child in children:
        if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
            return int(child)
    raise AssertionError(f"{children} are not rank {rank}")


def errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


def kill(process: subprocess.Popen[str], rank: int) -> list[str]:
    """Kill one process of a run; what was said when all had ended, which they do within a minute."""
    began = time.monotonic()
    os.kill(rank_of(process, rank), signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert time.monotonic() - began < 60
    assert process.returncode != 0
    return errors(said)


def test_more_or_fewer_processes_see_the_same_pairs_at_each_step(toy_set: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", toy.recipe(tmp_path, OFTEN)
    process = torchrun(run, toy_set, recipe, *ENDLESS, size=2)
    until_saved(process, run, since=0)
    [said] = kill(process, 1)
    assert "has died or is out of reach" in said and "the same command goes on" in said
    first = newest(run)
    process = torchrun(run, toy_set, recipe, *ENDLESS, size=3)
    until_saved(process, run, since=first)
    process.terminate()
    [said] = errors(process.communicate(timeout=120)[1])
    second = newest(run)
    assert f"stopped by SIGTERM after step {second:,}, which is saved" in said
    assert log(run, "interrupted")[0]["step"] == second > first
    last = second + 6
    done(torchrun(run, toy_set, recipe, "--set", f"training.steps={last}", size=1))
    assert newest(run) == last
    assert [entry["processes"] for entry in log(run, "begin") + log(run, "resume")] == [2, 3, 1]
    check_pairs(tmp_path / "seen", toy_set, last)


def check_pairs(seen: Path, data: Path, last: int) -> None:
    """All processes of a team together saw the pairs of the plan, at every step."""
    run = Run.planned(toy.options(seen.parent / "alone", data, str(seen.parent / "transformer.toml")), None)
    batches = run.batches
    expected, epoch = [], 0
    while len(expected) < last:
        for step in batches.plan(epoch):
            columns = [batches.load(pairs).columns.values() for pairs in step]
            expected.append(sorted([list(p) for c in columns for p in zip(*map(sentences, c), strict=True)]))
        epoch += 1
    attempts: dict[int, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for path in seen.iterdir():
        for line in path.read_text().splitlines():
            step, pairs = json.loads(line)
            attempts[step][path.name[:5]] += pairs
    for step in range(last):
        # Whoever was killed may have begun a step that another attempt took again.
        assert sorted(attempts[step][max(attempts[step])]) == expected[step]


@pytest.mark.parametrize("shard", ["false", "true"])
def test_a_team_that_is_restarted_by_torchrun_ends_with_the_same_bytes(
    toy_set: Path, tmp_path: Path, shard: str
) -> None:
    recipe = toy.recipe(tmp_path, OFTEN)  # with dropout
    settings = ("--set", "training.steps=60", "--set", f"training.shard={shard}")
    run, whole = tmp_path / "run", tmp_path / "whole"
    done(torchrun(whole, toy_set, recipe, *settings, size=2))
    process = torchrun(run, toy_set, recipe, *settings, size=2, launch=("--max-restarts", "1"))
    until_saved(process, run, since=0)
    os.kill(rank_of(process, 0), signal.SIGKILL)
    done(process)
    assert len(log(run, "resume")) == 1
    point = [checkpoints.step_folder(folder, 60) for folder in (run, whole)]
    for name in [
        "weights.safetensors",
        *(p.relative_to(point[0]) for p in point[0].glob("training/*.safetensors")),
    ]:
        assert (point[0] / name).read_bytes() == (point[1] / name).read_bytes(), name
    if shard == "false":
        assert final(run, 60) == final(whole, 60)


def test_a_sharded_run_short_of_memory_goes_on_in_parts_and_on_any_number(
    toy_set: Path, tmp_path: Path
) -> None:
    recipe = toy.recipe(tmp_path, {**OFTEN, **SAME})
    run, one = tmp_path / "run", tmp_path / "one"
    shard = ("--set", "training.shard=true")
    restart = ("--max-restarts", "1")
    process = torchrun(
        run, toy_set, recipe, *shard, "--set", "training.steps=12", size=2, launch=restart, short=[1, 0, 7]
    )
    [said] = errors(done(process))
    assert "rank 1 on" in said and "out of memory" in said and "in 2 parts" in said
    assert checkpoints.steps(run)[-1].state()[0]["learner"]["halvings"] == 1
    done(torchrun(run, toy_set, recipe, *shard, "--set", "training.steps=19", size=3))
    assert len(list((checkpoints.step_folder(run, 19) / "training").glob("slices-*-of-00003*"))) == 3
    done(torchrun(run, toy_set, recipe, *shard, "--set", "training.steps=25", size=1))
    done(torchrun(one, toy_set, recipe, "--set", "training.steps=25", size=1))
    states = [load_file(checkpoints.step_folder(f, 25) / "training/state.safetensors") for f in (run, one)]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        torch.testing.assert_close(
            states[0][name], states[1][name], rtol=5e-3, atol=1e-5, equal_nan=True, msg=name
        )
    # A checkpoint of slices is an ordinary bundle too.
    merged = bundles.load_bundle(checkpoints.step_folder(run, 19))
    assert all(tensor.isfinite().all() for tensor in merged.net.state_dict().values())
    check_pairs(tmp_path / "seen", toy_set, 25)


def test_a_team_goes_back_together(toy_set: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", toy.recipe(tmp_path, OFTEN)
    policy = ("--set", "training.on_spike=rollback", "--set", "training.steps=20")
    done(torchrun(run, toy_set, recipe, *policy, size=2, broken=[1, 7]))
    [back] = json.loads((run / "rollbacks.json").read_bytes())
    assert (back["to"], back["at"], back["left_out"]) == (5, 8, [8])
    assert newest(run) == 20
    assert len(log(run, "rollback")) == len(log(run, "left out")) == 1


def test_a_process_that_hangs_takes_the_run_down(toy_set: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", toy.recipe(tmp_path, OFTEN)
    process = torchrun(run, toy_set, recipe, *ENDLESS, size=2, silence=3.0)
    until_saved(process, run, since=0)
    other, stopped = rank_of(process, 0), rank_of(process, 1)
    os.kill(stopped, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{other}/cmdline").exists() and Path(f"/proc/{other}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(stopped, signal.SIGKILL)  # torchrun would do so half a minute after asking it to end
    [said] = errors(process.communicate(timeout=60)[1])
    assert process.returncode != 0
    assert "rank 1 has given no sign of life for 3 s" in said


def test_a_damaged_slice_is_passed_over(toy_set: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", toy.recipe(tmp_path, OFTEN)
    shard = ("--set", "training.shard=true")
    done(torchrun(run, toy_set, recipe, *shard, "--set", "training.steps=10", size=2))
    broken = checkpoints.step_folder(run, 10) / "training/slices-00001-of-00002.safetensors"
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(data)
    said = done(torchrun(run, toy_set, recipe, *shard, "--set", "training.steps=12", size=2))
    assert said.count(f"{broken} is not as it was written") == 1
    assert f"resuming {run} at step 5" in said
    assert newest(run) == 12
