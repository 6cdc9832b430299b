"""Numbers on their way between the host and a device, for which nobody waits who need not.

Copies to and from a GPU wait for all that it was told before, unless the host's memory is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sent(values: Sequence[Any], device: torch.device | str, kind: torch.dtype = torch.long) -> Tensor:
    """The numbers as a tensor on the device."""
    if torch.device(device).type != "cuda":
        return torch.tensor(values, dtype=kind, device=device)
    return torch.tensor(values, dtype=kind, pin_memory=True).to(device, non_blocking=True)


def carried(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Fetched:
    """Tensors on their way to the host."""

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

    def there(self) -> list[Tensor]:
        """The tensors, once they are on the host."""
        if self._event:
            self._event.synchronize()
        return self._tensors
