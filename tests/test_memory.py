"""Memory that is too short, injected: found at the start, met by smaller parts, never the end of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from trmt.decoding.eager import Eager

from tests import toy
from tests.contracts.test_training import HARD, final, log
from tests.toy import options
from trmt import validating
from trmt.bundles import checkpoints
from trmt.nets.transformer import Transformer
from trmt.objectives.base import Loss
from trmt.objectives.translation import Translation
from trmt.sets.batches import BatchConfig, Batches, DataPosition
from trmt.sets.shards import PreparedSet
from trmt.training.learner import Learner
from trmt.training.planning import TrainOptions
from trmt.training.run import Run, train

TRANSLATED = {"validation": {"every": 3, "metric": "chrf", "sentences": 30}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


class Short:
    """How often memory was too short, and the sizes of what did fit."""

    def __init__(self) -> None:
        self.refused = 0
        self.fitted: list[int] = []

    def ask(self, size: int, limit: int) -> None:
        if size > limit:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 byte")
        self.fitted.append(size)


@contextmanager
def memory_for(limit: int, *, training: bool) -> Iterator[Short]:
    """Memory ends where a batch has more pairs, in training or else in looking at the dev set."""
    short, loss = Short(), Translation.loss

    def scarce(self: Translation, net: Any, batch: Any) -> Loss:
        if torch.is_grad_enabled() == training:
            short.ask(len(batch.source), limit)
        return loss(self, net, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Translation, "loss", scarce)
        yield short


# At the start


@pytest.mark.parametrize("architecture", ["transformer", "rnn"])  # in a row, and padded
def test_the_largest_batches_come_first(toy_set: Path, tmp_path: Path, run: Path, architecture: str) -> None:
    sizes: list[tuple[int, int, int]] = []
    steps: list[int] = []
    loss, learn = Translation.loss, Learner.learn

    def measured(self: Translation, net: Any, batch: Any) -> Loss:
        if torch.is_grad_enabled():
            lengths_S = torch.maximum(batch.source.lengths_S, batch.before.lengths_S)
            pairs, longest = len(lengths_S), int(lengths_S.max())
            sizes.append((int(lengths_S.sum()) if type(net).in_row else pairs * longest, pairs, longest))
        return loss(self, net, batch)

    def counted(self: Learner, *rest: Any) -> Any:
        steps.append(len(sizes))
        return learn(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Translation, "loss", measured)
        patch.setattr(Learner, "learn", counted)
        recipe = toy.recipe(tmp_path, {"training": {"steps": 0, "epochs": 1}}, architecture=architecture)
        train(options(run, toy_set, recipe))
    first, later = sizes[: steps[0]], sizes[steps[0] :]
    assert 1 <= len(first) <= 3 and len(later) == len(steps)
    for kind in range(3):
        assert max(size[kind] for size in first) == max(size[kind] for size in later)


def test_what_is_rehearsed_has_its_subwords_drawn(toy_set: Path, tmp_path: Path) -> None:
    """They are more than those that are stored, and take more memory."""
    recipe = toy.recipe(tmp_path)
    made = Run.planned(options(tmp_path / "run", toy_set, recipe, "batches.subword_alpha=0.3"), None)
    stored = max(
        made.learner.objective.tokens(made.batches.load(pairs)) for pairs in made.batches.largest_batches()
    )
    rehearsed, loss = [], Translation.loss

    def noted(self: Translation, net: Any, batch: Any) -> Loss:
        rehearsed.append(batch.tokens)
        return loss(self, net, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Translation, "loss", noted)
        made.learner.rehearse(made.batches)
        most = max(rehearsed)
        for position, step in made.batches.steps(DataPosition(0, 0)):
            made.learner.learn(step, position.step)
            if position.epoch:
                break
    assert most > 1.1 * stored
    assert max(rehearsed) < 1.1 * most


def test_rehearsing_changes_nothing(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    train(options(run, toy_set, recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "rehearse", lambda *_: None)
        train(options(tmp_path / "without", toy_set, recipe))
    assert final(run) == final(tmp_path / "without")


class Counting(Transformer):
    """A network that keeps more than weights: how often it was called."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *args: Any, **more: Any) -> Any:
        self.calls += 1
        return super().forward(*args, **more)


def test_rehearsing_puts_buffers_and_gradients_back(toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path)
    made = Run.planned(
        options(tmp_path / "run", toy_set, recipe, 'architecture="tests.test_memory:Counting"'), None
    )
    before = {name: value.clone() for name, value in made.learner.net.state_dict().items()}
    made.learner.rehearse(made.batches)
    after = made.learner.net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in made.learner.net.parameters())
    assert not made.learner.optimizer.state and not made.learner.guard.unread


def test_short_memory_shows_before_the_first_step_and_is_remembered(
    toy_set: Path, tmp_path: Path, run: Path
) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    with memory_for(7, training=True) as short:
        train(options(tmp_path / "whole", toy_set, recipe))
        refused = short.refused
        assert refused and max(short.fitted) <= 7
        train(options(run, toy_set, recipe, "training.steps=4"))
        assert short.refused == 2 * refused
        halvings = json.loads((run / "step-00000004/training/state.json").read_bytes())["learner"]["halvings"]
        assert halvings == refused, "each refusal was the rehearsal's"
        train(options(run, toy_set, recipe))
        assert short.refused == 2 * refused, "a resumed run begins with what was learned"
    assert final(run) == final(tmp_path / "whole")


def test_the_plan_stays_what_it_was(toy_set: Path, tmp_path: Path, run: Path) -> None:
    recipe = toy.recipe(tmp_path, HARD)
    train(options(tmp_path / "plenty", toy_set, recipe))
    with memory_for(7, training=True):
        train(options(run, toy_set, recipe))
    ours, theirs = (final(folder)[2]["progress"] for folder in (run, tmp_path / "plenty"))
    for key in ("step", "epoch", "position", "target_tokens"):
        assert ours[key] == theirs[key]


def test_memory_that_ends_later_is_met_as_well(toy_set: Path, tmp_path: Path, run: Path) -> None:
    learn, loss = Learner.learn, Translation.loss
    short, now = Short(), [0]

    def learned(self: Learner, examples: Any, step: int) -> Any:
        now[0] = step
        return learn(self, examples, step)

    def scarce(self: Translation, net: Any, batch: Any) -> Loss:
        if torch.is_grad_enabled() and now[0] >= 3:
            short.ask(len(batch.source), 7)
        return loss(self, net, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "learn", learned)
        patch.setattr(Translation, "loss", scarce)
        train(options(run, toy_set, toy.recipe(tmp_path)))
    assert short.refused and checkpoints.steps(run)[-1].step == 6


# While looking at the dev set


def test_the_dev_loss_in_parts_is_the_dev_loss(
    toy_set: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy.recipe(tmp_path)
    train(options(tmp_path / "plenty", toy_set, recipe))
    with memory_for(4, training=False) as short:
        train(options(run, toy_set, recipe))
    assert short.refused and max(short.fitted) <= 4
    assert sum(short.fitted) == 2 * 30, "each pair of the dev set once in each of two looks"
    found, expected = (
        [entry["scores"][0]["value"] for entry in log(folder, "validate")]
        for folder in (run, tmp_path / "plenty")
    )
    assert found == pytest.approx(expected, rel=1e-6)
    assert final(run, 6)[:2] == final(tmp_path / "plenty", 6)[:2]


def test_the_dev_set_is_translated_in_smaller_batches(
    toy_set: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy.recipe(tmp_path, TRANSLATED)
    train(options(tmp_path / "plenty", toy_set, recipe), validating.validate)
    short, work = Short(), Eager._started

    def scarce(self: Eager, requests: Any, indices: list[int], room: int) -> Any:
        short.ask(len(indices), 5)
        return work(self, requests, indices, room)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Eager, "_started", scarce)
        train(options(run, toy_set, recipe), validating.validate)
    assert short.refused and max(short.fitted) <= 5
    assert "memory is short: translating goes on with fewer sentences" in capsys.readouterr().err
    scores = [
        [point.manifest.scores for point in checkpoints.steps(folder)]
        for folder in (run, tmp_path / "plenty")
    ]
    assert scores[0] == scores[1]
    assert final(run, 6) == final(tmp_path / "plenty", 6)


@pytest.mark.parametrize("where", ["loss", "translations"])
def test_a_dev_set_that_does_not_fit_at_all_does_not_end_the_run(
    toy_set: Path, tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    recipe = toy.recipe(tmp_path, {**TRANSLATED, "training": {"patience": 1}})

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*((Learner, "_dev_sums", full) if where == "loss" else (Eager, "_started", full)))
        train(options(run, toy_set, recipe), validating.validate)
    assert capsys.readouterr().err.count("training goes on without it") == 2
    points = checkpoints.steps(run)
    assert points[-1].step == 6, "what could not be judged does not use up patience"
    assert not any(point.score() for point in points)
    assert [len(entry["scores"]) for entry in log(run, "validate")] == [where == "translations"] * 2


def test_largest_batches_are_those_of_the_plan(toy_set: Path, tmp_path: Path) -> None:
    made = Run.planned(TrainOptions(data=toy_set, recipe=toy.recipe(tmp_path), run=tmp_path / "run"), None)
    batches: Batches = made.batches
    plan = [pairs for step in batches.plan(0) for pairs in step]
    largest = batches.largest_batches()
    assert all(any(pairs is planned for planned in plan) for pairs in largest)
    assert len({id(pairs) for pairs in largest}) == len(largest) <= 3


@pytest.mark.filterwarnings("default::DeprecationWarning")  # of torch's compiler, about torch
def test_micro_batches_have_one_shape_too(toy_set: Path, tmp_path: Path) -> None:
    """For a compiled network: each new shape would be compiled again."""
    recipe = toy.recipe(tmp_path)
    made = Run.planned(options(tmp_path / "run", toy_set, recipe, "training.compile=on"), None)
    made.learner._forward = made.learner.net  # the shapes are the same without the compiler
    assert made.learner.batch_shape
    shapes, loss = set(), Translation.loss

    def noted(self: Translation, net: Any, batch: Any) -> Loss:
        shapes.add(
            (len(batch.source.ids_N), len(batch.before.ids_N), len(batch.source), batch.source.longest)
        )
        return loss(self, net, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Translation, "loss", noted)
        for halvings in (0, 1):
            made.learner.parts.halvings = halvings
            made.learner.learn([made.batches.load(made.batches.plan(0)[0][0])], 0)
            shape = made.learner.batch_shape.micro_batch(2**halvings)
            assert shapes == {(shape.source_tokens, shape.target_tokens, shape.sentences, shape.max_length)}
            shapes.clear()


def test_the_batch_shape_has_no_more_positions_than_the_network(toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path)
    longest = int(Batches(PreparedSet.open(toy_set), BatchConfig(), seed=1).lengths.max())
    changes = (f"network.longest={longest + 1}", "batches.subword_alpha=0.4")
    made = Run.planned(options(tmp_path / "run", toy_set, recipe, *changes), None)
    assert made.learner.batch_shape and made.learner.batch_shape.max_length == longest + 1
