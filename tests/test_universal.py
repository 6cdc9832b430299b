from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.fakes import random_sentences, small_network
from trmt.errors import ConfigError
from trmt.lab.universal import Course, UniversalConfig, pondered
from trmt.nets.base import Ragged, Source

SOURCES = random_sentences(4, seed=1)
TARGETS = [[1, *sentence] for sentence in random_sentences(4, seed=2)]


def graves(
    told: Any, halt: nn.Module, threshold: float, steps: int, x_D: Tensor, transition: Any
) -> tuple[Tensor, Tensor]:
    """One position by the letter of arXiv 1603.08983, equations 6 to 14."""
    states: list[Tensor] = []
    chances: list[Tensor] = []
    while True:
        step = len(states)
        seen = told(step, x_D)
        chances.append(halt(seen).sigmoid()[0])
        x_D = transition(step, seen)
        states.append(x_D)
        if sum(chances) > threshold or len(states) == steps:
            break
    remainder = 1 - sum(chances[:-1])
    weights = [*chances[:-1], remainder]
    mean = torch.stack([weight * state for weight, state in zip(weights, states, strict=True)]).sum(0)
    return mean, len(states) + remainder


@pytest.mark.parametrize("bias", [-5.0, -1.0, 0.0, 1.0, 6.0])
def test_pondering_is_graves(bias: float) -> None:
    torch.manual_seed(0)
    halt, layer = nn.Linear(8, 1), nn.Linear(8, 8)
    nn.init.constant_(halt.bias, bias)
    x_ND, table = torch.randn(11, 8), torch.randn(20, 8)
    course = Course(table, torch.arange(11), 5, halt)
    out_ND, spent = pondered(course, 0.99, x_ND, lambda _, x: layer(x).tanh())
    total = torch.zeros(())
    for place in range(11):

        def told(step: int, x_D: Tensor, place: int = place) -> Tensor:
            return x_D + table[place] + table[step]

        mean, cost = graves(told, halt, 0.99, 5, x_ND[place], lambda _, x: layer(x).tanh())
        torch.testing.assert_close(out_ND[place], mean)
        total = total + cost
    torch.testing.assert_close(spent, total)


@pytest.mark.parametrize(("bias", "steps"), [(20.0, 1), (-20.0, 4)])
def test_who_has_seen_enough_halts(bias: float, steps: int) -> None:
    halt, taken = nn.Linear(8, 1), []
    nn.init.constant_(halt.bias, bias)

    def transition(step: int, x: Tensor) -> Tensor:
        taken.append(step)
        return x

    pondered(Course(torch.zeros(9, 8), torch.arange(3), 4, halt), 0.99, torch.randn(3, 8), transition)
    assert taken == list(range(steps))


def test_one_that_has_halted_is_seen_as_it_was() -> None:
    seen: list[Tensor] = []

    def halt(x: Tensor) -> Tensor:
        return torch.tensor([[20.0], [-20.0]])

    def transition(step: int, x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x + 1

    course = Course(torch.zeros(9, 8), torch.arange(2), 3, halt)
    pondered(course, 0.99, torch.zeros(2, 8), transition)
    assert [float(x[0, 0]) for x in seen] == [0, 1, 1]
    assert [float(x[1, 0]) for x in seen] == [0, 1, 2]


def test_pondering_costs_and_its_gradient_makes_it_shorter() -> None:
    net = small_network("universal", ponder=0.5)
    output = net(Source.of(SOURCES), Ragged.of(TARGETS))
    cost, count = output.aux["ponder"]
    assert int(count) == sum(map(len, SOURCES)) + sum(map(len, TARGETS))
    assert 0.5 * float(count) < float(cost.detach()) < 0.5 * 5 * float(count)
    twice = small_network("universal", ponder=0.25)(Source.of(SOURCES), Ragged.of(TARGETS)).aux["ponder"][0]
    torch.testing.assert_close(cost, 2 * twice)
    cost.backward()
    assert all(float(halt.bias.grad) < 0 for halt in (net.encoder_halt, net.decoder_halt))


def test_the_cost_of_pondering_adds_up_over_sentences() -> None:
    net = small_network("universal")
    whole = net(Source.of(SOURCES), Ragged.of(TARGETS)).aux["ponder"]
    alone = [net(Source.of([s]), Ragged.of([t])).aux["ponder"] for s, t in zip(SOURCES, TARGETS, strict=True)]
    torch.testing.assert_close(whole[0], torch.stack([cost for cost, _ in alone]).sum())
    assert int(whole[1]) == sum(int(count) for _, count in alone)


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
        ({"width": 18, "heads": 4}, "heads = 4"),
        ({"encoder_steps": 0}, "encoder_steps"),
        ({"threshold": 1.0}, "threshold"),
        ({"target_vocabulary": 9}, 'tied = "all"'),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        UniversalConfig(**{"source_vocabulary": 8, "target_vocabulary": 8, **options})
