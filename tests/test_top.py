"""The highest scores, in two stages and by the kernel, against torch.topk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trmt.decoding.top import CHUNK, top, top_k
from trmt.registry import optional

search = optional("trmt.native.search")
HAS_KERNELS = bool(search and search.library())
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
    values, ids = top_k(scores, count)
    expected = scores.topk(min(count, size), -1).values
    assert torch.equal(values, expected)
    assert torch.equal(scores.gather(1, ids), expected)
    assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    scores = FILLINGS["tied"](random(33, 20 * CHUNK + 3))
    values, ids = top_k(scores, 4)
    for row in range(33):
        alone = top_k(scores[row : row + 1], 4)
        assert torch.equal(alone[0][0], values[row]) and torch.equal(alone[1][0], ids[row])


@pytest.fixture(params=["kernel", "pytorch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pytorch":
        monkeypatch.setenv("TRMT_KERNELS", "0")
    elif not HAS_KERNELS:
        pytest.skip("no kernels here")
    return request.param


def test_the_kernel_serves_where_its_heap_is_large_enough() -> None:
    if not HAS_KERNELS:
        pytest.skip("no kernels here")
    assert search.top(random(2, 4 * CHUNK), 4) is not None
    assert search.top(random(2, 4 * CHUNK - 1), 4) is None
    assert search.top(random(2, 100 * CHUNK), search.MAX_CANDIDATES + 1) is None


@pytest.mark.parametrize("filling", FILLINGS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 4, 5])
def test_the_highest_and_the_sum_of_all(way: str, filling: str, size: int, count: int) -> None:
    scores = FILLINGS[filling](random(7, size)).contiguous()
    best, ids, sums = top(scores.clone(), count)
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
def test_scores_that_are_not_numbers_are_not_hidden(way: str, poison: float, size: int) -> None:
    for column in (0, 5, 300, size - 1):
        scores = random(3, size)
        scores[1, column] = poison
        best, _, sums = top(scores, 2)
        assert (best - sums).isfinite().all(1).tolist() == [True, False, True]


def test_rows_do_not_depend_on_their_neighbours(way: str) -> None:
    scores = random(33, 20 * CHUNK + 3)
    together = top(scores.clone(), 4)
    for row in range(33):
        alone = top(scores[row : row + 1].clone(), 4)
        assert all(torch.equal(one[0], other[row]) for one, other in zip(alone, together, strict=True))
