from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import toy
from tests.fakes import random_sentences, small_network
from trmt.errors import ConfigError
from trmt.nets.base import Ragged, Source
from trmt.registry import ARCHITECTURES, resolve
from trmt.training import sharding, state
from trmt.training.distributed import Distributed
from trmt.training.recipe import Recipe, load_recipe
from trmt.training.state import TrainState

SHARDABLE = [name for name in ARCHITECTURES if resolve(ARCHITECTURES, name).layers_called_once]


@pytest.mark.parametrize("norm_position", ["post", "pre"])
@pytest.mark.parametrize("architecture", SHARDABLE)
def test_each_module_of_a_layer_is_called_once(architecture: str, norm_position: str) -> None:
    # Without a call the layer would stay gathered; a second call would gather it again.
    options = {} if architecture.startswith("conv") else {"norm_position": norm_position}
    net = small_network(architecture, **options).train()
    layers = sharding.modules_of_layers(net)
    modules = [module for layer in layers for module in layer]
    assert len(layers) >= 4 and len(modules) > len(layers)
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
