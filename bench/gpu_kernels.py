"""The kernels for translating on a GPU beside the same in plain PyTorch, and the memory's share they reach.

    python bench/gpu_kernels.py [--device cuda] [--smoke]

Both ways are captured in CUDA graphs and replayed in turn, so launches cost nothing. The calls of a graph
have data of their own, more in all than a cache holds. What is read and written counts once, however often it
is needed; copying shows what the memory does at best. In plain PyTorch, attention has a mask that is made
once for all layers: its time is given apart. --smoke interprets kernels on the CPU: times say nothing.

Axes as in trmt/nets/kv_cache.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from budget import die_together
from provenance import RESULTS, record
from trmt.decoding.top import top
from trmt.devices.choice import choose_device
from trmt.nets.base import Decoding
from trmt.nets.kv_cache import SharedKVCache

HEADS, HEAD_DIM, HYPOTHESES, CANDIDATES = 8, 64, 4, 4
ROWS, COLUMNS, VOCABULARY = (128, 2048), (32, 64, 128), 32_000
COLD = 256 << 20  # bytes: more than caches hold
CALLS = 24  # of a graph, at most
ROUNDS, REPLAYS, WARM = 9, 5, 3
TOLERANCE = 2e-2  # of bf16

Way = Callable[[int], object]  # does the work on one of the copies of the data


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the kernels for translating on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, interpreted on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    die_together()
    if given.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    figures = measure(choose_device("cpu" if given.smoke else given.device), smoke=given.smoke)
    print(record("translate-kernels", figures, command="python bench/gpu_kernels.py", folder=given.out))


@torch.inference_mode()
def measure(device: torch.device, *, smoke: bool) -> dict[str, Any]:
    """Both kernels at every size."""
    torch.manual_seed(1)
    all_rows, all_columns = ((4,), (4,)) if smoke else (ROWS, COLUMNS)
    vocabulary, cold = (300, 1) if smoke else (VOCABULARY, COLD)
    rate = copied_per_second(device, 4 * cold)
    return {
        "device": device.type,
        "copy_gb_per_second": round(rate / 1e9, 1),
        "attention": [
            {"rows": rows, "columns": columns, **Attention(rows, columns, device, cold).figures(rate)}
            for rows in all_rows
            for columns in all_columns
        ],
        "top": [
            {"rows": rows, "vocabulary": vocabulary, **Top(rows, vocabulary, device, cold).figures(rate)}
            for rows in all_rows
        ],
    }


def copied_per_second(device: torch.device, size: int) -> float:
    """Bytes read and written in a second of copying."""
    here, there = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / seconds({"copy": lambda call: there.copy_(here)}, 1, device)["copy"]


class Attention:
    """Attention of one layer in the step that fills the last column."""

    def __init__(self, rows: int, columns: int, device: torch.device, cold: int) -> None:
        self.columns, self.device = columns, device
        sentences = rows // HYPOTHESES
        self.ancestors_SKC = ancestors(sentences, columns).to(device)
        self.position_S = torch.full((sentences,), columns - 1, device=device)
        shape = (2, sentences, HEADS, columns * HYPOTHESES, HEAD_DIM)
        self.cached = copies(cold, lambda: torch.randn(shape, device=device, dtype=torch.bfloat16))
        made = torch.randn(3, sentences, HYPOTHESES, HEADS, HEAD_DIM, device=device, dtype=torch.bfloat16)
        self.out_SKHP = torch.empty_like(made[0])
        self.query_SHKP, self.kv_2SHKP = made[0].transpose(1, 2), made[1:].transpose(2, 3)
        # In a cache that is not static, attention is plain PyTorch's.
        decoding = Decoding(HYPOTHESES, columns, static=True)
        self.cache = SharedKVCache.empty(made, sentences, decoding, (1, HEADS, HEAD_DIM))
        self.cache.ancestors_SKC = self.ancestors_SKC.clone()
        self.cache.advance(self.position_S, 1)
        self.cache.static = False

    def by_kernel(self, call: int) -> Tensor:
        from trmt.native.gpu import attention_kernel

        tensors = (self.out_SKHP, self.query_SHKP, self.kv_2SHKP, self.cached[call])
        table = {"ancestors_SKC": self.ancestors_SKC, "position_S": self.position_S}
        attention_kernel.launch(*tensors, **table, columns=self.columns)
        return self.out_SKHP.flatten(2)

    def in_pytorch(self, call: int) -> Tensor:
        self.cache.key_values = [self.cached[call]]
        return self.cache.attend(0, self.query_SHKP, self.kv_2SHKP)

    def mask(self, call: int = 0) -> Tensor:
        self.cache._mask = None
        return self.cache.mask()

    def figures(self, rate: float) -> dict[str, float]:
        torch.testing.assert_close(self.by_kernel(0), self.in_pytorch(0), atol=TOLERANCE, rtol=TOLERANCE)
        ways = {"kernel": self.by_kernel, "pytorch": self.in_pytorch, "mask": self.mask}
        return summary(seconds(ways, len(self.cached), self.device), self.moved(), rate)

    def moved(self) -> int:
        """The bytes that must be read and written."""
        slots = int(
            F.one_hot(self.ancestors_SKC[..., :-1], HYPOTHESES).any(1).sum()
        )  # that any hypothesis attends to
        # Keys and values there; queries, new keys and values, both read and written, the output; the table.
        numbers = 2 * slots * HEADS * HEAD_DIM + 6 * self.out_SKHP.numel()
        return 2 * numbers + 8 * self.ancestors_SKC.numel()


class Top:
    """The candidates of one step."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device, cold: int) -> None:
        self.device = device
        self.scores = copies(cold, lambda: torch.randn(rows, vocabulary, device=device).bfloat16())
        self.best_RC = torch.empty(rows, CANDIDATES, device=device)
        self.ids_RC = torch.empty(rows, CANDIDATES, device=device, dtype=torch.long)
        self.log_R1 = torch.empty(rows, 1, device=device)

    def by_kernel(self, call: int) -> tuple[Tensor, Tensor, Tensor]:
        from trmt.native.gpu import top_kernel

        top_kernel.launch(self.scores[call], self.best_RC, self.ids_RC, self.log_R1)
        return self.best_RC, self.ids_RC, self.log_R1

    def in_pytorch(self, call: int) -> tuple[Tensor, Tensor, Tensor]:
        with mock.patch("trmt.decoding.top.accelerated", return_value=None):
            return top(self.scores[call], CANDIDATES)

    def figures(self, rate: float) -> dict[str, float]:
        (best, _, log), (expected, _, expected_log) = self.by_kernel(0), self.in_pytorch(0)
        torch.testing.assert_close((best, log), (expected, expected_log))
        ways: dict[str, Way] = {"kernel": self.by_kernel, "pytorch": self.in_pytorch}
        return summary(seconds(ways, len(self.scores), self.device), self.scores[0].nbytes, rate)


def ancestors(sentences: int, columns: int) -> Tensor:
    """A table such as beam search leaves behind, where parents are drawn at random: [S, K, C]."""
    table_SKC = torch.zeros(sentences, HYPOTHESES, columns, dtype=torch.long)
    for column in range(columns):
        parents_SK = torch.randint(HYPOTHESES, (sentences, HYPOTHESES))
        past = table_SKC[:, :, :column]
        past.copy_(past.gather(1, parents_SK[:, :, None].expand_as(past)))
        table_SKC[:, :, column] = torch.arange(HYPOTHESES)
    return table_SKC


def copies(cold: int, make: Callable[[], Tensor]) -> list[Tensor]:
    """So many of them that none is in a cache when its turn comes again."""
    first = make()
    return [first, *(make() for _ in range(min(cold // first.nbytes, CALLS - 1)))]


def summary(taken: dict[str, float], moved: int, rate: float) -> dict[str, float]:
    return {
        **{f"{name}_microseconds": round(1e6 * each, 2) for name, each in taken.items()},
        "times_faster": round(taken["pytorch"] / taken["kernel"], 2),
        "megabytes": round(moved / 1e6, 2),
        "share_of_copying": round(moved / taken["kernel"] / rate, 3),
    }


def seconds(ways: dict[str, Way], calls: int, device: torch.device) -> dict[str, float]:
    """Of one call each way: the median over rounds in which the ways take turns."""
    works = {name: prepared(way, calls, device) for name, way in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    warm, rounds = (WARM, ROUNDS) if device.type == "cuda" else (0, 1)
    for _ in range(warm + rounds):
        for name, work in works.items():
            taken[name].append(clocked(work, device) / calls)
    return {name: statistics.median(each[warm:]) for name, each in taken.items()}


def prepared(way: Way, calls: int, device: torch.device) -> Callable[[], object]:
    """All calls one after the other: on a GPU as one graph."""

    def work() -> None:
        for call in range(calls):
            way(call)

    if device.type != "cuda":
        return work
    # What is compiled, chosen or allocated at the first time must be done before it is captured.
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        work()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def clocked(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that one run takes, by the GPU's clock where there is one."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(REPLAYS):
        work()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000 / REPLAYS


if __name__ == "__main__":
    main()
