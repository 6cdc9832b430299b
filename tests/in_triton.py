"""The kernels for GPUs against fp64: run by test_gpu_kernels.py, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from trmt.decoding.choosing import highest
from trmt.nets.looking_back import look_back

from tests.test_top import FILLINGS
from trmt.decoding import choosing
from trmt.decoding.base import CHUNK
from trmt.native import gpu
from trmt.nets import looking_back

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
    monkeypatch.setattr(choosing, "_library", lambda: None)
    if DEVICE.type == "cpu":
        assert os.environ.get("TRITON_INTERPRET") == "1"
        monkeypatch.setattr(gpu, "at_hand", lambda like: True)


class Step:
    """A step of decoding with everything at random."""

    def __init__(
        self,
        sizes: tuple[int, int, int, int, int],
        *,
        kind: torch.dtype = torch.float32,
        table: bool = True,
        positions: tuple[int, ...] = (),
    ) -> None:
        sentences, heads, hypotheses, columns, part = sizes
        draw = torch.Generator().manual_seed(sum(sizes))
        merged_3SKHP = torch.randn(3, sentences, hypotheses, heads, part, generator=draw)
        merged_3SHKP = merged_3SKHP.to(DEVICE, kind).transpose(2, 3)  # as a product leaves them
        self.query, self.fresh = merged_3SHKP[0], merged_3SHKP[1:]
        # Room for more sentences, columns and slots than there are.
        room = torch.randn(2, sentences + 1, heads, (columns + 3) * hypotheses, part, generator=draw)
        self.store = room.to(DEVICE, kind)[:, 1:]
        drawn = torch.randint(hypotheses, (sentences, hypotheses, columns + 3), generator=draw)
        self.table = drawn.to(DEVICE) if table else None
        chosen = torch.randint(columns, (sentences,), generator=draw)
        chosen[: len(positions)] = torch.tensor(positions, dtype=torch.long)
        self.position, self.columns = chosen.to(DEVICE), columns

    def taken(self) -> Tensor:
        told = {"table_SKC": self.table, "position_S": self.position, "columns": self.columns}
        return look_back(self.query, self.fresh, self.store, **told)

    def slots(self, sentence: int, hypothesis: int) -> list[int]:
        """Which slots a hypothesis sees, its own newest one last."""
        hypotheses = self.query.shape[2]
        newest = min(int(self.position[sentence]), self.columns - 1)
        rows = [hypothesis] * newest
        if self.table is not None:
            rows = self.table[sentence, hypothesis, :newest].tolist()
        return [column * hypotheses + row for column, row in enumerate([*rows, hypothesis])]

    def expected(self) -> Tensor:
        """The same of what the store holds now, one hypothesis after the other, in fp64: [S, K, D]."""
        sentences, heads, hypotheses, part = self.query.shape
        found = torch.empty(sentences, hypotheses, heads, part, dtype=torch.double)
        for sentence in range(sentences):
            for hypothesis in range(hypotheses):
                slots = self.slots(sentence, hypothesis)
                key_HCP, value_HCP = self.store[:, sentence, :, slots].double().cpu()
                query_HP = self.query[sentence, :, hypothesis].double().cpu()
                score_HC = (key_HCP @ query_HP[:, :, None])[..., 0] / math.sqrt(part)
                found[sentence, hypothesis] = (score_HC.softmax(-1)[:, None] @ value_HCP)[:, 0]
        return found.flatten(2)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ((3, 1, 4, 40, 64), torch.bfloat16),
        ((2, 2, 3, 70, 32), torch.float32),
        ((2, 2, 1, 300, 16), torch.float16),
        ((2, 1, 9, 9, 128), torch.bfloat16),
    ],
)
def test_each_hypothesis_sees_its_ancestors(
    sizes: tuple[int, int, int, int, int], kind: torch.dtype, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trmt.native.gpu import looking_back as kernel

    monkeypatch.setattr(kernel, "ENOUGH", 1 if together else 10**9)
    last = sizes[3] - 1
    for step in (
        Step(sizes, kind=kind, positions=(0, last)),
        Step(sizes, kind=kind, positions=(last + 5,), table=False),
    ):
        before = step.store.clone()
        found = step.taken().cpu()
        assert found.dtype == kind
        torch.testing.assert_close(
            found.double(), step.expected(), atol=TOLERANCE[kind], rtol=TOLERANCE[kind]
        )
        looking_back.put(step.fresh, before, step.position, step.columns)
        assert torch.equal(step.store, before)


def test_what_nobody_descends_from_is_not_looked_at() -> None:
    step = Step((2, 2, 3, 20, 16), positions=(0, 13))
    whole = step.taken()
    for sentence in range(2):
        seen = {slot for hypothesis in range(3) for slot in step.slots(sentence, hypothesis)}
        unseen = [slot for slot in range(step.store.shape[3]) if slot not in seen]
        step.store[:, sentence, :, unseen] = torch.nan
    assert torch.equal(step.taken(), whole)


def test_broken_keys_are_not_hidden() -> None:
    step = Step((2, 1, 2, 20, 16), positions=(19, 19))
    step.store[0, 1, 0, step.slots(1, 0)[7], 3] = torch.nan
    found = step.taken().isfinite().all(-1)
    assert found[0].all() and not found[1, 0]


@pytest.mark.parametrize(
    ("size", "count", "kind"),
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
def test_the_highest_in_order_and_the_sum(size: int, count: int, kind: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(size)
    rows = [filling(torch.randn(1, size + 3, generator=draw)) for filling in FILLINGS.values()]
    scores = torch.cat(rows)[:, :size].to(kind)
    best, ids, sums = (each.cpu() for each in highest(scores.to(DEVICE), count))
    assert best.dtype == sums.dtype == torch.float32
    expected = scores.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(best, expected.values[:, :count])
    assert torch.equal(ids, expected.indices[:, :count])
    whole = scores.double().logsumexp(-1, keepdim=True).float()
    torch.testing.assert_close(sums, whole, atol=2e-6, rtol=1e-6)


def test_zeros_of_either_sign_are_equal() -> None:
    scores = torch.full((1, 300), -1.0, device=DEVICE)
    scores[0, [7, 200]], scores[0, [5, 250]] = 0.0, -0.0
    assert highest(scores, 4)[1].tolist() == [[5, 7, 200, 250]]


def test_what_is_no_number_is_not_hidden() -> None:
    poisons = [
        (value, places)
        for value in (math.nan, -math.nan, math.inf)
        for places in ([0], [299], [*range(128, 256)], [*range(300)])
    ]
    scores = torch.randn(len(poisons) + 2, 300, device=DEVICE)
    for row, (value, places) in enumerate(poisons, start=1):  # between two sound ones
        scores[row, places] = value
    best, ids, sums = highest(scores, 4)
    sound = [True, *[False] * len(poisons), True]
    assert (best - sums).isfinite().all(1).tolist() == sound
    assert ((ids >= 0) & (ids < 300)).all()
    assert all(len(set(row)) == 4 for row in ids.tolist())


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only a GPU has graphs")
def test_a_graph_holds_them() -> None:
    step = Step((4, 2, 4, 32, 64), kind=torch.bfloat16, positions=(0, 1, 2, 3))
    scores = torch.randn(16, 5000, device=DEVICE)
    step.taken(), highest(scores, 4)  # what is compiled now need not be while capturing
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, (best, ids, _) = step.taken(), highest(scores, 4)
    for _ in range(3):
        step.position += 7
        scores.normal_()
        graph.replay()
        tolerance = TOLERANCE[torch.bfloat16]
        torch.testing.assert_close(found.double().cpu(), step.expected(), atol=tolerance, rtol=tolerance)
        assert torch.equal(best, scores.topk(4).values) and torch.equal(scores.gather(1, ids), best)
