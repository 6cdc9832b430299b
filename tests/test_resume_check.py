"""`trmt check-resume`: exact resuming passes, and every difference is named."""

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


def contents(folder: Path) -> dict[str, bytes]:
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
    """A run that has ended is trained beyond its end, with validations."""
    run = train(options(tmp_path / "run", toy_set, toy.recipe(tmp_path, HARD), *end))
    before = contents(run)
    process = command(run)
    assert process.returncode == 0, process.stderr
    assert "the same to the last byte" in process.stdout and process.stdout.count("\n") == 1
    assert contents(run) == before, "the run itself is not changed"


@pytest.mark.slow
def test_an_unfinished_run_is_checked_from_its_newest_whole_checkpoint(toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, {**HARD, "optim": {"schedule": "linear", "warmup": 2}})
    run = train(options(tmp_path / "run", toy_set, recipe, "training.steps=6"))
    settings = run / "config.toml"
    settings.write_text(settings.read_text("utf-8").replace("steps = 6", "steps = 400"), "utf-8")
    damage(run / "step-00000006/training/state.safetensors", "flipped")
    process = command(run, "--set", "training.deterministic=true")
    assert process.returncode == 0, process.stderr
    assert (
        "checking from the checkpoint before it" in process.stderr and "from step 4 to 10" in process.stderr
    )


@pytest.mark.slow
def test_a_network_with_state_that_is_not_saved_fails(toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    run = train(options(tmp_path / "run", toy_set, recipe, 'architecture="tests.forgetful:Forgetful"'))
    refused = command(run)
    assert refused.returncode == 1 and "--trust-code" in refused.stderr
    process = command(run, "--trust-code")
    assert process.returncode == 1
    for difference in ("weights: ", "optimiser: ", "moving average: ", "the log differs: "):
        assert f"warning: {difference}" in process.stderr
    assert "data differs" not in process.stderr
    assert "error: resuming" in process.stderr and "Traceback" not in process.stderr


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no checkpoint in"):
        check_resume(CheckOptions(run=tmp_path))
    with pytest.raises(ConfigError, match="--steps must be at least 2"):
        CheckOptions(run=tmp_path, steps=1)


@pytest.mark.slow
def test_the_error_of_a_process_is_reported(toy_set: Path, tmp_path: Path) -> None:
    run = train(options(tmp_path / "run", toy_set, toy.recipe(tmp_path)))
    with pytest.raises(TrmtError, match=r"has failed: .*started with optim\.lr"):
        check_resume(CheckOptions(run=run, settings=("optim.lr=9",)))


# Differences


@pytest.fixture(scope="module")
def copies(toy_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two copies of one run, with the hashes of each step's batches."""
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


def bundle_weights(run: Path) -> None:
    path = run / "step-00000004/weights.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    save_file({**tensors, first: torch.zeros_like(tensors[first])}, path)


def progress(run: Path) -> None:
    path = run / "step-00000004/training/state.json"
    state = json.loads(path.read_bytes())
    state["progress"]["validations_since_best"] += 1
    path.write_text(json.dumps(state), encoding="utf-8")


def log_entries(run: Path) -> None:
    path = run / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for line in lines:
        line["time"] = 0
        if line["event"] == "validate":
            line["scores"] = []
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def batches(run: Path) -> None:
    (run / ORDER).write_text('[3, "aa"]\n[4, "cc"]\n', encoding="utf-8")


def missing_step(run: Path) -> None:
    (run / ORDER).write_text('[3, "aa"]\n', encoding="utf-8")


def nothing(run: Path) -> None:
    path = run / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    changed: list[dict[str, Any]] = [{**line, "time": 1.5} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in changed), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (nothing, []),
        (tensor("weights:"), [r"weights: 1 of \d+ tensors differ, weights:.* by up to 0\.5"]),
        (tensor("exp_avg_sq:"), [r"optimiser: 1 of \d+ tensors differ, exp_avg_sq:"]),
        (tensor("ema:"), [r"moving average: 1 of"]),
        (tensor("guard:sums"), [r"gradient guard: 1 of \d+ tensors differ, guard:sums"]),
        (bundle_weights, [r"weights of the bundle: 1 of"]),
        (progress, ["the saved progress differs"]),
        (batches, ["the data differs from step 4 on"]),
        (missing_step, ["2 steps were taken without the kill and 1 with it"]),
        (log_entries, [r"the log differs: .*\"validate\".* without the kill, .*\"scores\": \[\].* with it"]),
    ],
)
def test_each_difference_is_named(
    copies: Path, tmp_path: Path, change: Callable[[Path], None], expected: list[str]
) -> None:
    shutil.copytree(copies, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "two")
    found = list(differences(tmp_path / "one", tmp_path / "two", step=4))
    assert len(found) == len(expected)
    for sentence, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, sentence), sentence
