from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.fakes import small_network
from trmt.errors import ConfigError
from trmt.lab import distances
from trmt.lab.distances import Divergence, SquaredDistance, SquaredDistanceConfig, squared_distance
from trmt.nets.ragged import Ragged, Source
from trmt.objectives.base import Objective, Specials
from trmt.objectives.translation import TranslationBatch, TranslationConfig, TranslationObjective

SPECIALS = Specials(bos=2, eos=3)


def batch(*, padding: int = 0) -> TranslationBatch:
    source, before = Source.of([[5, 6, 3], [7, 3]]), Ragged.of([[2, 8, 9], [2, 10]])
    after = torch.tensor([8, 9, 3, 10, 3])
    after[len(after) - padding :] = -1
    return TranslationBatch(source, before, after, 5 - padding)


def smoothed(logits: torch.Tensor, target: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The distribution that is aimed at, row by row."""
    vocabulary = logits.shape[1]
    return F.one_hot(target, vocabulary) * (1 - smoothing) + smoothing / vocabulary


def of_both(kind: type[Objective], smoothing: float, architecture: str) -> tuple[nn.Module, torch.Tensor]:
    net = small_network(architecture)
    objective = kind(kind.config_class(label_smoothing=smoothing), SPECIALS)
    return net, objective.loss(net, batch()).total


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("architecture", ["transformer", "conv"])
def test_the_divergence_is_torchs(smoothing: float, architecture: str) -> None:
    net, total = of_both(Divergence, smoothing, architecture)
    logits = net.readout(net(batch().source, batch().before).hidden)
    wanted = smoothed(logits, batch().after_N, smoothing)
    expected = F.kl_div(logits.log_softmax(-1), wanted, reduction="sum")
    torch.testing.assert_close(total, expected)
    ours = torch.autograd.grad(total, list(net.parameters()))
    for one, other in zip(ours, torch.autograd.grad(expected, list(net.parameters())), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_the_divergence_is_the_smoothed_cross_entropy_but_for_a_constant(smoothing: float) -> None:
    _, divergence = of_both(Divergence, smoothing, "transformer")
    _, cross = of_both(TranslationObjective, smoothing, "transformer")
    row = smoothed(torch.zeros(1, 23), torch.tensor([4]), smoothing)[0]
    entropy = float(torch.distributions.Categorical(probs=row).entropy())
    torch.testing.assert_close(divergence, cross - 5 * entropy)


def test_the_divergence_from_what_is_aimed_at_is_nothing() -> None:
    wanted = smoothed(torch.zeros(2, 9), torch.tensor([3, 5]), 0.2)

    class Says(nn.Module):
        def readout_matrix(self) -> None:
            return None

        def readout(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.log()

    objective = Divergence(TranslationConfig(label_smoothing=0.2), SPECIALS)
    total, _ = objective.distance(Says(), wanted, torch.tensor([3, 5]))  # type: ignore[arg-type]
    assert float(total) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_squared_distance_is_that_of_the_distributions(
    smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distances, "CHUNK_BYTES", 0)  # the fewest tokens that can go at once
    net, total = of_both(SquaredDistance, smoothing, "transformer")
    logits = net.readout(net(batch().source, batch().before).hidden)
    expected = (logits.softmax(-1) - smoothed(logits, batch().after_N, smoothing)).square().sum()
    torch.testing.assert_close(total, expected)
    ours = torch.autograd.grad(total, list(net.parameters()))
    for one, other in zip(ours, torch.autograd.grad(expected, list(net.parameters())), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_squared_distance_has_bounds() -> None:
    sure = torch.full((2, 7), -1e4)
    sure[:, 3] = 1e4
    far, nll = squared_distance(sure[:1], torch.tensor([5]), 0.0)
    near, _ = squared_distance(sure[:1], torch.tensor([3]), 0.0)
    assert (float(far), float(near)) == (2.0, 0.0)
    assert math.isfinite(float(nll))


@pytest.mark.parametrize("kind", [Divergence, SquaredDistance])
def test_padding_counts_for_nothing(kind: type[Objective]) -> None:
    net = small_network("transformer")
    objective = kind(kind.config_class(), SPECIALS)
    whole, part = objective.loss(net, batch()), objective.loss(net, batch(padding=2))
    hidden = net(batch().source, batch().before).hidden
    expected = objective.distance(net, hidden[:3], batch().after_N[:3])  # type: ignore[attr-defined]
    torch.testing.assert_close((part.total, part.nll), (expected[0], expected[1].detach()))
    assert part.total < whole.total


def test_smoothing_is_off_for_the_squared_distance_and_within_range() -> None:
    assert SquaredDistanceConfig().label_smoothing == 0
    with pytest.raises(ConfigError, match=r"loss\.label_smoothing"):
        SquaredDistanceConfig(label_smoothing=1.0)
