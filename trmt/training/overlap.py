"""Sums gradients over all ranks while the backward pass still runs.

The gradients are divided into buckets, in the order in which a backward pass is likely to finish them. A
bucket is sent as soon as all of its gradients are there and all buckets before it have been sent: so all
ranks send the same buckets in the same order. A rank whose backward pass fails sends the rest as it is, and
zeros where there is nothing, since others wait for it; then all discard the sums.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trmt.training.distributed import Distributed, buckets, copy_result

OVERLAP_BYTES = 25 * 2**20  # of a bucket: small enough that the first are ready early


class OverlappedSums:
    """The sums of the gradients of a network that are under way."""

    def __init__(
        self, net: nn.Module, distributed: Distributed, *, bucket_bytes: int = OVERLAP_BYTES
    ) -> None:
        self.distributed = distributed
        trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self.buckets = list(buckets(trainable[::-1], bucket_bytes))
        self._bucket_of: dict[Tensor, int] = {}
        for number, bucket in enumerate(self.buckets):
            for parameter in bucket:
                self._bucket_of[parameter] = number
                parameter.register_post_accumulate_grad_hook(self._ready)
        self._armed = False
        self._missing: list[set[Tensor]] = []  # the parameters of each bucket whose gradients are not there
        self._sent = 0  # buckets
        self._pending: deque[tuple[list[Tensor], Tensor, Any]] = deque()

    def start(self) -> None:
        """From now on gradients are final: the backward pass of the last micro-batch begins."""
        self._armed, self._sent = True, 0
        self._missing = [set(bucket) for bucket in self.buckets]
        self._pending.clear()

    def _ready(self, parameter: Tensor) -> None:
        if not self._armed:
            return
        self._missing[self._bucket_of[parameter]].discard(parameter)
        while self._sent < len(self.buckets) and not self._missing[self._sent]:
            self._send(self.buckets[self._sent])

    def _send(self, bucket: Sequence[Tensor]) -> None:
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in bucket if parameter.grad is not None]
        flat = self.distributed.flat(grads)
        self._pending.append((grads, flat, self.distributed.start_all_reduce(flat)))
        self._sent += 1

    @torch.no_grad()
    def finish(self) -> None:
        """Send what has not been sent yet, and wait for all sums, which replace the gradients."""
        if not self._armed:  # a rank without a micro-batch, or one that failed before the last
            self.start()
        self._armed = False
        while self._sent < len(self.buckets):
            self._send(self.buckets[self._sent])
        while self._pending:
            copy_result(*self._pending.popleft())
