"""How fast networks train and translate, and how that changes with the length of sentences.

Rounds of short probes, each network and length in turn, so that whatever else the machine does falls on all
of them. A training step has the same number of tokens whatever the length. Weights and sentences are of
chance, and translations are as long as their sources: arithmetic is measured, not what it is good for.
Memory is what one sentence leaves for the backward pass, counted and not timed, so one round of it will do.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from claims.scale import Scale
from claims.systems import BY_NAME, recipe
from experiment import write_lines

SYSTEMS = ("fixed", "rnnsearch", "additive", "conv", "transformer")
TOKENS = 1024  # of a training step, on each side
SENTENCES = 8  # translated together
LEAST = 0.1  # seconds that a probe goes on for, at least
FIRST = 4  # the first id that is no special one
MEMORY = (256, 512, 1024)  # tokens of the one sentence whose memory is counted


def path(work: Path, number: int) -> Path:
    """Where a round's figures are kept."""
    return work / "speed" / f"round-{number}.json"


def measure(work: Path, number: int, scale: Scale, *, device: str) -> None:
    """One round: every network and length, first one way round and then the other."""
    nets = {name: network(name, scale, device) for name in SYSTEMS}
    points = list(itertools.product(scale.lengths, SYSTEMS))
    found: dict[str, float] = {}
    for length, name in points[:: 1 if number % 2 else -1]:
        found[f"train/{name}/{length}"] = training_rate(nets[name], length, device)
        found[f"translate/{name}/{length}"] = translating_rate(nets[name], length, device)
    if number == 1:
        found |= memory(nets, scale, device)
    path(work, number).parent.mkdir(parents=True, exist_ok=True)
    write_lines(path(work, number), [json.dumps(found)])


def read(work: Path, scale: Scale) -> dict[str, dict[int, float]]:
    """What the rounds that are done have measured; what was counted is exact."""
    values: dict[str, dict[int, float]] = {}
    for number in range(1, scale.rounds + 1):
        if path(work, number).exists():
            for name, value in json.loads(path(work, number).read_bytes()).items():
                values.setdefault(name, {})[0 if name.startswith("memory/") else number] = value
    return values


def network(name: str, scale: Scale, device: str) -> Any:
    """A system's network with weights of chance."""
    from trmt.bundles.bundles import build_network

    torch.manual_seed(1)
    tree = recipe(BY_NAME[name], scale, seed=1, device=device)
    sizes = {"source_vocabulary": scale.vocabulary, "target_vocabulary": scale.vocabulary}
    options = {**tree["network"], **sizes, "max_positions": max(scale.longest, 2 * max(MEMORY))}
    return build_network(tree["architecture"], options).to(device)


def training_rate(net: Any, length: int, device: str) -> float:
    """Target tokens a second, forwards and backwards."""
    count = max(TOKENS // length, 1)
    source, target, after_N = _sentences(net, count, length, device)
    net.train()

    def step() -> None:
        net.zero_grad()
        loss(net, source, target, after_N).backward()

    return count * length * _per_second(step, device)


def loss(net: Any, source: Any, target: Any, after_N: Tensor) -> Tensor:
    """What is minimised, without what a network adds of its own."""
    logits_NV = net.readout(net(source, target).hidden)
    return torch.nn.functional.cross_entropy(logits_NV, after_N)


def translating_rate(net: Any, length: int, device: str) -> float:
    """Target tokens a second, greedily, some sentences together."""
    from trmt.decoding.engine import Engine
    from trmt.decoding.greedy import Greedy
    from trmt.decoding.request import Batching, Request

    net.eval()
    engine = Engine(net, Greedy(), bos=2, eos=3, batching=Batching(SENTENCES, SENTENCES * length))
    source = _sentences(net, SENTENCES, length, device)[0]
    requests = [Request(tuple(ids.tolist()), length, min_tokens=length) for ids in source.ids_N.split(length)]
    return SENTENCES * length * _per_second(lambda: list(engine.translate(requests)), device)


def memory(nets: dict[str, Any], scale: Scale, device: str) -> dict[str, float]:
    """Bytes that a sentence leaves for the backward pass, by network and length."""
    found = {}
    for length in MEMORY:
        for name, net in nets.items():
            net.train()
            found[f"memory/{name}/{length}"] = kept(net, length, device)
        found[f"memory/as written/{length}"] = kept_as_written(length, scale.width, device)
    return found


def kept(net: Any, length: int, device: str) -> float:
    """Bytes kept by the loss of one sentence, weights aside."""
    source, target, after_N = _sentences(net, 1, length, device)
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    return _kept(lambda: loss(net, source, target, after_N), own)


def kept_as_written(length: int, width: int, device: str) -> float:
    """Bytes kept by softmax(Q K^T / sqrt(d)) V, computed as it is written, with four heads."""
    query_HLP, key_HLP, value_HLP = torch.randn(
        3, 4, length, width // 4, device=device, requires_grad=True
    ).unbind()

    def attend() -> Tensor:
        score_HLL = query_HLP @ key_HLP.transpose(1, 2) / (width // 4) ** 0.5
        return score_HLL.softmax(-1) @ value_HLP

    return _kept(attend, set())


def _kept(compute: Callable[[], Tensor], own: set[int]) -> float:
    storages: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is given to another tensor

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        compute()
    return float(sum(storages.values()))


def _sentences(net: Any, count: int, length: int, device: str) -> tuple[Any, Any, Tensor]:
    """Sources, targets and what is to be told, all of this length."""
    from trmt.nets.ragged import Ragged, Source

    generator = torch.Generator().manual_seed(length)
    sides = torch.randint(
        FIRST, net.config.target_vocabulary, (2, count, length), generator=generator
    ).tolist()
    after_N = torch.tensor(sides[1], device=device).flatten()
    return Source.of(sides[0], device), Ragged.of(sides[1], device), after_N


def _per_second(once: Callable[[], Any], device: str) -> float:
    """How many times a second, after one time that does not count."""
    once()
    _wait(device)
    began, times = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < LEAST:
        once()
        _wait(device)
        times += 1
    return times / spent


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
