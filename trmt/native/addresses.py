"""What kernels get to know of tensors: addresses, once they are what the kernel takes, and what it returns.

Before an address is taken, device, dtype, layout and shape are checked here. Ids and positions, which change
with every call, are checked in the kernels, which return what is wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trmt.errors import BundleError

OUT_OF_RANGE, OUT_OF_MEMORY = 1, 2  # what kernels return, both of them or 0; as in products.h


def address(tensor: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> int:
    """The address of the values of a tensor on the CPU that has this dtype and shape and no gaps."""
    if tensor.shape != shape or tensor.dtype != dtype or not is_plain(tensor):
        raise BundleError(
            f"a kernel takes {_name(dtype)} in the shape {list(shape)}, not {_name(tensor.dtype)} in the "
            f"shape {list(tensor.shape)}; the weights do not fit the network, or a layer its input"
        )
    return tensor.data_ptr()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is on the CPU and has its values one after another."""
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's values, which the caller has checked or made."""
    return None if tensor is None else tensor.data_ptr()


def check_returned(code: int) -> None:
    """Raise the error that a kernel's result stands for."""
    if code & OUT_OF_RANGE:
        raise BundleError(
            "a token or its position is beyond what the network has rows for; its tokenizer belongs to "
            "another network, or the ids come from elsewhere"
        )
    if code & OUT_OF_MEMORY:
        raise MemoryError("there is no memory left for a kernel")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
