"""Kernels in Triton for GPUs, compiled at their first launch, which takes seconds.

Triton comes with PyTorch's CUDA builds, and needs a C compiler. What imports it is imported only after
`available`.

Axes: S sentence, K hypothesis, J slots of a KV cache, T target position, H heads, P head dimension, R rows
(S * K), V vocabulary, C columns of the cache or candidates.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from trmt import console

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128)  # that the kernel of attention is made for
MAX_CANDIDATES = 16  # each is a pass over what a program holds
MAX_VOCABULARY = 1 << 20  # the maxima of its chunks are held by one program

_failed = False


def available(like: Tensor) -> bool:
    """Whether kernels may be tried on the device of this tensor."""
    return like.is_cuda and not _failed and _installed()


@functools.cache
def _installed() -> bool:
    return find_spec("triton") is not None


def launched(launch: Callable[[], None], like: Tensor) -> bool:
    """Whether a kernel could be launched on the device of `like`; after one failure none is tried again."""
    global _failed
    try:
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device_of(like):
            launch()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever Triton, its C compiler and the driver raise
        _failed = True
        why = str(error).strip().splitlines() or [type(error).__name__]
        console.warn(f"Triton cannot build trmt's kernels ({why[0]}); it goes on without them, slower")
        return False
    return True


def serves_cached_attention(like: Tensor, head_dim: int) -> bool:
    """Whether there may be a kernel of attention for tensors like this one and this head dimension."""
    return head_dim in HEAD_DIMS and like.dtype in DTYPES and available(like)


def cached_attention(
    query_SHKP: Tensor,
    kv_2SHKP: Tensor,
    cached_2SHJP: Tensor,
    ancestors_SKC: Tensor | None,
    position_ST: Tensor,
    columns: int,
) -> Tensor | None:
    """What `SharedKVCache.attend` does with one new token of each hypothesis: [S, K, D].

    Columns from `columns` on are neither read nor written. Without a table of ancestors there is one
    hypothesis.
    """
    sentences, heads, hypotheses, head_dim = query_SHKP.shape
    if position_ST.shape[1] != 1 or not serves_cached_attention(query_SHKP, head_dim):
        return None
    assert columns * hypotheses <= cached_2SHJP.shape[3]
    assert query_SHKP.stride(3) == kv_2SHKP.stride(4) == cached_2SHJP.stride(4) == 1
    out_SKHP = query_SHKP.new_empty(sentences, hypotheses, heads, head_dim)

    def launch() -> None:
        from trmt.native.gpu import attention_kernel

        tensors = (out_SKHP, query_SHKP, kv_2SHKP, cached_2SHJP)
        position_S = position_ST[:, 0]
        attention_kernel.launch(*tensors, ancestors_SKC=ancestors_SKC, position_S=position_S, columns=columns)

    return out_SKHP.flatten(2) if launched(launch, query_SHKP) else None


def top(scores_RV: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The highest scores, their ids and the logarithm of the sum of exponentials; ties in order of ids."""
    rows, vocabulary = scores_RV.shape
    count = min(count, vocabulary)
    fits = count <= MAX_CANDIDATES and vocabulary <= MAX_VOCABULARY and scores_RV.stride(1) == 1
    if not (fits and available(scores_RV)):
        return None
    best_RC = scores_RV.new_empty(rows, count, dtype=torch.float32)
    ids_RC = scores_RV.new_empty(rows, count, dtype=torch.long)
    log_sum_R1 = scores_RV.new_empty(rows, 1, dtype=torch.float32)

    def launch() -> None:
        from trmt.native.gpu import top_kernel

        top_kernel.launch(scores_RV, best_RC, ids_RC, log_sum_R1)

    return (best_RC, ids_RC, log_sum_R1) if launched(launch, scores_RV) else None
