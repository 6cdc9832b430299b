"""The searches for the highest scores, in two stages and by the kernel, against torch.topk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from trmt.decoding.choosing import highest

from trmt.decoding import choosing
from trmt.decoding.base import CHUNK, top

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


@pytest.fixture(params=["kernel", "pure"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "pure":
        monkeypatch.setattr(choosing, "_library", lambda: None)
    elif not choosing._library():
        pytest.skip("no kernels here")


@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 4, 5])
def test_the_highest_and_the_sum_of_all(way: None, filling: str, size: int, count: int) -> None:
    scores = FILLINGS[filling](random(7, size)).contiguous()
    best, ids, sums = highest(scores.clone(), count)
    expected = scores.topk(min(count, size), -1).values
    assert torch.equal(best, expected)
    real = expected.isfinite()
    assert torch.equal(scores.gather(1, ids)[real], expected[real])
    if real.all():
        assert all(len(set(row)) == len(row) for row in ids.tolist())
    if real.any(1).all():
        torch.testing.assert_close(
            sums, scores.double().logsumexp(-1, keepdim=True).float(), atol=2e-6, rtol=1e-6
        )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [700, 1000])
def test_what_is_no_number_is_not_hidden(way: None, poison: float, size: int) -> None:
    for place in (0, 5, 300, size - 1):
        scores = random(3, size)
        scores[1, place] = poison
        best, _, sums = highest(scores, 2)
        assert (best - sums).isfinite().all(1).tolist() == [True, False, True]


def test_rows_of_the_kernel_do_not_depend_on_their_neighbours(way: None) -> None:
    scores = random(33, 20 * CHUNK + 3)
    together = highest(scores.clone(), 4)
    for row in range(33):
        alone = highest(scores[row : row + 1].clone(), 4)
        assert all(torch.equal(one[0], other[row]) for one, other in zip(alone, together, strict=True))
