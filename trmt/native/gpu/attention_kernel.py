"""Attention of one step of decoding through the table of ancestors, in Triton.

The same in plain PyTorch is `SharedKVCache.attend` (trmt/nets/kv_cache.py).

Axes: S sentence, H heads, K hypothesis (in the kernel those of one program), J slots of the cache, C columns
of the cache (in the kernel those that are read together), P head dimension.

A step is bound by memory: each key and value is read for one query. So nothing here uses tensor cores, and
each hypothesis gathers the slots of its own ancestors. Hypotheses of a sentence mostly have the same ones: in
one program these are read from memory once, and from the cache for the others.

Each column of a block keeps its own maximum and sums, which come together at the end: in the loop no thread
waits for another, but for those that share a slot's key.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # numbers of the keys that a program holds at once: 32 for each of its threads
TOGETHER = 8  # hypotheses of a program, at most
ENOUGH = 256  # programs that keep a large card busy: with fewer, each hypothesis gets its own
WARPS = 4


def launch(
    out_SKHP: Tensor,
    query_SHKP: Tensor,
    kv_2SHKP: Tensor,
    cached_2SHJP: Tensor,
    *,
    ancestors_SKC: Tensor | None,
    position_S: Tensor,
    columns: int,
) -> None:
    """Store the new keys and values, and write the output of each query to `out`."""
    sentences, heads, hypotheses, head_dim = query_SHKP.shape
    new_key, new_value = kv_2SHKP.unbind(0)
    key_SHJP, value_SHJP = cached_2SHJP.unbind(0)
    together = 1
    if sentences * heads >= ENOUGH:
        together = min(triton.next_power_of_2(hypotheses), TOGETHER)
    groups = triton.cdiv(hypotheses, together)
    ancestor_strides = (0, 0, 0) if ancestors_SKC is None else ancestors_SKC.stride()
    _attend[(sentences * heads * groups,)](
        *(out_SKHP, query_SHKP, new_key, new_value, key_SHJP, value_SHJP, ancestors_SKC, position_S),
        *(heads, hypotheses, groups, columns),
        *out_SKHP.stride()[:3],
        *query_SHKP.stride()[:3],
        *new_key.stride()[:3],
        *key_SHJP.stride()[:3],
        *ancestor_strides,
        position_S.stride(0),
        math.log2(math.e) / math.sqrt(head_dim),
        HEAD_DIM=head_dim,
        TOGETHER=together,
        BLOCK=max(TILE // (head_dim * together), 1),
        num_warps=WARPS,
    )


@triton.jit
def _attend(
    out_SKHP: tl.tensor,
    query_SHKP: tl.tensor,
    new_key_SHKP: tl.tensor,
    new_value_SHKP: tl.tensor,
    key_SHJP: tl.tensor,
    value_SHJP: tl.tensor,
    ancestors_SKC: tl.tensor,
    position_S: tl.tensor,
    heads: tl.tensor,
    hypotheses: tl.tensor,
    groups: tl.tensor,
    columns: tl.tensor,
    out_s: tl.tensor,
    out_k: tl.tensor,
    out_h: tl.tensor,
    query_s: tl.tensor,
    query_h: tl.tensor,
    query_k: tl.tensor,
    new_s: tl.tensor,
    new_h: tl.tensor,
    new_k: tl.tensor,
    cache_s: tl.tensor,
    cache_h: tl.tensor,
    cache_j: tl.tensor,
    ancestors_s: tl.tensor,
    ancestors_k: tl.tensor,
    ancestors_c: tl.tensor,
    position_s: tl.tensor,
    scale: tl.tensor,  # of the products, so that powers of 2 do for those of e
    HEAD_DIM: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    head = program // groups % heads
    sentence = (program // groups // heads).to(tl.int64)
    hypothesis_K = program % groups * TOGETHER + tl.arange(0, TOGETHER)
    real_K = hypothesis_K < hypotheses
    dim_P = tl.arange(0, HEAD_DIM)[None, :]
    # A sentence that is done stays within the cache until it is removed.
    column = tl.minimum(tl.load(position_S + sentence * position_s), columns - 1).to(tl.int32)

    at_KP = sentence * query_s + head * query_h + hypothesis_K[:, None] * query_k + dim_P
    query_KP = tl.load(query_SHKP + at_KP, mask=real_K[:, None], other=0.0).to(tl.float32) * scale
    at_KP = sentence * new_s + head * new_h + hypothesis_K[:, None] * new_k + dim_P
    kind = key_SHJP.dtype.element_ty
    key_KP = tl.load(new_key_SHKP + at_KP, mask=real_K[:, None], other=0.0).to(kind)
    value_KP = tl.load(new_value_SHKP + at_KP, mask=real_K[:, None], other=0.0).to(kind)
    key_SHJP += sentence * cache_s + head * cache_h
    value_SHJP += sentence * cache_s + head * cache_h
    # No program reads these slots from memory in this step: no other hypothesis descends from them yet.
    at_KP = (column * hypotheses + hypothesis_K[:, None]) * cache_j + dim_P
    tl.store(key_SHJP + at_KP, key_KP, mask=real_K[:, None])
    tl.store(value_SHJP + at_KP, value_KP, mask=real_K[:, None])
    score_K = tl.sum(query_KP * key_KP.to(tl.float32), 1)

    most_KC = tl.full([TOGETHER, BLOCK], -1e30, tl.float32)  # finite: infinity less infinity is no number
    sum_KC = tl.zeros([TOGETHER, BLOCK], tl.float32)
    out_KCP = tl.zeros([TOGETHER, BLOCK, HEAD_DIM], tl.float32)
    for first in range(0, column, BLOCK):
        column_C = first + tl.arange(0, BLOCK)[None, :]
        past_KC = (column_C < column) & real_K[:, None]
        slot_KC = column_C * hypotheses
        if ancestors_SKC is None:
            slot_KC += hypothesis_K[:, None]
        else:
            at_KC = sentence * ancestors_s + hypothesis_K[:, None] * ancestors_k + column_C * ancestors_c
            slot_KC += tl.load(ancestors_SKC + at_KC, mask=past_KC, other=0).to(tl.int32)
        at_KCP = slot_KC[:, :, None] * cache_j + dim_P[:, None, :]
        key_KCP = tl.load(key_SHJP + at_KCP, mask=past_KC[:, :, None], other=0.0).to(tl.float32)
        value_KCP = tl.load(value_SHJP + at_KCP, mask=past_KC[:, :, None], other=0.0).to(tl.float32)
        score_KC = tl.where(past_KC, tl.sum(query_KP[:, None, :] * key_KCP, 2), float("-inf"))
        higher_KC = tl.maximum(most_KC, score_KC)
        fading_KC = tl.exp2(most_KC - higher_KC)
        weight_KC = tl.exp2(score_KC - higher_KC)
        sum_KC = sum_KC * fading_KC + weight_KC
        out_KCP = out_KCP * fading_KC[:, :, None] + weight_KC[:, :, None] * value_KCP
        most_KC = higher_KC

    most_K = tl.maximum(tl.max(most_KC, 1), score_K)
    share_KC = tl.exp2(most_KC - most_K[:, None])
    own_share_K = tl.exp2(score_K - most_K)
    sum_K = tl.sum(sum_KC * share_KC, 1) + own_share_K
    out_KP = tl.sum(out_KCP * share_KC[:, :, None], 1) + own_share_K[:, None] * value_KP.to(tl.float32)
    at_KP = sentence * out_s + hypothesis_K[:, None] * out_k + head * out_h + dim_P
    tl.store(out_SKHP + at_KP, out_KP / sum_K[:, None], mask=real_K[:, None])
