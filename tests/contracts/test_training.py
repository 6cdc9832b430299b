"""Training of every registered architecture: stopped and gone on with, it is the same to the last bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toy
from tests.toy import options
from trmt.bundles import checkpoints
from trmt.registry import ARCHITECTURES
from trmt.training.run import train

# Everything that could go astray at once.
HARD: dict[str, Any] = {
    "batches": {"tokens": 150, "accumulate": 2, "subword_alpha": 0.2},
    "optim": {"ema": 0.9, "clip": 1.0},
    "validation": {"every": 2},
    "training": {"steps": 10, "keep_last": 3},
}


def final(run: Path, step: int = 10) -> tuple[bytes, bytes, dict[str, Any]]:
    """Weights, training state and progress at a step."""
    folder = run / f"step-{step:08d}"
    state = json.loads((folder / "training/state.json").read_bytes())
    state["progress"].pop("seconds")
    return (
        (folder / "weights.safetensors").read_bytes(),
        (folder / "training/state.safetensors").read_bytes(),
        state,
    )


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_resuming_is_exact(architecture: str, toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, HARD, architecture=architecture)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(options(whole, toy_set, recipe))
    for steps in (4, 6, 10):
        torch.manual_seed(steps)  # what went on between the runs must not matter
        train(options(parted, toy_set, recipe, f"training.steps={steps}"))
    assert final(whole) == final(parted)
    ranks = [[point.step for point in checkpoints.ranked(checkpoints.steps(run))] for run in (whole, parted)]
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == 5


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_validating_and_saving_do_not_disturb(architecture: str, toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, HARD, architecture=architecture)
    often, never = tmp_path / "often", tmp_path / "never"
    train(options(often, toy_set, recipe))
    train(options(never, toy_set, recipe, "validation.every=1000"))
    assert final(often)[:2] == final(never)[:2]


@pytest.fixture
def _deterministic_only_here() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic_only_here")
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_network_can_be_deterministic(architecture: str, toy_set: Path, tmp_path: Path) -> None:
    """Torch refuses what it has no deterministic kernel for; on the CPU nothing else changes."""
    recipe = toy.recipe(tmp_path, HARD, architecture=architecture)
    train(options(tmp_path / "usual", toy_set, recipe))
    train(options(tmp_path / "run", toy_set, recipe, "training.deterministic=true"))
    assert torch.are_deterministic_algorithms_enabled()
    assert final(tmp_path / "run")[:2] == final(tmp_path / "usual")[:2]
    assert log(tmp_path / "run", "begin")[0]["deterministic"] is True


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_the_loss_falls(architecture: str, toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, {"training": {"steps": 40}}, architecture=architecture)
    run = train(options(tmp_path / "run", toy_set, recipe, "validation.every=10", "optim.lr=0.01"))
    losses = [entry["scores"][0]["value"] for entry in log(run, "validate")]
    assert losses[-1] < losses[0] - 0.2


def test_a_run_can_be_moved_between_its_parts(toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    train(options(tmp_path / "whole", toy_set, recipe))
    train(options(tmp_path / "here", toy_set, recipe, "training.steps=4"))
    shutil.move(tmp_path / "here", tmp_path / "there")
    copied = shutil.copytree(toy_set, tmp_path / "set")
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        train(options(Path("there"), copied, recipe))
    finally:
        os.chdir(before)
    assert final(tmp_path / "whole") == final(tmp_path / "there")


def log(run: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    return [line for line in lines if line["event"] == event]
