from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fakes import random_sentences, small_network
from trmt.errors import ConfigError
from trmt.lab.universal import UniversalConfig, ponder
from trmt.nets.ragged import Ragged, Source

SOURCES = random_sentences(4, seed=1)
TARGETS = [[1, *sentence] for sentence in random_sentences(4, seed=2)]


def graves(
    inputs: Any, halt: nn.Module, threshold: float, steps: int, x_D: Tensor, transition: Any
) -> tuple[Tensor, Tensor]:
    """One position by the letter of arXiv 1603.08983, equations 6 to 14."""
    states: list[Tensor] = []
    probabilities: list[Tensor] = []
    while True:
        step = len(states)
        input_D = inputs(step, x_D)
        probabilities.append(halt(input_D).sigmoid()[0])
        x_D = transition(step, input_D)
        states.append(x_D)
        if sum(probabilities) > threshold or len(states) == steps:
            break
    remainder = 1 - sum(probabilities[:-1])
    weights = [*probabilities[:-1], remainder]
    mean = torch.stack([weight * state for weight, state in zip(weights, states, strict=True)]).sum(0)
    return mean, len(states) + remainder


@pytest.mark.parametrize("bias", [-5.0, -1.0, 0.0, 1.0, 6.0])
def test_pondering_is_that_of_graves(bias: float) -> None:
    torch.manual_seed(0)
    halt, layer = nn.Linear(8, 1), nn.Linear(8, 8)
    nn.init.constant_(halt.bias, bias)
    x_ND, positions_ND, steps = torch.randn(11, 8), torch.randn(11, 8), torch.randn(5, 8)

    def transition(step: int, x: Tensor) -> Tensor:
        return layer(x).tanh()

    out_ND, count = ponder(
        x_ND, 5, lambda step, x: x + positions_ND + steps[step], transition, halt, threshold=0.99
    )
    total = torch.zeros(())
    for position in range(11):

        def inputs(step: int, x_D: Tensor, position: int = position) -> Tensor:
            return x_D + positions_ND[position] + steps[step]

        mean, cost = graves(inputs, halt, 0.99, 5, x_ND[position], transition)
        torch.testing.assert_close(out_ND[position], mean)
        total = total + cost
    torch.testing.assert_close(count, total)


def same(step: int, x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(("bias", "steps"), [(20.0, 1), (-20.0, 4)])
def test_pondering_ends_when_all_positions_have_halted(bias: float, steps: int) -> None:
    halt, taken = nn.Linear(8, 1), []
    nn.init.constant_(halt.bias, bias)

    def transition(step: int, x: Tensor) -> Tensor:
        taken.append(step)
        return x

    ponder(torch.randn(3, 8), 4, same, transition, halt, threshold=0.99)
    assert taken == list(range(steps))


def test_a_position_that_has_halted_keeps_its_state() -> None:
    seen: list[Tensor] = []

    def halt(x: Tensor) -> Tensor:
        return torch.tensor([[20.0], [-20.0]])

    def transition(step: int, x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x + 1

    ponder(torch.zeros(2, 8), 3, same, transition, halt, threshold=0.99)
    assert [float(x[0, 0]) for x in seen] == [0, 1, 1]
    assert [float(x[1, 0]) for x in seen] == [0, 1, 2]


def test_pondering_costs_and_its_gradient_makes_it_shorter() -> None:
    net: Any = small_network("universal", ponder=0.5)
    cost = net(Source.of(SOURCES), Ragged.of(TARGETS)).aux["ponder"]
    count = sum(map(len, SOURCES)) + sum(map(len, TARGETS))
    assert 0.5 * count < float(cost.detach()) < 0.5 * 5 * count
    half = small_network("universal", ponder=0.25)(Source.of(SOURCES), Ragged.of(TARGETS)).aux["ponder"]
    torch.testing.assert_close(cost, 2 * half)
    cost.backward()
    assert all(float(stack.steps.halt.bias.grad) < 0 for stack in (net.encoder, net.decoder))


def test_the_cost_of_pondering_adds_up_over_sentences() -> None:
    net = small_network("universal")
    whole = net(Source.of(SOURCES), Ragged.of(TARGETS)).aux["ponder"]
    alone = [net(Source.of([s]), Ragged.of([t])).aux["ponder"] for s, t in zip(SOURCES, TARGETS, strict=True)]
    torch.testing.assert_close(whole, torch.stack(alone).sum())


def test_a_fixed_number_of_steps_has_no_halting_and_no_cost() -> None:
    net = small_network("universal", halting="fixed")
    assert not net(Source.of(SOURCES), Ragged.of(TARGETS)).aux
    assert not [name for name, _ in net.named_parameters() if "halt" in name]


def test_steps_share_their_weights() -> None:
    few, many = (small_network("universal", encoder_steps=n, decoder_steps=n) for n in (1, 6))
    assert sum(p.numel() for p in few.parameters()) == sum(p.numel() for p in many.parameters())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"d_model": 18, "heads": 4}, "heads = 4"),
        ({"encoder_steps": 0}, "encoder_steps"),
        ({"threshold": 1.0}, "threshold"),
        ({"target_vocabulary": 9}, 'tied = "all"'),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        UniversalConfig(**{"source_vocabulary": 8, "target_vocabulary": 8, **options})
