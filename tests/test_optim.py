from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from trmt.errors import ConfigError
from trmt.training.distributed import Distributed
from trmt.training.optim import (
    EMA,
    OptimConfig,
    build_optimizer,
    learning_rate,
    load_moments,
    moments,
    set_learning_rate,
)

STEPS = range(1, 2001)


def rates(schedule: Any, *, lr: float = 1.0, warmup: int = 400, steps: int = 2000) -> list[float]:
    rate = learning_rate(OptimConfig(schedule=schedule, lr=lr, warmup=warmup), d_model=512, total_steps=steps)
    return [rate(step) for step in STEPS]


def test_the_schedule_of_the_paper_is_its_formula_with_the_maximum_at_the_end_of_warmup() -> None:
    expected = [512**-0.5 * min(step**-0.5, step * 400**-1.5) for step in STEPS]
    assert rates("paper") == pytest.approx(expected, rel=1e-12)
    assert int(np.argmax(rates("paper"))) + 1 == 400


def test_the_inverse_square_root_schedule_reaches_lr_and_falls() -> None:
    found = rates("inverse_sqrt", lr=0.5)
    assert found[199] == pytest.approx(0.25)
    assert max(found) == found[399] == pytest.approx(0.5)
    assert found[1599] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("schedule", "halfway"), [("linear", 0.5), ("cosine", (1 + math.cos(math.pi / 2)) / 2)]
)
def test_linear_and_cosine_schedules_end_at_zero(schedule: str, halfway: float) -> None:
    found = rates(schedule)
    assert found[:400] == pytest.approx([step / 400 for step in range(1, 401)])
    assert found[1199] == pytest.approx(halfway)
    assert found[-1] == pytest.approx(0, abs=1e-12)


def test_the_constant_schedule_stays_at_lr() -> None:
    found = rates("constant", lr=0.1)
    assert found[0] == pytest.approx(0.1 / 400)
    assert set(found[399:]) == {0.1}


@pytest.mark.parametrize("schedule", ["inverse_sqrt", "linear", "cosine", "constant"])
def test_without_warmup_the_first_step_has_the_full_learning_rate(schedule: str) -> None:
    assert rates(schedule, warmup=0)[0] == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_with_an_end_needs_the_last_step(schedule: Any) -> None:
    with pytest.raises(ConfigError, match=r"training\.steps"):
        learning_rate(OptimConfig(schedule=schedule), d_model=8, total_steps=0)


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
    set_learning_rate(optimizer, 0.01)
    optimizer.step()


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_is_the_algorithm_of_the_paper(name: Any) -> None:
    """One parameter against the algorithm by Kingma and Ba (arXiv 1412.6980), in double precision."""
    config = OptimConfig(name=name, beta1=0.8, beta2=0.9, epsilon=1e-3, schedule="constant")
    layer = nn.Linear(3, 2, bias=False).double()
    expected = layer.weight.detach().numpy().copy()
    optimizer = build_optimizer(layer, config)
    m = v = np.zeros_like(expected)
    for t in range(1, 6):
        gradient = np.random.default_rng(t).normal(size=expected.shape)
        layer.weight.grad = torch.from_numpy(gradient.copy())
        set_learning_rate(optimizer, 0.05)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        expected = expected - 0.05 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-3)
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-9)


def test_only_matrices_have_weight_decay() -> None:
    net = network()
    optimizer = build_optimizer(net, OptimConfig(name="adamw", weight_decay=0.5))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    for name, parameter in net.named_parameters():
        factor = 0.95 if parameter.dim() > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name].detach() * factor)


def test_training_goes_on_the_same_with_saved_moments() -> None:
    config = OptimConfig()
    net = network()
    optimizer = build_optimizer(net, config)
    for seed in range(3):
        step(net, optimizer, seed)
    saved = {name: tensor.clone() for name, tensor in moments(net, optimizer).items()}
    assert {name.partition(":")[0] for name in saved} == {"step", "exp_avg", "exp_avg_sq"}
    twin = network()
    twin.load_state_dict(net.state_dict())
    resumed = build_optimizer(twin, config)
    load_moments(twin, resumed, saved, Distributed())
    for seed in range(3, 6):
        step(net, optimizer, seed)
        step(twin, resumed, seed)
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_moving_average_is_its_formula() -> None:
    net = network().double()
    ema = EMA(net, 0.8)
    expected = net[0].weight.detach().numpy().copy()
    for number in range(12):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(number)
        decay = min(0.8, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * net[0].weight.detach().numpy()
    np.testing.assert_allclose(ema.named_averages()["0.weight"].numpy(), expected, rtol=1e-12)


def test_swapping_twice_changes_nothing() -> None:
    net = network()
    ema = EMA(net, 0.5)
    with torch.no_grad():
        net[0].weight.add_(1)
    weight, average = net[0].weight.clone(), ema.named_averages()["0.weight"].clone()
    ema.swap()
    assert torch.equal(net[0].weight, average)
    ema.swap()
    assert torch.equal(net[0].weight, weight)
    assert torch.equal(ema.named_averages()["0.weight"], average)
