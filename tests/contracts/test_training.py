"""Training of every registered architecture; a resumed run is the same to the last bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toy
from tests.toy import options
from tests.variants import every_network
from trmt.bundles import checkpoints
from trmt.training.run import train

# All features that resuming could get wrong, at once.
HARD: dict[str, Any] = {
    "batches": {"tokens": 150, "accumulate": 2, "subword_alpha": 0.2},
    "optim": {"ema": 0.9, "clip": 1.0},
    "validation": {"every": 2},
    "training": {"steps": 10, "keep_last": 3},
}


def final(run: Path, step: int = 10) -> tuple[bytes, bytes, dict[str, Any]]:
    """The weights of the bundle, the tensors and the values of the training state at a step."""
    folder = run / f"step-{step:08d}"
    state = json.loads((folder / "training/state.json").read_bytes())
    state["progress"].pop("seconds")
    state.pop("checksum")
    return (
        (folder / "weights.safetensors").read_bytes(),
        (folder / "training/state.safetensors").read_bytes(),
        state,
    )


@pytest.mark.parametrize("architecture", every_network())
def test_resuming_is_exact(architecture: str, toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, HARD, architecture=architecture)
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    train(options(uninterrupted, toy_set, recipe))
    for steps in (4, 6, 10):
        torch.manual_seed(steps)  # the state of the generator must not matter
        train(options(resumed, toy_set, recipe, f"training.steps={steps}"))
    assert final(uninterrupted) == final(resumed)
    assert ranking(uninterrupted) == ranking(resumed)
    assert len(ranking(resumed)) == 5


@pytest.mark.parametrize("architecture", every_network())
def test_validating_and_saving_do_not_change_the_run(
    architecture: str, toy_set: Path, tmp_path: Path
) -> None:
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
@pytest.mark.parametrize("architecture", every_network())
def test_every_network_supports_training_deterministic(
    architecture: str, toy_set: Path, tmp_path: Path
) -> None:
    """Torch raises an error where it has no deterministic kernel; on the CPU results stay the same."""
    recipe = toy.recipe(tmp_path, {**HARD, "training": {"steps": 2}}, architecture=architecture)
    train(options(tmp_path / "usual", toy_set, recipe))
    train(options(tmp_path / "run", toy_set, recipe, "training.deterministic=true"))
    assert torch.are_deterministic_algorithms_enabled()
    assert final(tmp_path / "run", 2)[:2] == final(tmp_path / "usual", 2)[:2]
    assert log(tmp_path / "run", "begin")[0]["deterministic"] is True


@pytest.mark.parametrize("architecture", every_network())
def test_the_loss_falls(architecture: str, toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, {"training": {"steps": 40}}, architecture=architecture)
    run = train(options(tmp_path / "run", toy_set, recipe, "validation.every=10", "optim.lr=0.01"))
    losses = [entry["scores"][0]["value"] for entry in log(run, "validate")]
    assert losses[-1] < losses[0] - 0.2


def test_a_moved_run_can_be_resumed(toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    train(options(tmp_path / "uninterrupted", toy_set, recipe))
    train(options(tmp_path / "before", toy_set, recipe, "training.steps=4"))
    shutil.move(tmp_path / "before", tmp_path / "after")
    copy = shutil.copytree(toy_set, tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    train(options(Path("after"), copy, recipe))
    assert final(tmp_path / "uninterrupted") == final(tmp_path / "after")


def ranking(run: Path) -> list[int]:
    """The steps of the validated checkpoints, best first."""
    return [found.step for found in checkpoints.ranked(checkpoints.list_checkpoints(run))]


def log(run: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    for line in lines:
        line.pop("crc", None)
    return [line for line in lines if line["event"] == event]
