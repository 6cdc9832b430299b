from __future__ import annotations

import re
import shutil
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import toy
from tests.contracts.test_training import HARD, final, log
from tests.toy import options
from trmt.devices import memory
from trmt.objectives.translation import TranslationObjective
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer
from trmt.training import budget, validation
from trmt.training.budget import (
    activation_bytes,
    describe_speed,
    disk_bytes,
    format_bytes,
    free_disk_bytes,
    measure,
    print_plan,
    state_bytes,
)
from trmt.training.run import TrainingRun, train
from trmt.training.state import TrainState
from trmt.training.step import train_step
from trmt.training.validation import ValidationResult

Usage = namedtuple("Usage", "total used free")
ARCHITECTURES = pytest.mark.parametrize("architecture", ["transformer", "rnn"])  # without padding, and with


def make_run(folder: Path, data: Path, recipe_file: str, *settings: str) -> TrainingRun:
    return TrainingRun.from_options(options(folder, data, recipe_file, *settings))


def train_run(run: TrainingRun) -> None:
    run.restore()
    run.train()
    run.reporter.close()


@pytest.fixture
def run(toy_set: Path, tmp_path: Path) -> TrainingRun:
    return make_run(tmp_path / "run", toy_set, toy.recipe(tmp_path, HARD))


def first_step(run: TrainingRun) -> None:
    train_step(run.state, [run.batches.load(run.batches.plan(0)[0][0])])


def snapshot(state: TrainState) -> Mapping[str, bytes]:
    return {name: tensor.detach().cpu().numpy().tobytes() for name, tensor in state.tensors().items()}


def test_measuring_does_not_change_the_state(run: TrainingRun) -> None:
    first_step(run)  # so that there are moments
    before, values, generator = snapshot(run.state), run.state.values(), torch.get_rng_state()
    found = measure(run.state, run.batches, largest=True)
    assert found.seconds > 0 and found.tokens > 0 and found.micro_batches == 1
    assert snapshot(run.state) == before
    assert run.state.values() == values
    assert torch.equal(torch.get_rng_state(), generator)


def test_printing_the_plan_does_not_change_the_run(toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    planned = make_run(tmp_path / "planned", toy_set, recipe)
    print_plan(planned.planned())
    train_run(planned)
    train(options(tmp_path / "plain", toy_set, recipe))
    last = planned.state.progress.step
    assert final(tmp_path / "planned", last) == final(tmp_path / "plain", last)


@ARCHITECTURES
def test_the_timed_steps_represent_the_epoch_and_the_largest_batches_are_tried(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    run = make_run(tmp_path / "run", toy_set, toy.recipe(tmp_path, HARD, architecture=architecture))
    taken: list[list[Any]] = []

    def time_step(state: TrainState, batches: Any, step: list[Any]) -> tuple[float, int]:
        taken.append(step)
        return 0.5, 10

    def cost(step: list[Any]) -> int:
        if architecture == "transformer":
            return sum(int(run.batches.lengths[pairs].sum()) for pairs in step)
        return sum(len(pairs) * int(run.batches.lengths[pairs].max()) for pairs in step)

    monkeypatch.setattr(budget, "time_step", time_step)
    found = measure(run.state, run.batches, largest=True)
    assert (found.seconds, found.tokens) == (0.5, 10)
    largest = run.batches.largest_batches()
    assert [id(step[0]) for step in taken[-len(largest) :]] == list(map(id, largest))
    costs = [cost(step) for step in run.batches.plan(0)]
    timed_costs = [cost(step) for step in taken[1 : -len(largest)]]
    assert sum(timed_costs) / len(timed_costs) == pytest.approx(sum(costs) / len(costs), rel=0.1)


def saved_bytes(state: TrainState, examples: Any) -> int:
    """The bytes that a batch saves for its backward pass."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = state.objective.loss(state.net, state.objective.collate(examples, state.device))
    for parameter in state.net.parameters():
        found.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(found.values()) if loss else 0


@ARCHITECTURES
def test_no_batch_saves_more_than_estimated(toy_set: Path, tmp_path: Path, architecture: str) -> None:
    run = make_run(tmp_path / "run", toy_set, toy.recipe(tmp_path, architecture=architecture))
    plan = [pairs for step in run.batches.plan(0) for pairs in step]
    most = max(saved_bytes(run.state, run.batches.load(pairs)) for pairs in plan)
    assert most * 0.9 < activation_bytes(run.state, run.batches) < most * 1.5


def test_few_slow_steps_are_timed(run: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def time_step(*_: Any) -> tuple[float, int]:
        calls.append(1)
        return 60.0, 10

    monkeypatch.setattr(budget, "time_step", time_step)
    assert measure(run.state, run.batches, largest=False).seconds == 60
    assert len(calls) == 2  # the warm-up, and one of median size


def test_measuring_in_micro_batches_does_not_split_the_run(
    run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = TranslationObjective.loss
    largest = max(len(pairs) for step in run.batches.plan(0) for pairs in step)

    def short_of_memory(self: TranslationObjective, net: Any, batch: Any) -> Any:
        if len(batch.source) > largest // 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory")
        return loss(self, net, batch)

    monkeypatch.setattr(TranslationObjective, "loss", short_of_memory)
    assert measure(run.state, run.batches, largest=True).micro_batches >= 2
    assert run.state.micro_batches.halvings == 0


def test_the_state_is_as_large_as_estimated(run: TrainingRun) -> None:
    first_step(run)
    weights = sum(parameter.nbytes for parameter in run.state.net.parameters())
    saved = sum(
        tensor.nbytes
        for name, tensor in run.state.tensors().items()
        if name.partition(":")[0] in ("weights", "exp_avg", "exp_avg_sq", "ema")
    )
    gradients = sum(p.grad.nbytes for p in run.state.net.parameters() if p.grad is not None)
    assert state_bytes(run.state) == saved + gradients
    assert saved > 2 * weights


def test_checkpoints_take_no_more_disk_than_estimated(toy_set: Path, tmp_path: Path) -> None:
    changes = {
        "network": {"d_model": 64, "feed_forward": 256},
        "training": {"steps": 12, "keep_best": 2, "keep_last": 2},
        "validation": {"every": 2},
    }
    run = make_run(tmp_path / "run", toy_set, toy.recipe(tmp_path, changes))
    train_run(run)
    files = list((tmp_path / "run").glob("step-*/**/*.safetensors"))
    used, estimated = sum(file.stat().st_size for file in files), disk_bytes(run.planned())
    assert estimated / 2 < used < estimated


def plan_of(run: TrainingRun, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    print_plan(run.planned())
    said = capsys.readouterr()
    return " ".join([*said.out.split(), *said.err.split()])


def test_the_plan_has_memory_time_and_disk(run: TrainingRun, capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_of(run, capsys)
    for row in (
        "peak memory, measured",
        "time per step",
        "time per epoch",
        "time in total",
        "checkpoints on disk",
    ):
        assert row in plan
    assert "warning" not in plan


def test_a_run_that_does_not_fit_is_not_measured_and_the_setting_that_helps_is_named(
    run: TrainingRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(budget, "measure", lambda *_, **__: pytest.fail("it was tried"))
    activations = activation_bytes(run.state, run.batches)
    monkeypatch.setattr(memory, "free", lambda device: activations)
    monkeypatch.setattr(budget, "state_bytes", lambda state: 1000)
    plan = plan_of(run, capsys)
    assert "peak memory, estimated" in plan and "not measured: it would not fit" in plan
    assert "halve batches.tokens and double batches.accumulate" in plan
    monkeypatch.setattr(budget, "state_bytes", lambda state: activations)
    assert "network.d_model" in plan_of(run, capsys)


def test_a_disk_that_is_too_small_is_warned_of(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 5, 5))
    train(options(tmp_path / "run", toy_set, toy.recipe(tmp_path)))
    assert "training.keep_best or training.keep_last" in capsys.readouterr().err


def test_free_space_is_that_of_the_nearest_existing_folder(tmp_path: Path) -> None:
    assert free_disk_bytes(tmp_path / "not/there/yet") == pytest.approx(
        shutil.disk_usage(tmp_path).free, rel=0.1
    )


def test_a_run_prints_at_its_start_what_it_needs_and_later_how_long_it_takes(
    toy_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy.recipe(tmp_path)
    train(options(tmp_path / "run", toy_set, recipe, "training.steps=4"))
    printed = capsys.readouterr().err
    assert printed.count(" of memory besides batches") == 1
    assert printed.count(" s a step: ") == 1
    train(options(tmp_path / "run", toy_set, recipe, "training.steps=8"))
    assert " s a step: " not in capsys.readouterr().err
    for entry in log(tmp_path / "run", "train"):
        assert entry["tokens"] > 0 and entry["elapsed"] > 0 and 0 <= entry["waited"] <= 1
    tokens = [entry["tokens"] for entry in log(tmp_path / "run", "train")]
    assert tokens == sorted(set(tokens))


def test_the_speed_in_words(run: TrainingRun) -> None:
    planned = replace(run.planned(), steps_per_epoch=100, last_step=1000)
    run.state.progress.step = 400
    expected = "0.5 s a step: 50 s an epoch, 5 min 00 s to step 1,000; memory"
    assert describe_speed(planned, seconds=0.5).startswith(expected)


@pytest.mark.parametrize(("count", "text"), [(0, "0 MiB"), (3 * 2**20, "3 MiB"), (3 * 2**29, "1.5 GiB")])
def test_sizes_are_in_mib_or_gib(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_that_of_the_gpu(toy_set: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", toy_set, toy.recipe(tmp_path, HARD), 'training.device="cuda"')
    before, generator = snapshot(run.state), torch.cuda.get_rng_state()
    found = measure(run.state, run.batches, largest=True)
    total, free = memory.total(run.state.device), memory.free(run.state.device)
    assert found.peak and total and free
    assert state_bytes(run.state) < found.peak < total and free < total
    assert snapshot(run.state) == before
    assert torch.equal(torch.cuda.get_rng_state(), generator)


def test_the_plan_says_when_training_may_end_earlier(
    toy_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(*settings: str) -> str:
        return plan_of(make_run(tmp_path / "run", toy_set, toy.recipe(tmp_path), *settings), capsys)

    never = plan("training.steps=60", "training.patience=0")
    assert "│ 60 │" in never
    assert "at most" not in never.replace("on disk, at most", "")
    assert "with 20 validations" in never and "time per validation" in never
    early = plan("training.steps=60", "training.patience=2")
    assert "│ at most 60 │" in early
    assert "ends early after │ 6 steps without a better dev loss" in early
    assert re.search(r"time in total │ at most \d", early)
    assert "at most 60" not in plan("training.steps=60", "training.patience=19"), "it cannot end before"
    unlimited = plan("training.steps=0", "training.patience=2")
    assert "│ no limit │" in unlimited and "time in total" not in unlimited


def test_the_time_of_translating_is_estimated_with_the_references(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "TIMED_SENTENCES", 10)
    recipe = toy.recipe(tmp_path, {"validation": {"metric": "chrf", "sentences": 20}})
    calls = []

    def translate(
        net: Any, tokenizer: Tokenizer, data: PreparedSet, recipe: Any, *, forced: bool = False
    ) -> ValidationResult:
        calls.append((forced, recipe.validation.sentences))
        return ValidationResult()

    run = TrainingRun.from_options(options(tmp_path / "run", toy_set, recipe), translate)
    assert run.validator and (run.validator.estimate_seconds() or 0) > 0
    ticks = iter([0.0, 30.0])
    monkeypatch.setattr(validation, "time", SimpleNamespace(perf_counter=ticks.__next__))
    assert run.validator._translation_seconds() == pytest.approx(60), "10 of 20 sentences"
    assert calls == [(True, 10)] * 2, "a network without training may translate at any length"
