from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import toy
from tests.fakes import random_sentences, small_network
from trmt.errors import ConfigError
from trmt.nets.base import Ragged, Source
from trmt.registry import ARCHITECTURES, resolve
from trmt.training import sharding
from trmt.training.distributed import Team
from trmt.training.learner import Learner
from trmt.training.recipe import load_recipe

SHARDABLE = [name for name in ARCHITECTURES if resolve(ARCHITECTURES, name).layers_called_once]


@pytest.mark.parametrize("norm_place", ["post", "pre"])
@pytest.mark.parametrize("architecture", SHARDABLE)
def test_what_is_gathered_for_a_layer_is_called_once(architecture: str, norm_place: str) -> None:
    # A call that did not happen would leave the layer gathered; a second one would gather it again.
    options = {"norm_place": norm_place} if architecture == "transformer" else {}
    net = small_network(architecture, **options).train()
    lists = [part for part in net.children() if isinstance(part, nn.ModuleList)]
    pieces = [p for part in lists for layer in part for p in layer.modules() if sharding._has_matrix(p)]
    assert len(pieces) > len(lists)
    calls: Counter[nn.Module] = Counter()
    for piece in pieces:
        piece.register_forward_pre_hook(lambda module, _: calls.update([module]))
    sentences = random_sentences(4)
    net(Source.of(sentences), Ragged.of(sentences))
    assert [calls[piece] for piece in pieces] == [1] * len(pieces)


def test_a_network_that_calls_its_layers_often_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not work with RNN"):
        sharding.shard(small_network("rnn"), Team(), torch.device("cpu"))


def test_half_precision_is_refused(tmp_path: Path) -> None:
    class Two(Team):
        size = 2

    sizes = {"source_vocabulary": 20, "target_vocabulary": 20}
    recipe = load_recipe(toy.recipe(tmp_path, {"training": {"shard": True}}), network=sizes)
    made = Learner(replace(recipe, training=replace(recipe.training, shard=False)), steps=1)
    made.team, made.precision = Two(), "fp16"
    with pytest.raises(ConfigError, match="not fp16"):
        made._shard()


def test_a_process_alone_keeps_everything(tmp_path: Path) -> None:
    sizes = {"source_vocabulary": 20, "target_vocabulary": 20}
    recipe = load_recipe(toy.recipe(tmp_path, {"training": {"shard": True}}), network=sizes)
    made = Learner(recipe, steps=1)
    assert not made.sharded
    assert not any(sharding.sliced(parameter) for parameter in made.net.parameters())
