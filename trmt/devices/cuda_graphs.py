"""Recording CUDA graphs, so that a failure leaves the device as it was.

`torch.cuda.graph` would empty the caches each time, and after a failure leave its stream the current one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import torch

from trmt.devices import hardware


class GraphRecorder:
    """Records CUDA graphs, which share their memory, since they run one at a time and leave nothing there."""

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
            try:
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    run()
                except BaseException:
                    with suppress(RuntimeError):  # which says again that it failed
                        graph.capture_end()
                    raise
                graph.capture_end()
            except BaseException:
                release_failed_capture(self.device, self.pool)
                raise
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.living.add(graph)
        return graph


def release_failed_capture(device: torch.device, pool: Any) -> None:
    """Undo what a failed capture leaves behind before PyTorch 2.12, where `capture_end` raises too early.

    Memory would be allocated in the graph's pool for ever, and random numbers could no longer be drawn. Where
    the pool has been closed already, closing it raises, and nothing is left to be undone.
    """
    index = hardware.numbered(device).index
    with suppress(RuntimeError, AttributeError, IndexError):
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())  # a copy is not marked as being captured
