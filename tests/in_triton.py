"""The kernels for GPUs against fp64: run by test_gpu_kernels.py, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import cached_attention as reference
from tests.test_top import FILLINGS
from trmt.decoding.top import CHUNK
from trmt.native import gpu

# Infinity less infinity is meant, and the interpreter is NumPy.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device(os.environ.get("TRMT_TEST_DEVICE", "cpu"))
# Of what is rounded to this type at the end.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _by_kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that fails is an error here, and on a CPU it is interpreted."""

    def launched(launch: Callable[[], None], like: Tensor) -> bool:
        launch()
        return True

    monkeypatch.setattr(gpu, "launched", launched)
    if DEVICE.type == "cpu":
        assert os.environ.get("TRITON_INTERPRET") == "1"
        monkeypatch.setattr(gpu, "available", lambda like: True)


def top(scores_RV: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel finds."""
    found = gpu.top(scores_RV, count)
    assert found is not None
    return found


class Step:
    """A decoding step in which everything is random."""

    def __init__(
        self,
        sizes: tuple[int, int, int, int, int],
        *,
        dtype: torch.dtype = torch.float32,
        ancestors: bool = True,
        positions: tuple[int, ...] = (),
    ) -> None:
        sentences, heads, hypotheses, columns, head_dim = sizes
        draw = torch.Generator().manual_seed(sum(sizes))
        qkv_3SKHP = torch.randn(3, sentences, hypotheses, heads, head_dim, generator=draw)
        qkv_3SHKP = qkv_3SKHP.to(DEVICE, dtype).transpose(2, 3)  # as a product leaves them
        self.query, self.kv = qkv_3SHKP[0], qkv_3SHKP[1:]
        # A view of a cache that has more sentences, columns and slots.
        cached = torch.randn(2, sentences + 1, heads, (columns + 3) * hypotheses, head_dim, generator=draw)
        self.cached = cached.to(DEVICE, dtype)[:, 1:]
        drawn = torch.randint(hypotheses, (sentences, hypotheses, columns + 3), generator=draw)
        self.ancestors = drawn.to(DEVICE) if ancestors else None
        position_S = torch.randint(columns, (sentences,), generator=draw)
        position_S[: len(positions)] = torch.tensor(positions, dtype=torch.long)
        self.position_ST, self.columns = position_S[:, None].to(DEVICE), columns

    @property
    def hypotheses(self) -> int:
        return self.query.shape[2]

    def attend(self) -> Tensor:
        """By the kernel."""
        found = gpu.cached_attention(
            self.query, self.kv, self.cached, self.ancestors, self.position_ST, self.columns
        )
        assert found is not None
        return found

    def expected(self, cached: Tensor) -> Tensor:
        """The same in fp64; it writes to this cache."""
        return reference.cached_attention(
            self.query, self.kv, cached, self.ancestors, self.position_ST, self.columns
        )

    def slots(self, sentence: int, hypothesis: int) -> list[int]:
        """The slots that a hypothesis attends to."""
        return reference.slots(
            self.ancestors, self.position_ST, self.columns, (sentence, hypothesis), self.hypotheses
        )


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((3, 1, 4, 40, 64), torch.bfloat16),
        ((2, 2, 3, 70, 32), torch.float32),
        ((2, 2, 1, 300, 16), torch.float16),
        ((2, 1, 9, 9, 128), torch.bfloat16),
    ],
)
def test_each_hypothesis_attends_to_its_ancestors(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trmt.native.gpu import attention_kernel

    monkeypatch.setattr(attention_kernel, "ENOUGH", 1 if together else 10**9)
    last = sizes[3] - 1
    for step in (
        Step(sizes, dtype=dtype, positions=(0, last)),
        Step(sizes, dtype=dtype, positions=(last + 5,), ancestors=False),
    ):
        cached = step.cached.clone()
        found = step.attend().cpu()
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), step.expected(cached), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )
        assert torch.equal(step.cached, cached)


def test_slots_without_descendants_are_not_read() -> None:
    step = Step((2, 2, 3, 20, 16), positions=(0, 13))
    whole = step.attend()
    for sentence in range(2):
        seen = {slot for hypothesis in range(3) for slot in step.slots(sentence, hypothesis)}
        unseen = [slot for slot in range(step.cached.shape[3]) if slot not in seen]
        step.cached[:, sentence, :, unseen] = torch.nan
    assert torch.equal(step.attend(), whole)


def test_broken_keys_are_not_hidden() -> None:
    step = Step((2, 1, 2, 20, 16), positions=(19, 19))
    step.cached[0, 1, 0, step.slots(1, 0)[7], 3] = torch.nan
    found = step.attend().isfinite().all(-1)
    assert found[0].all() and not found[1, 0]


@pytest.mark.parametrize(
    ("size", "count", "dtype"),
    [
        (1, 1, torch.float32),
        (5, 4, torch.float32),
        (CHUNK - 1, 4, torch.bfloat16),
        (CHUNK, 4, torch.float16),
        (CHUNK + 1, 1, torch.bfloat16),
        (5 * CHUNK + 1, 4, torch.float32),
        (40 * CHUNK + 17, 1, torch.float32),
        (40 * CHUNK + 17, 16, torch.bfloat16),
    ],
)
def test_the_highest_in_order_and_the_sum(size: int, count: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(size)
    rows = [filling(torch.randn(1, size + 3, generator=draw)) for filling in FILLINGS.values()]
    scores = torch.cat(rows)[:, :size].to(dtype)
    best, ids, sums = (each.cpu() for each in top(scores.to(DEVICE), count))
    assert best.dtype == sums.dtype == torch.float32
    expected = scores.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(best, expected.values[:, :count])
    assert torch.equal(ids, expected.indices[:, :count])
    whole = scores.double().logsumexp(-1, keepdim=True).float()
    torch.testing.assert_close(sums, whole, atol=2e-6, rtol=1e-6)


def test_zeros_of_either_sign_are_equal() -> None:
    scores = torch.full((1, 300), -1.0, device=DEVICE)
    scores[0, [7, 200]], scores[0, [5, 250]] = 0.0, -0.0
    assert top(scores, 4)[1].tolist() == [[5, 7, 200, 250]]


def test_scores_that_are_not_numbers_are_not_hidden() -> None:
    poisons = [
        (value, columns)
        for value in (math.nan, -math.nan, math.inf)
        for columns in ([0], [299], [*range(128, 256)], [*range(300)])
    ]
    scores = torch.randn(len(poisons) + 2, 300, device=DEVICE)
    for row, (value, columns) in enumerate(poisons, start=1):  # between two sound ones
        scores[row, columns] = value
    best, ids, sums = top(scores, 4)
    sound = [True, *[False] * len(poisons), True]
    assert (best - sums).isfinite().all(1).tolist() == sound
    assert ((ids >= 0) & (ids < 300)).all()
    assert all(len(set(row)) == 4 for row in ids.tolist())


def test_the_probe_of_the_kernels_passes() -> None:
    for dtype in gpu.DTYPES:
        assert gpu.probe(DEVICE, dtype) == ""


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only a GPU has graphs")
def test_graphs_replay_them() -> None:
    step = Step((4, 2, 4, 32, 64), dtype=torch.bfloat16, positions=(0, 1, 2, 3))
    scores = torch.randn(16, 5000, device=DEVICE)
    step.attend(), top(scores, 4)  # so that nothing has to be compiled while recording
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, (best, ids, _) = step.attend(), top(scores, 4)
    for _ in range(3):
        step.position_ST += 7
        scores.normal_()
        graph.replay()
        tolerance = TOLERANCE[torch.bfloat16]
        expected = step.expected(step.cached.clone())
        torch.testing.assert_close(found.double().cpu(), expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(best, scores.topk(4).values) and torch.equal(scores.gather(1, ids), best)
