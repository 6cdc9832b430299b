"""Recording what a GPU is told, to tell it again at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import torch


class Repeated:
    """Stands for a graph on devices that have none."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run


class Graphs:
    """Makes CUDA graphs, which share their memory, since they run one at a time and leave nothing there.

    `torch.cuda.graph` would empty the caches each time, and after a failure leave its stream the current one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.living: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self.pool: Any = None

    def __call__(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        if not self.living:  # memory that all graphs have left must not be joined again
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                run()
            except BaseException:
                with suppress(RuntimeError):  # which says again that it failed
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.living.add(graph)
        return graph
