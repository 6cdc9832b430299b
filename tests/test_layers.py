"""What the networks share, against formulas written out and against torch's own modules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trmt.config import to_tree
from trmt.errors import ConfigError
from trmt.nets import layers
from trmt.registry import ARCHITECTURES, installed, resolve


@pytest.mark.parametrize("columns", [2, 6, 64, 7])
def test_sinusoids_are_the_formula_of_the_paper(columns: int) -> None:
    table = layers.sinusoids(50, columns)
    assert table.shape == (50, columns)
    for position in range(50):
        for column in range(columns):
            angle = position / 10000 ** ((column - column % 2) / columns)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert float(table[position, column]) == pytest.approx(expected, abs=1e-5)


def test_rotary_scores_depend_on_the_distance_only() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=generator)
    table = layers.sinusoids(100, 16)

    def score(at: int, other: int) -> float:
        rotated = (layers.rotary(x, table[[p]]) for x, p in ((query, at), (key, other)))
        return float(torch.mul(*rotated).sum())

    for distance in (0, 1, 7, 30):
        for start in (1, 20, 60):
            assert score(start + distance, start) == pytest.approx(score(distance, 0), abs=1e-4)
    assert score(0, 0) == pytest.approx(float((query * key).sum()), abs=1e-5)
    assert abs(score(5, 0) - score(0, 5)) > 1e-3  # the direction counts


def test_rotary_positions_of_each_sentence() -> None:
    x, table = torch.randn(3, 2, 4, 8, generator=torch.Generator().manual_seed(2)), layers.sinusoids(30, 8)
    position_SQ = torch.tensor([[0, 1, 2, 3], [9, 10, 11, 12], [5, 5, 6, 7]])
    together = layers.rotary(x, table[position_SQ][:, None])
    for row, position_Q in enumerate(position_SQ):
        assert torch.equal(layers.rotary(x[row : row + 1], table[position_Q])[0], together[row])


def test_attention_and_its_weights_agree() -> None:
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(3))
    mask = layers.additive_mask(torch.tensor([[True] * 5, [True] * 2 + [False] * 3]))[:, None, None]
    weights = layers.attention_weights(query, key, mask)
    found = (weights @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layers.attend(query, key, value, mask), found, atol=1e-5, rtol=1e-5)
    assert (weights[1, ..., 2:] == 0).all()


def test_merged_products_begin_like_separate_ones() -> None:
    torch.manual_seed(4)
    merged = layers.xavier(nn.Linear(64, 3 * 64), 3)
    bound = math.sqrt(6 / (64 + 64))  # Glorot's, of one product alone
    for part in merged.weight.detach().chunk(3):
        assert 0.95 * bound < part.abs().max().item() <= bound
    assert not merged.bias.any()


@pytest.mark.parametrize("architecture", installed(ARCHITECTURES))
def test_sizes_and_fractions_out_of_range_are_refused(architecture: str) -> None:
    kind = resolve(ARCHITECTURES, architecture).config_class
    good = {"source_vocabulary": 9, "target_vocabulary": 9}
    rates = {name for name, value in to_tree(kind(**good)).items() if type(value) is float}
    rates -= set(getattr(kind, "not_rates", ()))
    for name, value in to_tree(kind(**good)).items():
        wrong: dict[type, tuple[float, ...]] = {
            int: (0, -2) if name != "position_offset" else (-2,),
            float: (-0.1, 1.0 if name in rates else math.inf, math.nan),
        }
        for each in wrong.get(type(value), ()):
            with pytest.raises(ConfigError, match=rf"network\.{name} = "):
                kind(**{**good, name: each})
