"""Attention over packed tokens without padding (FlashAttention), which PyTorch has for some GPUs.

Axes: N tokens in a row, M tokens of the other side in a row, S sentence, H heads, P head dimension.
"""

from __future__ import annotations

from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from torch import Tensor

from trmt.devices import hardware
from trmt.devices.abilities import abilities
from trmt.devices.memory import is_out_of_memory
from trmt.devices.probes import load_varlen

DTYPES = (torch.bfloat16, torch.float16)
MULTIPLE, LARGEST = 8, 256  # head dimensions are a multiple of the first and at most the second

varlen_attn: Any = None  # PyTorch's function, once it has been loaded
_usable: dict[int | None, bool] = {}  # by the number of the GPU; what was found out so far


def serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether it serves tensors like these; where the device cannot do it, a line says so once."""
    fits = dtype in DTYPES and head_dim % MULTIPLE == 0 and head_dim <= LARGEST
    return fits and hardware.is_cuda(device) and usable(device)


def usable(device: torch.device) -> bool:
    """Whether a device can do it; while a network is traced, what was found out before."""
    global varlen_attn
    if torch.compiler.is_compiling():
        return _usable.get(device.index, False)
    found = abilities(device).use("varlen")
    if found and varlen_attn is None:
        try:
            varlen_attn = load_varlen()
        except Exception as error:  # where the ability is taken for granted by TRMT_VARLEN=1
            abilities(device).lose("varlen", error)
            found = False
    _usable[hardware.numbered(device).index] = found
    return found


def attend(
    query_NHP: Tensor,
    key_MHP: Tensor,
    value_MHP: Tensor,
    starts: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    *,
    causal: bool,
) -> Tensor | None:
    """Attention within sentences [N, H, P]; None if it fails, and then it is not tried again.

    `starts` are where sentences begin on both sides, in 32 bits [S + 1]; `longest` are the longest ones.
    """
    window = (-1, 0 if causal else -1)
    if torch.compiler.is_compiling():
        traced: Tensor = varlen_attn(query_NHP, key_MHP, value_MHP, *starts, *longest, window_size=window)
        return traced
    try:
        out: Tensor = varlen_attn(query_NHP, key_MHP, value_MHP, *starts, *longest, window_size=window)
    except Exception as error:  # whatever the driver and PyTorch raise
        if is_out_of_memory(error):
            raise
        abilities(query_NHP.device).lose("varlen", error)
        return None
    return out


def is_to_blame(error: BaseException) -> bool:
    """Whether an error comes from PyTorch's function or its gradient, compiled or not."""
    files = (frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__))
    return "varlen_attn" in str(error) or any(Path(file).name == "varlen.py" for file in files)
