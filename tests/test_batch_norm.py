"""Batch norm in the Transformer: over real tokens only, and what becomes of its statistics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import toy
from tests.contracts.test_training import HARD, final
from tests.fakes import random_sentences, small_network
from tests.toy import options
from trmt.averaging import average_bundles
from trmt.bundles import bundles, checkpoints
from trmt.errors import ConfigError, TrmtError
from trmt.lab.batch_norm import BatchNorm
from trmt.nets.base import freeze
from trmt.nets.linear import PlainProducts
from trmt.nets.ragged import Ragged, Source
from trmt.quantizing import quantize
from trmt.sets.batches import BatchConfig, Batches
from trmt.sets.shards import PreparedSet
from trmt.training.distributed import Distributed
from trmt.training.recipe import Recipe, load_recipe
from trmt.training.run import train
from trmt.training.state import TrainState
from trmt.training.step import _micro_batch_shape, train_step
from trmt.translating import Translator

SOURCES = random_sentences(6, seed=1)
TARGETS = [[1, *sentence] for sentence in random_sentences(6, seed=2)]
BATCH: dict[str, Any] = {"architecture": "transformer-batch-norm"}


def test_statistics_are_those_of_the_real_tokens() -> None:
    """The first norm of each side sees embeddings, which torch's own norm is given one by one."""
    net: Any = small_network("transformer-batch-norm", norm_position="pre").train()
    fresh = nn.BatchNorm1d(16)
    for stack, sentences in ((net.encoder, SOURCES), (net.decoder, TARGETS)):
        norm = stack.layers[0].self_norm
        norm.reset_running_stats()
        rows = [stack.embedding(torch.tensor(each), torch.arange(len(each))) for each in sentences]
        expected = fresh(torch.cat(rows))
        seen: list[torch.Tensor] = []
        hook = norm.register_forward_hook(lambda *given, seen=seen: seen.append(given[2]))
        net(Source.of(SOURCES), Ragged.of(TARGETS))
        hook.remove()
        torch.testing.assert_close(seen[0], expected)
        torch.testing.assert_close(norm.running_mean, fresh.running_mean)
        torch.testing.assert_close(norm.running_var, fresh.running_var)
        fresh.reset_running_stats()


def test_sentences_depend_on_each_other_in_training_only() -> None:
    net = small_network("transformer-batch-norm")
    assert net.couples_batch and not small_network("transformer").couples_batch
    target = Ragged.of(TARGETS[:1])
    together, alone = Source.of(SOURCES), Source.of(SOURCES[:1])
    for training in (True, False):
        net.train(training)
        first = net(together, Ragged.of(TARGETS)).hidden[: target.longest]
        assert torch.allclose(first, net(alone, target).hidden, atol=1e-5) != training


@torch.no_grad()
def test_a_frozen_norm_is_that_of_torch_with_running_statistics() -> None:
    norm = BatchNorm(8)
    theirs = nn.BatchNorm1d(8)
    for each in (norm, theirs):
        for seed, tensor in enumerate([*each.parameters(), each.running_mean, each.running_var]):
            tensor.copy_(torch.rand(8, generator=torch.Generator().manual_seed(seed)) + 0.1)
    x = torch.randn(5, 3, 8)
    want = theirs.eval()(x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(freeze(norm, PlainProducts())(x), want, atol=1e-5, rtol=1e-5)


def test_a_single_token_has_no_variance_and_is_no_error() -> None:
    norm = BatchNorm(8).train()
    assert norm(torch.ones(1, 8)).isfinite().all()


def test_resuming_is_exact(toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, {**HARD, **BATCH})
    train(options(tmp_path / "whole", toy_set, recipe))
    for steps in (3, 10):
        train(options(tmp_path / "parted", toy_set, recipe, f"training.steps={steps}"))
    assert final(tmp_path / "whole") == final(tmp_path / "parted")


def test_statistics_are_kept_averaged_and_quantised(toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, {**HARD, **BATCH})
    run = train(options(tmp_path / "run", toy_set, recipe))
    found = checkpoints.list_checkpoints(run)[-2:]
    kept = [bundles.read_weights(checkpoint.folder, checkpoint.manifest) for checkpoint in found]
    name = "encoder.layers.0.self_norm.running_mean"
    live = bundles.load_bundle(found[1].folder).net.state_dict()[name]
    assert live.any() and torch.equal(live, kept[1][name])
    average = tmp_path / "average"
    average_bundles([checkpoint.folder for checkpoint in found], average)
    mean = bundles.load_bundle(average).net.state_dict()[name]
    torch.testing.assert_close(mean, (kept[0][name] + kept[1][name]) / 2)
    quantize(average, tmp_path / "int8")
    texts = [source for source, _ in toy.pairs(3, seed=5)]
    assert len([*Translator.load(tmp_path / "int8").translate(texts)]) == 3


def test_the_moving_average_has_statistics_of_its_own(toy_set: Path, tmp_path: Path) -> None:
    state = make_state(tmp_path, **{"optim": {"ema": 0.9}})
    name = "encoder.layers.0.self_norm.running_mean"
    train_step(state, [examples(toy_set)])
    live = state.net.state_dict()[name].clone()
    averaged = state.bundle_weights()[name].clone()
    assert live.any() and not torch.allclose(live, averaged)
    with state.evaluating():
        assert torch.equal(state.net.state_dict()[name], averaged)
    assert torch.equal(state.net.state_dict()[name], live)
    assert state.bundle_names()[f"ema:{name}"] == name


def make_state(folder: Path, *, distributed: Distributed | None = None, **changes: Any) -> TrainState:
    recipe = toy.recipe(folder, {**BATCH, **changes})
    sizes = {"source_vocabulary": 70, "target_vocabulary": 70}
    loaded: Recipe = load_recipe(recipe, network=sizes)
    return TrainState(loaded, total_steps=4, distributed=distributed)


def examples(toy_set: Path) -> Any:
    batches = Batches(PreparedSet.open(toy_set), BatchConfig(tokens=150), seed=1)
    return batches.load(batches.plan(0)[0][0])


class TwoProcesses(Distributed):
    world_size = 2


def test_several_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch normalisation.*2 processes"):
        make_state(tmp_path, distributed=TwoProcesses())


def test_a_batch_that_does_not_fit_is_not_cut(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(tmp_path)

    def short(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("trmt.training.step.forward_backward", short)
    with pytest.raises(TrmtError, match=r"batch normalisation.*lower batches\.tokens"):
        train_step(state, [examples(toy_set)])


def test_batches_are_not_filled_up_with_tokens_that_would_count(toy_set: Path, tmp_path: Path) -> None:
    shape = Batches(PreparedSet.open(toy_set), BatchConfig(tokens=150), seed=1, padding_free=True).shape
    assert shape
    sampled = {"architecture": "transformer-hard", "network": {"cross_attention": "sampled"}}
    for changes, filled in (({}, False), (sampled, False), ({"architecture": "transformer"}, True)):
        state = make_state(tmp_path, **changes)
        state.batch_shape, state.compiled = replace(shape), True
        assert (_micro_batch_shape(state) is not None) == filled
