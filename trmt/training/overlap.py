"""Sums gradients over all ranks while the backward pass still runs.

The gradients are divided into buckets, in the order in which a backward pass is likely to finish them; those
of a bucket are views of one tensor, which is summed in its place. A bucket is sent as soon as all of its
gradients are there and all buckets before it have been sent: so all ranks send the same buckets in the same
order. A rank whose backward pass fails sends the rest as it is, since others wait for it; then all discard
the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from trmt.training.distributed import Distributed

BUCKET_BYTES = 25 * 2**20  # small enough that the first are ready early


class OverlappedSums:
    """The gradients of a network, and their sums that are under way."""

    def __init__(self, net: nn.Module, distributed: Distributed, *, bucket_bytes: int) -> None:
        self.distributed = distributed
        trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self.buckets = list(buckets(trainable[::-1], bucket_bytes))
        self.sums = [bucket[0].new_zeros(sum(p.numel() for p in bucket)) for bucket in self.buckets]
        self._bucket_of: dict[Tensor, int] = {}
        for number, bucket in enumerate(self.buckets):
            for parameter in bucket:
                self._bucket_of[parameter] = number
                parameter.register_post_accumulate_grad_hook(self._ready)
        self._armed = False
        self._missing: list[set[Tensor]] = []  # the parameters of each bucket whose gradients are not there
        self._pending: list[Callable[[], None]] = []  # of the buckets that have been sent
        self.zero_grad()

    def zero_grad(self) -> None:
        """Set all gradients to zero; none may be None, since it would leave its bucket."""
        for bucket, flat in zip(self.buckets, self.sums, strict=True):
            flat.zero_()
            pieces = flat.split([parameter.numel() for parameter in bucket])
            for parameter, piece in zip(bucket, pieces, strict=True):
                parameter.grad = piece.view_as(parameter)

    def start(self) -> None:
        """From now on gradients are final: the backward pass of the last micro-batch begins."""
        self._armed, self._pending = True, []
        self._missing = [set(bucket) for bucket in self.buckets]

    def _ready(self, parameter: Tensor) -> None:
        if not self._armed:
            return
        self._missing[self._bucket_of[parameter]].discard(parameter)
        while len(self._pending) < len(self.sums) and not self._missing[len(self._pending)]:
            self._send()

    def _send(self) -> None:
        self._pending.append(self.distributed.start_all_reduce(self.sums[len(self._pending)]))

    def finish(self) -> None:
        """Send what has not been sent yet, and wait for all sums."""
        if not self._armed:  # a rank without a micro-batch, or one that failed before the last
            self.start()
        self._armed = False
        while len(self._pending) < len(self.sums):
            self._send()
        for wait in self._pending:
            wait()


def buckets(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """The tensors in groups of one dtype and at most `size` bytes; a larger tensor is a group of its own."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        bucket: list[Tensor] = []
        bucket_bytes = 0
        for tensor in (tensor for tensor in tensors if tensor.dtype == dtype):
            if bucket and bucket_bytes + tensor.nbytes > size:
                yield bucket
                bucket, bucket_bytes = [], 0
            bucket.append(tensor)
            bucket_bytes += tensor.nbytes
        if bucket:
            yield bucket
