"""Kernels in Triton for GPUs, compiled at their first launch, which takes seconds.

Triton comes with PyTorch's CUDA builds, and needs a C compiler. What imports it is imported only after
`available`.

Axes: S sentence, K hypothesis, J slots of a KV cache, T target position, H heads, P head dimension, R rows
(S * K), V vocabulary, C columns of the cache or candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.devices import hardware
from trmt.devices.abilities import abilities
from trmt.devices.memory import is_out_of_memory

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128)  # that the kernel of attention is made for
MAX_CANDIDATES = 16  # each is a pass over what a program holds
MAX_VOCABULARY = 1 << 20  # the maxima of its chunks are held by one program


def available(like: Tensor) -> bool:
    """Whether kernels are to be used on the device of this tensor; the first time they are tried there."""
    return hardware.is_cuda(like.device) and abilities(like.device).use("triton")


def launched(launch: Callable[[], None], like: Tensor) -> bool:
    """Whether a kernel could be launched on the device of `like`; after one failure none is tried again."""
    try:
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device_of(like):
            launch()
    except Exception as error:  # whatever Triton, its C compiler and the driver raise
        if is_out_of_memory(error):
            raise
        abilities(like.device).lose("triton", error)
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


def probe(device: torch.device, dtype: torch.dtype) -> str:
    """Run both kernels in a precision: why they cannot be run, or nothing; what fails is raised."""
    if not find_spec("triton"):
        return "Triton is not installed"
    from trmt.native.gpu import attention_kernel, top_kernel

    scores_RV = (torch.arange(2 * 300, device=device) * 7 % 601 / 50).view(2, 300).to(dtype)
    best_RC, log_sum_R1 = (scores_RV.new_empty(2, count, dtype=torch.float32) for count in (4, 1))
    ids_RC = scores_RV.new_empty(2, 4, dtype=torch.long)
    top_kernel.launch(scores_RV, best_RC, ids_RC, log_sum_R1)
    scores_RV = scores_RV.float()
    expected = scores_RV.topk(4)
    found = torch.cat([best_RC, scores_RV.gather(1, ids_RC), log_sum_R1], 1)
    wanted = torch.cat([expected.values, expected.values, scores_RV.logsumexp(1, keepdim=True)], 1)

    # A sentence, a head, two hypotheses, of which the second descends from the first; two columns, 64 wide.
    cached_2SHJP = (torch.arange(2 * 4 * 64, device=device) % 11 / 10).view(2, 1, 1, 4, 64).to(dtype)
    query_SHKP, *new = (torch.arange(3 * 2 * 64, device=device) % 7 / 5).view(3, 1, 1, 2, 64).to(dtype)
    out_SKHP = query_SHKP.new_empty(1, 2, 1, 64)
    own_K = torch.arange(2, device=device)
    ancestors_SKC = torch.stack([torch.zeros_like(own_K), own_K], 1)[None]
    attention_kernel.launch(
        *(out_SKHP, query_SHKP, torch.stack(new), cached_2SHJP),
        ancestors_SKC=ancestors_SKC,
        position_S=torch.ones(1, dtype=torch.long, device=device),
        columns=2,
    )
    both = [
        torch.stack([before[0, 0, :1].expand(2, -1), now[0, 0]], 1)  # [K, C, P]
        for before, now in zip(cached_2SHJP, new, strict=True)
    ]
    query_K1P, (key_KCP, value_KCP) = query_SHKP[0, 0][:, None], both
    attended = F.scaled_dot_product_attention(query_K1P.float(), key_KCP.float(), value_KCP.float())
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    for one, other in ((found, wanted), (out_SKHP.flatten().float(), attended.flatten())):
        if not torch.allclose(one, other, atol=tolerance, rtol=tolerance):
            raise RuntimeError("a kernel computed a wrong result")
    return ""
