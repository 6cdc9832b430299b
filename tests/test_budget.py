from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toy
from tests.contracts.test_training import HARD, final, log
from tests.toy import options
from trmt.devices import memory
from trmt.objectives.translation import Translation
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer
from trmt.training import budget
from trmt.training.budget import (
    Job,
    activation_bytes,
    disk_bytes,
    disk_free,
    measure,
    pace,
    size,
    state_bytes,
)
from trmt.training.learner import Learner
from trmt.training.planning import resolved_recipe
from trmt.training.run import Run, train

Usage = namedtuple("Usage", "total used free")
ARCHITECTURES = pytest.mark.parametrize("architecture", ["transformer", "rnn"])  # in a row, and padded


def make_run(folder: Path, data: Path, recipe_file: str, *settings: str) -> Run:
    wanted = options(folder, data, recipe_file, *settings)
    prepared = PreparedSet.open(data)
    tokenizer = Tokenizer.load(prepared.tokenizer_folder)
    recipe, _ = resolved_recipe(wanted, prepared, tokenizer, translates=False)
    return Run(folder, recipe, prepared, tokenizer, validate=None, options=wanted)


@pytest.fixture
def run(toy_set: Path, tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", toy_set, toy.recipe(tmp_path, HARD))


def snapshot(learner: Learner) -> Mapping[str, bytes]:
    return {name: tensor.detach().cpu().numpy().tobytes() for name, tensor in learner.tensors().items()}


def test_measuring_disturbs_nothing(run: Run) -> None:
    learner = run.learner
    learner.learn([run.batches.load(run.batches.plan(0)[0][0])], 0)  # so that there are moments
    before, state, drawn = snapshot(learner), learner.state(), torch.get_rng_state()
    found = measure(learner, run.batches, largest=True)
    assert found.seconds > 0 and found.tokens > 0 and found.parts == 1
    assert snapshot(learner) == before
    assert learner.state() == state
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_run_that_was_described_is_the_same_run(toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    described = make_run(tmp_path / "described", toy_set, recipe)
    described.describe()
    described.begin()
    described.loop()
    described.close()
    train(options(tmp_path / "plain", toy_set, recipe))
    last = described.progress.step
    assert final(tmp_path / "described", last) == final(tmp_path / "plain", last)


@ARCHITECTURES
def test_typical_steps_stand_for_the_epoch_and_the_largest_batches_are_tried(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    run = make_run(tmp_path / "run", toy_set, toy.recipe(tmp_path, HARD, architecture=architecture))
    taken: list[list[Any]] = []

    def timed(learner: Learner, batches: Any, step: list[Any]) -> tuple[float, int]:
        taken.append(step)
        return 0.5, 10

    def cost(step: list[Any]) -> int:
        if architecture == "transformer":
            return sum(int(run.batches.lengths[pairs].sum()) for pairs in step)
        return sum(len(pairs) * int(run.batches.lengths[pairs].max()) for pairs in step)

    monkeypatch.setattr(budget, "_timed", timed)
    found = measure(run.learner, run.batches, largest=True)
    assert (found.seconds, found.tokens) == (0.5, 10)
    largest = run.batches.largest_batches()
    assert [id(step[0]) for step in taken[-len(largest) :]] == list(map(id, largest))
    costs = [cost(step) for step in run.batches.plan(0)]
    timed_costs = [cost(step) for step in taken[1 : -len(largest)]]
    assert sum(timed_costs) / len(timed_costs) == pytest.approx(sum(costs) / len(costs), rel=0.1)


def kept_by(learner: Learner, examples: Any) -> int:
    """The bytes that a whole batch keeps for its backward pass."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = learner.objective.loss(learner.net, learner.objective.collate(examples, learner.device))
    for parameter in learner.net.parameters():
        found.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(found.values()) if loss else 0


@ARCHITECTURES
def test_no_batch_keeps_more_than_is_said(toy_set: Path, tmp_path: Path, architecture: str) -> None:
    run = make_run(tmp_path / "run", toy_set, toy.recipe(tmp_path, architecture=architecture))
    plan = [pairs for step in run.batches.plan(0) for pairs in step]
    most = max(kept_by(run.learner, run.batches.load(pairs)) for pairs in plan)
    assert most * 0.9 < activation_bytes(run.learner, run.batches) < most * 1.5


def test_slow_steps_are_not_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def timed(*_: Any) -> tuple[float, int]:
        calls.append(1)
        return 60.0, 10

    monkeypatch.setattr(budget, "_timed", timed)
    assert measure(run.learner, run.batches, largest=False).seconds == 60
    assert len(calls) == 2  # the one that makes room, and one that counts: it is of middle size


def test_what_had_to_be_split_is_said_and_the_run_is_not_split(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Translation.loss
    largest = max(len(pairs) for step in run.batches.plan(0) for pairs in step)

    def short_of_memory(self: Translation, net: Any, batch: Any) -> Any:
        if len(batch.source) > largest // 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory")
        return whole(self, net, batch)

    monkeypatch.setattr(Translation, "loss", short_of_memory)
    found = measure(run.learner, run.batches, largest=True)
    assert found.parts >= 2
    assert run.learner.parts.halvings == 0


def test_states_are_what_a_step_leaves(run: Run) -> None:
    run.learner.learn([run.batches.load(run.batches.plan(0)[0][0])], 0)
    weights = sum(parameter.nbytes for parameter in run.learner.net.parameters())
    kept = sum(
        tensor.nbytes
        for name, tensor in run.learner.tensors().items()
        if name.partition(":")[0] in ("live", "exp_avg", "exp_avg_sq", "mean")
    )
    gradients = sum(p.grad.nbytes for p in run.learner.net.parameters() if p.grad is not None)
    assert state_bytes(run.learner) == kept + gradients
    assert kept > 2 * weights


def test_checkpoints_take_no_more_disk_than_said(toy_set: Path, tmp_path: Path) -> None:
    changes = {
        "network": {"width": 64, "feed_forward": 256},
        "training": {"steps": 12, "keep_best": 2, "keep_last": 2},
        "validation": {"every": 2},
    }
    run = make_run(tmp_path / "run", toy_set, toy.recipe(tmp_path, changes))
    run.begin()
    run.loop()
    run.close()
    files = list((tmp_path / "run").glob("step-*/**/*.safetensors"))
    there, said = sum(file.stat().st_size for file in files), disk_bytes(run.job())
    assert said / 2 < there < said


def described(run: Run, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    run.describe()
    return " ".join(capsys.readouterr().err.split())


def test_a_plan_says_memory_time_and_disk(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    said = described(run, capsys)
    for part in (
        "peak memory, measured",
        "time per step",
        "time per epoch",
        "time in all",
        "checkpoints on disk",
    ):
        assert part in said
    assert "warning" not in said


def test_what_does_not_fit_is_not_tried_and_the_setting_that_helps_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(budget, "measure", lambda *_, **__: pytest.fail("it was tried"))
    activations = activation_bytes(run.learner, run.batches)
    monkeypatch.setattr(memory, "free", lambda device: activations)
    monkeypatch.setattr(budget, "state_bytes", lambda learner: 1000)
    said = described(run, capsys)
    assert "peak memory, estimated" in said and "not measured: it would not fit" in said
    assert "halve batches.tokens and double batches.accumulate" in said
    monkeypatch.setattr(budget, "state_bytes", lambda learner: activations)
    assert "network.width" in described(run, capsys)


def test_a_disk_that_is_too_small_is_warned_of(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(10, 5, 5))
    train(options(tmp_path / "run", toy_set, toy.recipe(tmp_path)))
    assert "training.keep_best or training.keep_last" in capsys.readouterr().err


def test_free_space_is_that_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    assert disk_free(tmp_path / "not/there/yet") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_a_run_says_at_its_start_what_it_needs_and_then_how_long_it_takes(
    toy_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy.recipe(tmp_path)
    train(options(tmp_path / "run", toy_set, recipe, "training.steps=4"))
    said = capsys.readouterr().err
    assert said.count(" of memory besides batches") == 1
    assert said.count(" s a step: ") == 1
    train(options(tmp_path / "run", toy_set, recipe, "training.steps=8"))
    assert " s a step: " not in capsys.readouterr().err
    for entry in log(tmp_path / "run", "train"):
        assert entry["tokens"] > 0 and entry["elapsed"] > 0 and 0 <= entry["waited"] <= 1
    tokens = [entry["tokens"] for entry in log(tmp_path / "run", "train")]
    assert tokens == sorted(set(tokens))


def test_the_pace_in_words(run: Run) -> None:
    job = run.job()
    job = Job(job.learner, job.batches, job.folder, job.training, steps_per_epoch=100, last=1000, done=400)
    assert pace(job, seconds=0.5).startswith("0.5 s a step: 50 s an epoch, 5 min 00 s to step 1,000; memory")


@pytest.mark.parametrize(("count", "said"), [(0, "0 MiB"), (3 * 2**20, "3 MiB"), (3 * 2**29, "1.5 GiB")])
def test_sizes_are_as_people_say_them(count: int, said: str) -> None:
    assert size(count) == said


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_the_gpus(toy_set: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", toy_set, toy.recipe(tmp_path, HARD), 'training.device="cuda"')
    before, drawn = snapshot(run.learner), torch.cuda.get_rng_state()
    found = measure(run.learner, run.batches, largest=True)
    total, free = memory.total(run.learner.device), memory.free(run.learner.device)
    assert found.peak and total and free
    assert state_bytes(run.learner) < found.peak < total and free < total
    assert snapshot(run.learner) == before
    assert torch.equal(torch.cuda.get_rng_state(), drawn)
