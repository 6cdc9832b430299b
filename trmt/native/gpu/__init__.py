"""Kernels in Triton for GPUs, compiled the first time they are wanted.

Nothing needs them: whoever uses one has the same in plain PyTorch. Triton comes with PyTorch's CUDA builds,
and wants a C compiler beside it. TRMT_KERNELS=0 does without them. What else is in this folder imports
Triton, so it is imported only where `at_hand` has said yes.

A kernel is compiled at its first launch, which takes seconds: who captures a CUDA graph launches once before.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from trmt import console

_given_up = False


def at_hand(like: Tensor) -> bool:
    """Whether kernels are worth trying where this tensor lies."""
    if not like.is_cuda or _given_up or os.environ.get("TRMT_KERNELS") == "0":
        return False
    return _installed()


@functools.cache
def _installed() -> bool:
    return find_spec("triton") is not None


def launched(launch: Callable[[], None], like: Tensor) -> bool:
    """Whether kernels could be launched on the device of `like`; after one failure none is tried again."""
    global _given_up
    try:
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device_of(like):
            launch()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever Triton, its C compiler and the driver raise
        _given_up = True
        why = str(error).strip().splitlines() or [type(error).__name__]
        console.warn(f"Triton cannot build trmt's kernels ({why[0]}); it goes on without them, slower")
        return False
    return True
