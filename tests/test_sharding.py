from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import toy
from tests.fakes import random_sentences, small_network
from tests.variants import Variant, variants
from trmt.errors import ConfigError
from trmt.nets.ragged import Ragged, Source
from trmt.registry import ARCHITECTURES, resolve
from trmt.training import sharding, state
from trmt.training.distributed import Distributed
from trmt.training.recipe import Recipe, load_recipe
from trmt.training.state import TrainState

SHARDABLE = [each for each in variants() if resolve(ARCHITECTURES, each.name).layers_called_once]


@pytest.mark.parametrize("variant", SHARDABLE, ids=str)
def test_each_module_of_a_layer_is_called_once(variant: Variant) -> None:
    # Without a call the layer would stay gathered; a second call would gather it again.
    net = small_network(variant.name, **variant.options).train()
    modules = [m for layer in sharding.layers(net) for m in layer.modules() if sharding.has_matrix(m)]
    assert len(modules) >= len(sharding.layers(net)) > 0
    calls: Counter[nn.Module] = Counter()
    for module in modules:
        module.register_forward_pre_hook(lambda module, _: calls.update([module]))
    sentences = random_sentences(4)
    net(Source.of(sentences), Ragged.of(sentences))
    assert [calls[module] for module in modules] == [1] * len(modules)


def test_a_network_that_calls_its_layers_repeatedly_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not work with RNN"):
        sharding.shard(small_network("rnn"), Distributed(), torch.device("cpu"))


def sharded_recipe(folder: Path) -> Recipe:
    sizes = {"source_vocabulary": 20, "target_vocabulary": 20}
    return load_recipe(toy.recipe(folder, {"training": {"shard": True}}), network=sizes)


class TwoProcesses(Distributed):
    world_size = 2


def test_fp16_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "choose_precision", lambda *_: "fp16")
    with pytest.raises(ConfigError, match="not fp16"):
        TrainState(sharded_recipe(tmp_path), total_steps=1, distributed=TwoProcesses())


def test_a_single_process_is_not_sharded(tmp_path: Path) -> None:
    single = TrainState(sharded_recipe(tmp_path), total_steps=1)
    assert not single.sharded
    assert not any(sharding.is_sharded(parameter) for parameter in single.net.parameters())
