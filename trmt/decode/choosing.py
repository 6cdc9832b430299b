"""The highest scores of a vocabulary: by a kernel, or in plain PyTorch.

Which scores are the highest is the same either way; the logarithms of sums may differ in the last bit.

Axes: R rows (S * K), V vocabulary, C candidates.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from trmt import kernels
from trmt.decode.base import CHUNK, log_sums, top

MOST = 64  # candidates that the kernel keeps in order; with more, PyTorch is faster


def highest(scores_RV: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` highest scores of each row, their ids, and the logarithm of all exponentials' sum [R, 1].

    The scores may be lost.
    """
    rows, vocabulary = scores_RV.shape
    if library := library_for(scores_RV, vocabulary, count):
        scores_RV = scores_RV.contiguous()
        best_RC, log_R1 = scores_RV.new_empty(rows, count), scores_RV.new_empty(rows, 1)
        ids_RC = torch.empty(rows, count, dtype=torch.long)
        pointers = (each.data_ptr() for each in (best_RC, ids_RC, log_R1))
        library.trmt_highest(scores_RV.data_ptr(), rows, vocabulary, count, *pointers)
        return best_RC, ids_RC, log_R1
    best_RC, ids_RC = top(scores_RV, count)
    return best_RC, ids_RC, log_sums(scores_RV, best_RC[:, :1])


def library_for(like: Tensor, vocabulary: int, count: int) -> Any:
    """The kernels of search, where they can find the `count` highest of scores like these; otherwise None."""
    fits = count <= min(MOST, vocabulary // CHUNK)
    return _library() if fits and like.device.type == "cpu" and like.dtype == torch.float32 else None


@functools.cache
def _library() -> Any:
    found = kernels.load("search")
    if found:
        for function in (found.trmt_advance_lines, found.trmt_advance_beams):
            function.restype = None
            function.argtypes = (
                *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64),
                *(ctypes.c_void_p, ctypes.c_void_p),
            )
        found.trmt_highest.restype = None
        found.trmt_highest.argtypes = (
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
        )
    return found
