"""`trmt check-resume`: what continues the same run passes, what does not is said precisely."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import toy
from tests.contracts.test_training import HARD
from tests.test_training import damage
from tests.toy import options
from trmt.errors import BundleError, ConfigError, TrmtError
from trmt.resume_check import ORDER, CheckOptions, check_resume, differences
from trmt.training.run import train

ROOT = Path(__file__).resolve().parent.parent


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(run: Path, *more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "trmt", "check-resume", str(run), "--steps", "6", *more],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("end", [["training.steps=10"], ["training.steps=0", "training.epochs=1"]])
def test_a_run_that_can_be_resumed_passes(toy_set: Path, tmp_path: Path, end: list[str]) -> None:
    """One that has ended goes on beyond its end, validating in between."""
    run = train(options(tmp_path / "run", toy_set, toy.recipe(tmp_path, HARD), *end))
    before = everything(run)
    done = command(run)
    assert done.returncode == 0, done.stderr
    assert "the same to the last byte" in done.stderr and not done.stdout
    assert everything(run) == before, "the run itself is not touched"


@pytest.mark.slow
def test_a_run_in_the_middle_passes_from_its_newest_whole_checkpoint(toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, {**HARD, "optim": {"schedule": "linear", "warmup": 2}})
    run = train(options(tmp_path / "run", toy_set, recipe, "training.steps=6"))
    settings = run / "config.toml"
    settings.write_text(settings.read_text("utf-8").replace("steps = 6", "steps = 400"), "utf-8")
    damage(run / "step-00000006/training/state.safetensors", "flipped")
    done = command(run, "--set", "training.deterministic=true")
    assert done.returncode == 0, done.stderr
    assert "checking from the one before" in done.stderr and "from step 4 to 10" in done.stderr


@pytest.mark.slow
def test_a_network_that_forgets_is_found_out(toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    run = train(options(tmp_path / "run", toy_set, recipe, 'architecture="tests.forgetful:Forgetful"'))
    refused = command(run)
    assert refused.returncode == 1 and "--trust-code" in refused.stderr
    done = command(run, "--trust-code")
    assert done.returncode == 1
    for said in ("weights: ", "optimiser: ", "running mean: ", "the log differs: "):
        assert f"warning: {said}" in done.stderr
    assert "data differs" not in done.stderr
    assert "error: resuming" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no checkpoint in"):
        check_resume(CheckOptions(run=tmp_path))
    with pytest.raises(ConfigError, match="--steps is at least 2"):
        CheckOptions(run=tmp_path, steps=1)


@pytest.mark.slow
def test_what_ends_a_part_is_said(toy_set: Path, tmp_path: Path) -> None:
    run = train(options(tmp_path / "run", toy_set, toy.recipe(tmp_path)))
    with pytest.raises(TrmtError, match=r"could not be trained on: .*begun with optim\.lr"):
        check_resume(CheckOptions(run=run, settings=("optim.lr=9",)))


# What differs


@pytest.fixture(scope="module")
def copies(toy_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two copies of one run, with what each step saw."""
    folder = tmp_path_factory.mktemp("copies")
    run = train(options(folder / "one", toy_set, toy.recipe(folder, HARD), "training.steps=4"))
    (run / ORDER).write_text('[3, "aa"]\n[4, "bb"]\n', encoding="utf-8")
    shutil.copytree(run, folder / "two")
    return folder


def tensor(name: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        path = run / "step-00000004/training/state.safetensors"
        tensors = load_file(path)
        key = next(key for key in sorted(tensors) if key.startswith(name))
        if tensors[key].ndim:
            tensors[key].view(-1)[-1] += 0.5
        save_file({key: value.clone() for key, value in tensors.items()}, path)

    return change


def kept(run: Path) -> None:
    path = run / "step-00000004/weights.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    # The same number, but not the same bits.
    save_file({**tensors, first: torch.zeros_like(tensors[first])}, path)


def progress(run: Path) -> None:
    path = run / "step-00000004/training/state.json"
    state = json.loads(path.read_bytes())
    state["progress"]["stale"] += 1
    path.write_text(json.dumps(state), encoding="utf-8")


def logged(run: Path) -> None:
    path = run / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for line in lines:
        line["time"] = 0
        if line["event"] == "validate":
            line["scores"] = []
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def order(run: Path) -> None:
    (run / ORDER).write_text('[3, "aa"]\n[4, "cc"]\n', encoding="utf-8")


def missing(run: Path) -> None:
    (run / ORDER).write_text('[3, "aa"]\n', encoding="utf-8")


def nothing(run: Path) -> None:
    path = run / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    changed: list[dict[str, Any]] = [{**line, "time": 1.5} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in changed), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (nothing, []),
        (tensor("live:"), [r"weights: 1 of \d+ tensors differ, live:.* by up to 0\.5"]),
        (tensor("exp_avg_sq:"), [r"optimiser: 1 of \d+ tensors differ, exp_avg_sq:"]),
        (tensor("mean:"), [r"running mean: 1 of"]),
        (tensor("guard:sums"), [r"guard: 1 of \d+ tensors differ, guard:sums"]),
        (kept, [r"weights that are kept: 1 of"]),
        (progress, ["the saved progress differs"]),
        (order, ["the data differs from step 4 on"]),
        (missing, ["2 steps were taken without the kill and 1 with it"]),
        (logged, [r"the log differs: .*\"validate\".* without the kill, .*\"scores\": \[\].* with it"]),
    ],
)
def test_each_difference_is_named(
    copies: Path, tmp_path: Path, change: Callable[[Path], None], said: list[str]
) -> None:
    shutil.copytree(copies, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "two")
    found = list(differences(tmp_path / "one", tmp_path / "two", step=4))
    assert len(found) == len(said)
    for sentence, expected in zip(found, said, strict=True):
        assert re.search(expected, sentence), sentence
