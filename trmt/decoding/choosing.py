"""The highest scores of a vocabulary: by a kernel for the CPU or the GPU, or in plain PyTorch.

Which scores are the highest is the same either way; the logarithms of sums may differ in the last bit.

Axes: R rows (S * K), V vocabulary, C candidates.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from trmt import native
from trmt.decoding.base import CHUNK, log_sums, top
from trmt.native import gpu

MOST = 64  # candidates that the kernel keeps in order; with more, PyTorch is faster
MOST_ON_GPU = 16  # each is a pass over what a program holds
LARGEST_ON_GPU = 1 << 20  # vocabulary, the maxima of whose chunks one program holds


def highest(scores_RV: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` highest scores of each row, their ids, and the logarithm of all exponentials' sum [R, 1].

    The scores may be of any precision, and may be lost; what is returned has single precision.
    """
    rows, vocabulary = scores_RV.shape
    if library := library_for(scores_RV, vocabulary, count):
        scores_RV = scores_RV.contiguous()
        best_RC, log_R1 = scores_RV.new_empty(rows, count), scores_RV.new_empty(rows, 1)
        ids_RC = torch.empty(rows, count, dtype=torch.long)
        pointers = (each.data_ptr() for each in (best_RC, ids_RC, log_R1))
        library.trmt_highest(scores_RV.data_ptr(), rows, vocabulary, count, *pointers)
        return best_RC, ids_RC, log_R1
    if found := _on_gpu(scores_RV, min(count, vocabulary)):
        return found
    return highest_in_pytorch(scores_RV, count)


def highest_in_pytorch(scores_RV: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same without native."""
    best_RC, ids_RC = top(scores_RV, count)
    best_RC = best_RC.float()
    # In half precision a sum over a vocabulary would lose the differences that decide.
    scores_RV = scores_RV.float()
    if scores_RV.device.type == "cpu":
        return best_RC, ids_RC, log_sums(scores_RV, best_RC[:, :1])
    return best_RC, ids_RC, scores_RV.logsumexp(-1, keepdim=True)


def _on_gpu(scores_RV: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `highest` returns, where a kernel for the GPU can find it; equal scores stand in order of ids."""
    rows, vocabulary = scores_RV.shape
    fits = count <= MOST_ON_GPU and vocabulary <= LARGEST_ON_GPU and scores_RV.stride(1) == 1
    if not (fits and gpu.at_hand(scores_RV)):
        return None
    best_RC = scores_RV.new_empty(rows, count, dtype=torch.float32)
    ids_RC = scores_RV.new_empty(rows, count, dtype=torch.long)
    log_R1 = scores_RV.new_empty(rows, 1, dtype=torch.float32)

    def launch() -> None:
        from trmt.native.gpu import highest

        highest.launch(scores_RV, best_RC, ids_RC, log_R1)

    return (best_RC, ids_RC, log_R1) if gpu.launched(launch, scores_RV) else None


def library_for(like: Tensor, vocabulary: int, count: int) -> Any:
    """The kernels of search, where they can find the `count` highest of scores like these; otherwise None."""
    fits = count <= min(MOST, vocabulary // CHUNK)
    return _library() if fits and like.device.type == "cpu" and like.dtype == torch.float32 else None


@functools.cache
def _library() -> Any:
    found = native.load("search")
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
