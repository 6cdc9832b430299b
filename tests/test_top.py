"""The two-stage search for the highest scores against torch.topk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trmt.decode.base import CHUNK, top

SIZES = [1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK - 1, 5 * CHUNK, 5 * CHUNK + 1, 40 * CHUNK + 17]


def random(rows: int, size: int) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(size))


FILLINGS = {
    "random": lambda x: x,
    "tied": lambda x: (x * 2).round(),
    "all equal": torch.zeros_like,
    "mostly impossible": lambda x: x.masked_fill(x < 2, -torch.inf),
    "all impossible": lambda x: torch.full_like(x, -torch.inf),
    "at the end": lambda x: torch.arange(x.shape[1]).expand_as(x).float(),
    "at the beginning": lambda x: -torch.arange(x.shape[1]).expand_as(x).float(),
}


@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 4, 12])
def test_it_equals_topk(filling: str, size: int, count: int) -> None:
    scores = FILLINGS[filling](random(7, size))
    values, ids = top(scores, count)
    expected = scores.topk(min(count, size), -1).values
    assert torch.equal(values, expected)
    assert torch.equal(scores.gather(1, ids), expected)
    assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    scores = FILLINGS["tied"](random(33, 20 * CHUNK + 3))
    values, ids = top(scores, 4)
    for row in range(33):
        alone = top(scores[row : row + 1], 4)
        assert torch.equal(alone[0][0], values[row]) and torch.equal(alone[1][0], ids[row])
