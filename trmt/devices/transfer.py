"""Transfers between the host and a device that do not wait for the work queued on the device.

A copy to or from a GPU is asynchronous only where the memory of the host is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(
    values: Sequence[Any] | Tensor, device: torch.device | str, dtype: torch.dtype = torch.long
) -> Tensor:
    """Numbers, as a tensor of `dtype`, or a tensor in host memory, on the device."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """Tensors that are being copied to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._event = list(tensors), None
        self._device = tensors[0].device
        if self._device.type == "cuda":
            self._tensors = [
                torch.empty(each.shape, dtype=each.dtype, pin_memory=True).copy_(each, non_blocking=True)
                for each in tensors
            ]
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> list[Tensor]:
        """The tensors in host memory, once the copy is complete."""
        if self._event:
            self._event.synchronize()
        return self._tensors
