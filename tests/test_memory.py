"""Out-of-memory errors, injected: found at the start, answered by micro-batches, never the end of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toy
from tests.contracts.test_training import HARD, final, log
from tests.toy import options
from trmt import validating
from trmt.bundles import checkpoints
from trmt.decoding.batch import BatchDecoder
from trmt.nets.transformer import Transformer
from trmt.objectives.base import Loss
from trmt.objectives.translation import TranslationObjective
from trmt.sets.batches import BatchConfig, Batches, DataPosition
from trmt.sets.shards import PreparedSet
from trmt.training import run as run_module
from trmt.training import validation
from trmt.training.planning import TrainOptions
from trmt.training.run import TrainingRun, train
from trmt.training.state import TrainState
from trmt.training.step import rehearse, train_step

TRANSLATED = {"validation": {"every": 3, "metric": "chrf", "sentences": 30}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


class LimitedMemory:
    """Counts the batches that did not fit, and records the sizes of those that did."""

    def __init__(self) -> None:
        self.refused = 0
        self.fitted: list[int] = []

    def check(self, size: int, limit: int) -> None:
        if size > limit:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 byte")
        self.fitted.append(size)


@contextmanager
def memory_for(limit: int, *, training: bool) -> Iterator[LimitedMemory]:
    """Memory for batches of up to `limit` pairs, in training or in validation."""
    limited, loss = LimitedMemory(), TranslationObjective.loss

    def checked(self: TranslationObjective, net: Any, batch: Any) -> Loss:
        if torch.is_grad_enabled() == training:
            limited.check(len(batch.source), limit)
        return loss(self, net, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TranslationObjective, "loss", checked)
        yield limited


# At the start


@pytest.mark.parametrize("architecture", ["transformer", "rnn"])  # without padding, and with
def test_the_largest_batches_are_rehearsed_first(
    toy_set: Path, tmp_path: Path, run: Path, architecture: str
) -> None:
    sizes: list[tuple[int, int, int]] = []
    steps: list[int] = []
    loss = TranslationObjective.loss

    def measured(self: TranslationObjective, net: Any, batch: Any) -> Loss:
        if torch.is_grad_enabled():
            lengths_S = torch.maximum(batch.source.lengths_S, batch.before.lengths_S)
            pairs, longest = len(lengths_S), int(lengths_S.max())
            sizes.append(
                (int(lengths_S.sum()) if type(net).packs_tokens else pairs * longest, pairs, longest)
            )
        return loss(self, net, batch)

    def counted(state: TrainState, batches: Any) -> Any:
        steps.append(len(sizes))
        return train_step(state, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TranslationObjective, "loss", measured)
        patch.setattr(run_module, "train_step", counted)
        recipe = toy.recipe(tmp_path, {"training": {"steps": 0, "epochs": 1}}, architecture=architecture)
        train(options(run, toy_set, recipe))
    first, later = sizes[: steps[0]], sizes[steps[0] :]
    assert 1 <= len(first) <= 3 and len(later) == len(steps)
    for measure in range(3):
        assert max(size[measure] for size in first) == max(size[measure] for size in later)


def test_subwords_are_sampled_in_the_rehearsal(toy_set: Path, tmp_path: Path) -> None:
    """They are more than those that are stored, and take more memory."""
    recipe = toy.recipe(tmp_path)
    run = TrainingRun.from_options(options(tmp_path / "run", toy_set, recipe, "batches.subword_alpha=0.3"))
    stored = max(
        run.state.objective.tokens(run.batches.load(pairs)) for pairs in run.batches.largest_batches()
    )
    tokens, loss = [], TranslationObjective.loss

    def recorded(self: TranslationObjective, net: Any, batch: Any) -> Loss:
        tokens.append(batch.tokens)
        return loss(self, net, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TranslationObjective, "loss", recorded)
        rehearse(run.state, run.batches)
        rehearsed = max(tokens)
        for position, step in run.batches.steps(DataPosition(0, 0)):
            train_step(run.state, step)
            if position.epoch:
                break
    assert rehearsed > 1.1 * stored
    assert max(tokens) < 1.1 * rehearsed


def test_the_rehearsal_does_not_change_the_run(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    train(options(run, toy_set, recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "rehearse", lambda *_: None)
        train(options(tmp_path / "without", toy_set, recipe))
    assert final(run) == final(tmp_path / "without")


class CountingTransformer(Transformer):
    """A network with a buffer that counts its calls."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *args: Any, **more: Any) -> Any:
        self.calls += 1
        return super().forward(*args, **more)


def test_the_rehearsal_restores_buffers_and_removes_gradients(toy_set: Path, tmp_path: Path) -> None:
    architecture = 'architecture="tests.test_memory:CountingTransformer"'
    run = TrainingRun.from_options(options(tmp_path / "run", toy_set, toy.recipe(tmp_path), architecture))
    state = run.state
    before = {name: value.clone() for name, value in state.net.state_dict().items()}
    rehearse(state, run.batches)
    after = state.net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in state.net.parameters())
    assert not state.optimizer.state and not state.guard.pending


def test_short_memory_shows_before_the_first_step_and_is_saved(
    toy_set: Path, tmp_path: Path, run: Path
) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    with memory_for(7, training=True) as limited:
        train(options(tmp_path / "uninterrupted", toy_set, recipe))
        refused = limited.refused
        assert refused and max(limited.fitted) <= 7
        train(options(run, toy_set, recipe, "training.steps=4"))
        assert limited.refused == 2 * refused
        halvings = json.loads((run / "step-00000004/training/state.json").read_bytes())["halvings"]
        assert halvings == refused, "all were in the rehearsal"
        train(options(run, toy_set, recipe))
        assert limited.refused == 2 * refused, "a resumed run starts with the saved number of micro-batches"
    assert final(run) == final(tmp_path / "uninterrupted")


def test_short_memory_does_not_change_the_order_of_the_data(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    train(options(tmp_path / "unlimited", toy_set, recipe))
    with memory_for(7, training=True):
        train(options(run, toy_set, recipe))
    ours, theirs = (final(folder)[2]["progress"] for folder in (run, tmp_path / "unlimited"))
    for key in ("step", "epoch", "epoch_step", "target_tokens"):
        assert ours[key] == theirs[key]


def test_memory_can_run_out_in_a_later_step(toy_set: Path, tmp_path: Path, run: Path) -> None:
    loss, limited, step = TranslationObjective.loss, LimitedMemory(), [0]

    def recorded(state: TrainState, batches: Any) -> Any:
        step[0] = state.progress.step
        return train_step(state, batches)

    def checked(self: TranslationObjective, net: Any, batch: Any) -> Loss:
        if torch.is_grad_enabled() and step[0] >= 3:
            limited.check(len(batch.source), 7)
        return loss(self, net, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "train_step", recorded)
        patch.setattr(TranslationObjective, "loss", checked)
        train(options(run, toy_set, toy.recipe(tmp_path)))
    assert limited.refused and checkpoints.list_checkpoints(run)[-1].step == 6


# In validation


def test_the_dev_loss_in_micro_batches_is_the_dev_loss(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path)
    train(options(tmp_path / "unlimited", toy_set, recipe))
    with memory_for(4, training=False) as limited:
        train(options(run, toy_set, recipe))
    assert limited.refused and max(limited.fitted) <= 4
    assert sum(limited.fitted) == 2 * 30, "each pair of the dev set once in each of two validations"
    found, expected = (
        [entry["scores"][0]["value"] for entry in log(folder, "validate")]
        for folder in (run, tmp_path / "unlimited")
    )
    assert found == pytest.approx(expected, rel=1e-6)
    assert final(run, 6)[:2] == final(tmp_path / "unlimited", 6)[:2]


def test_the_dev_set_is_translated_in_smaller_batches(
    toy_set: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy.recipe(tmp_path, TRANSLATED)
    train(options(tmp_path / "unlimited", toy_set, recipe), validating.validate)
    limited, start = LimitedMemory(), BatchDecoder.start

    def checked(self: BatchDecoder, requests: Any, max_tokens: int, **options: Any) -> Any:
        limited.check(len(requests), 5)
        return start(self, requests, max_tokens, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchDecoder, "start", checked)
        train(options(run, toy_set, recipe), validating.validate)
    assert limited.refused and max(limited.fitted) <= 5
    assert "memory is short: translating goes on with fewer sentences" in capsys.readouterr().err
    scores = [
        [checkpoint.manifest.scores for checkpoint in checkpoints.list_checkpoints(folder)]
        for folder in (run, tmp_path / "unlimited")
    ]
    assert scores[0] == scores[1]
    assert final(run, 6) == final(tmp_path / "unlimited", 6)


@pytest.mark.parametrize("where", ["loss", "translations"])
def test_a_dev_set_that_does_not_fit_at_all_does_not_end_the_run(
    toy_set: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    recipe = toy.recipe(tmp_path, {**TRANSLATED, "training": {"patience": 1}})

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch:
        if where == "loss":
            patch.setattr(validation, "loss_sums", full)
        else:
            patch.setattr(BatchDecoder, "start", full)
        train(options(run, toy_set, recipe), validating.validate)
    assert capsys.readouterr().err.count("these weights are not validated") == 2
    found = checkpoints.list_checkpoints(run)
    assert found[-1].step == 6, "a validation without a score does not count for patience"
    assert not any(checkpoint.score() for checkpoint in found)
    assert [len(entry["scores"]) for entry in log(run, "validate")] == [where == "translations"] * 2


def test_the_largest_batches_are_batches_of_the_plan(toy_set: Path, tmp_path: Path) -> None:
    run = TrainingRun.from_options(
        TrainOptions(data=toy_set, recipe=toy.recipe(tmp_path), run=tmp_path / "run")
    )
    batches: Batches = run.batches
    plan = [pairs for step in batches.plan(0) for pairs in step]
    largest = batches.largest_batches()
    assert all(any(pairs is planned for planned in plan) for pairs in largest)
    assert len({id(pairs) for pairs in largest}) == len(largest) <= 3


@pytest.mark.filterwarnings("default::DeprecationWarning")  # of torch's compiler, about torch
def test_micro_batches_of_a_compiled_network_have_one_shape(toy_set: Path, tmp_path: Path) -> None:
    """Each new shape would be compiled anew."""
    recipe = toy.recipe(tmp_path)
    run = TrainingRun.from_options(options(tmp_path / "run", toy_set, recipe, "training.compile=on"))
    state = run.state
    state.forward = state.net  # the shapes are the same without the compiler
    assert state.batch_shape
    shapes, loss = set(), TranslationObjective.loss

    def recorded(self: TranslationObjective, net: Any, batch: Any) -> Loss:
        shapes.add(
            (len(batch.source.ids_N), len(batch.before.ids_N), len(batch.source), batch.source.longest)
        )
        return loss(self, net, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TranslationObjective, "loss", recorded)
        for halvings in (0, 1):
            state.micro_batches.halvings = halvings
            train_step(state, [run.batches.load(run.batches.plan(0)[0][0])])
            shape = state.batch_shape.micro_batch(2**halvings)
            assert shapes == {(shape.source_tokens, shape.target_tokens, shape.sentences, shape.max_length)}
            shapes.clear()


def test_the_batch_shape_keeps_to_the_positions_of_the_network(toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path)
    longest = int(Batches(PreparedSet.open(toy_set), BatchConfig(), seed=1).lengths.max())
    changes = (f"network.max_positions={longest + 1}", "batches.subword_alpha=0.4")
    shape = TrainingRun.from_options(options(tmp_path / "run", toy_set, recipe, *changes)).state.batch_shape
    assert shape and shape.max_length == longest + 1
