from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trmt.errors import ConfigError
from trmt.training.optim import (
    OptimConfig,
    RunningMean,
    learning_rate,
    moments,
    optimiser,
    restore_moments,
    set_rate,
)

STEPS = range(1, 2001)


def rates(schedule: Any, *, lr: float = 1.0, warmup: int = 400, steps: int = 2000) -> list[float]:
    rate = learning_rate(OptimConfig(schedule=schedule, lr=lr, warmup=warmup), width=512, steps=steps)
    return [rate(step) for step in STEPS]


def test_the_papers_schedule_is_its_formula_and_highest_at_the_end_of_warmup() -> None:
    expected = [512**-0.5 * min(step**-0.5, step * 400**-1.5) for step in STEPS]
    assert rates("paper") == pytest.approx(expected, rel=1e-12)
    assert int(np.argmax(rates("paper"))) + 1 == 400


def test_inverse_square_root_reaches_lr_and_falls() -> None:
    found = rates("inverse_sqrt", lr=0.5)
    assert found[199] == pytest.approx(0.25)
    assert max(found) == found[399] == pytest.approx(0.5)
    assert found[1599] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("schedule", "halfway"), [("linear", 0.5), ("cosine", (1 + math.cos(math.pi / 2)) / 2)]
)
def test_linear_and_cosine_end_at_nothing(schedule: str, halfway: float) -> None:
    found = rates(schedule)
    assert found[:400] == pytest.approx([step / 400 for step in range(1, 401)])
    assert found[1199] == pytest.approx(halfway)
    assert found[-1] == pytest.approx(0, abs=1e-12)


def test_constant_stays() -> None:
    found = rates("constant", lr=0.1)
    assert found[0] == pytest.approx(0.1 / 400)
    assert set(found[399:]) == {0.1}


@pytest.mark.parametrize("schedule", ["inverse_sqrt", "linear", "cosine", "constant"])
def test_without_warmup_the_first_step_is_a_full_one(schedule: str) -> None:
    assert rates(schedule, warmup=0)[0] == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_that_ends_needs_an_end(schedule: Any) -> None:
    with pytest.raises(ConfigError, match=r"training\.steps"):
        learning_rate(OptimConfig(schedule=schedule), width=8, steps=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"warmup": -1},
        {"ema": 1.0},
        {"clip": -0.1},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"epsilon": 0.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"clip": math.nan},
        {"ema": math.nan},
        {"beta2": math.nan},
        {"epsilon": math.nan},
        {"weight_decay": math.inf},
        {"weight_decay": -1.0},
        {"warmup": 0},
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        OptimConfig(**wrong)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    net(torch.randn(7, 5)).square().sum().backward()
    set_rate(optimizer, 0.01)
    optimizer.step()


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_is_kingma_and_bas(name: Any) -> None:
    """One parameter against the algorithm as the paper prints it, in double precision."""
    config = OptimConfig(name=name, beta1=0.8, beta2=0.9, epsilon=1e-3, schedule="constant")
    layer = nn.Linear(3, 2, bias=False).double()
    expected = layer.weight.detach().numpy().copy()
    optimizer = optimiser(layer, config)
    m = v = np.zeros_like(expected)
    for t in range(1, 6):
        gradient = np.random.default_rng(t).normal(size=expected.shape)
        layer.weight.grad = torch.from_numpy(gradient.copy())
        set_rate(optimizer, 0.05)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        expected = expected - 0.05 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-9)


def test_only_matrices_decay() -> None:
    net = network()
    optimizer = optimiser(net, OptimConfig(name="adamw", weight_decay=0.5))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    set_rate(optimizer, 0.1)
    optimizer.step()
    for name, parameter in net.named_parameters():
        factor = 0.95 if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name].detach() * factor)


def test_moments_make_the_round_trip() -> None:
    config = OptimConfig()
    net = network()
    optimizer = optimiser(net, config)
    for seed in range(3):
        step(net, optimizer, seed)
    saved = {name: tensor.clone() for name, tensor in moments(net, optimizer).items()}
    assert {name.partition(":")[0] for name in saved} == {"step", "exp_avg", "exp_avg_sq"}
    twin = network()
    twin.load_state_dict(net.state_dict())
    resumed = optimiser(twin, config)
    restore_moments(twin, resumed, saved)
    for seed in range(3, 6):
        step(net, optimizer, seed)
        step(twin, resumed, seed)
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_running_mean_is_the_formula() -> None:
    net = network().double()
    mean = RunningMean(net, 0.8)
    expected = net[0].weight.detach().numpy().copy()
    for number in range(12):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        mean.update(number)
        decay = min(0.8, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * net[0].weight.detach().numpy()
    np.testing.assert_allclose(mean.named()["0.weight"].numpy(), expected, rtol=1e-12)


def test_swapping_twice_changes_nothing() -> None:
    net = network()
    mean = RunningMean(net, 0.5)
    with torch.no_grad():
        net[0].weight.add_(1)
    live, averaged = net[0].weight.clone(), mean.named()["0.weight"].clone()
    mean.swap()
    assert torch.equal(net[0].weight, averaged)
    mean.swap()
    assert torch.equal(net[0].weight, live)
    assert torch.equal(mean.named()["0.weight"], averaged)


def test_the_running_mean_is_restored() -> None:
    first, second = RunningMean(network(), 0.5), RunningMean(network(), 0.5)
    first.update(0)
    first.mean[0].add_(1)
    second.restore(first.named())
    assert all(torch.equal(one, other) for one, other in zip(first.mean, second.mean, strict=True))
