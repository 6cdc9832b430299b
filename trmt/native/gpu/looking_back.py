"""Attention of one step of decoding through the table of ancestors, in Triton.

What it computes is told, and done in plain PyTorch, in trmt/nets/looking_back.py. Axes, beside those of
trmt/nets/stores.py: K here the hypotheses of one program, C the columns that it looks at together.

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
    fresh_2SHKP: Tensor,
    store_2SHJP: Tensor,
    *,
    table_SKC: Tensor | None,
    position_S: Tensor,
    columns: int,
) -> None:
    """Store what is fresh, and write what each query finds to `out`."""
    sentences, heads, hypotheses, part = query_SHKP.shape
    fresh_key, fresh_value = fresh_2SHKP.unbind(0)
    key_SHJP, value_SHJP = store_2SHJP.unbind(0)
    together = 1
    if sentences * heads >= ENOUGH:
        together = min(triton.next_power_of_2(hypotheses), TOGETHER)
    groups = triton.cdiv(hypotheses, together)
    table_strides = (0, 0, 0) if table_SKC is None else table_SKC.stride()
    _look_back[(sentences * heads * groups,)](
        *(out_SKHP, query_SHKP, fresh_key, fresh_value, key_SHJP, value_SHJP, table_SKC, position_S),
        *(heads, hypotheses, groups, columns),
        *out_SKHP.stride()[:3],
        *query_SHKP.stride()[:3],
        *fresh_key.stride()[:3],
        *key_SHJP.stride()[:3],
        *table_strides,
        position_S.stride(0),
        math.log2(math.e) / math.sqrt(part),
        PART=part,
        TOGETHER=together,
        BLOCK=max(TILE // (part * together), 1),
        num_warps=WARPS,
    )


@triton.jit
def _look_back(
    out_SKHP: tl.tensor,
    query_SHKP: tl.tensor,
    fresh_key_SHKP: tl.tensor,
    fresh_value_SHKP: tl.tensor,
    key_SHJP: tl.tensor,
    value_SHJP: tl.tensor,
    table_SKC: tl.tensor,
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
    fresh_s: tl.tensor,
    fresh_h: tl.tensor,
    fresh_k: tl.tensor,
    store_s: tl.tensor,
    store_h: tl.tensor,
    store_j: tl.tensor,
    table_s: tl.tensor,
    table_k: tl.tensor,
    table_c: tl.tensor,
    position_s: tl.tensor,
    scale: tl.tensor,  # of the products, so that powers of 2 do for those of e
    PART: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    head = program // groups % heads
    sentence = (program // groups // heads).to(tl.int64)
    own_K = program % groups * TOGETHER + tl.arange(0, TOGETHER)
    real_K = own_K < hypotheses
    part_P = tl.arange(0, PART)[None, :]
    # A sentence that waits to be taken away stays within its room.
    column = tl.minimum(tl.load(position_S + sentence * position_s), columns - 1).to(tl.int32)

    at_KP = sentence * query_s + head * query_h + own_K[:, None] * query_k + part_P
    query_KP = tl.load(query_SHKP + at_KP, mask=real_K[:, None], other=0.0).to(tl.float32) * scale
    at_KP = sentence * fresh_s + head * fresh_h + own_K[:, None] * fresh_k + part_P
    kind = key_SHJP.dtype.element_ty
    key_KP = tl.load(fresh_key_SHKP + at_KP, mask=real_K[:, None], other=0.0).to(kind)
    value_KP = tl.load(fresh_value_SHKP + at_KP, mask=real_K[:, None], other=0.0).to(kind)
    key_SHJP += sentence * store_s + head * store_h
    value_SHJP += sentence * store_s + head * store_h
    # Nobody reads these slots from memory in this step: a hypothesis has no other's newest token behind it.
    at_KP = (column * hypotheses + own_K[:, None]) * store_j + part_P
    tl.store(key_SHJP + at_KP, key_KP, mask=real_K[:, None])
    tl.store(value_SHJP + at_KP, value_KP, mask=real_K[:, None])
    score_K = tl.sum(query_KP * key_KP.to(tl.float32), 1)

    most_KC = tl.full([TOGETHER, BLOCK], -1e30, tl.float32)  # finite: infinity less infinity is no number
    sum_KC = tl.zeros([TOGETHER, BLOCK], tl.float32)
    found_KCP = tl.zeros([TOGETHER, BLOCK, PART], tl.float32)
    for first in range(0, column, BLOCK):
        column_C = first + tl.arange(0, BLOCK)[None, :]
        past_KC = (column_C < column) & real_K[:, None]
        slot_KC = column_C * hypotheses
        if table_SKC is None:
            slot_KC += own_K[:, None]
        else:
            at_KC = sentence * table_s + own_K[:, None] * table_k + column_C * table_c
            slot_KC += tl.load(table_SKC + at_KC, mask=past_KC, other=0).to(tl.int32)
        at_KCP = slot_KC[:, :, None] * store_j + part_P[:, None, :]
        key_KCP = tl.load(key_SHJP + at_KCP, mask=past_KC[:, :, None], other=0.0).to(tl.float32)
        value_KCP = tl.load(value_SHJP + at_KCP, mask=past_KC[:, :, None], other=0.0).to(tl.float32)
        score_KC = tl.where(past_KC, tl.sum(query_KP[:, None, :] * key_KCP, 2), float("-inf"))
        higher_KC = tl.maximum(most_KC, score_KC)
        fading_KC = tl.exp2(most_KC - higher_KC)
        weight_KC = tl.exp2(score_KC - higher_KC)
        sum_KC = sum_KC * fading_KC + weight_KC
        found_KCP = found_KCP * fading_KC[:, :, None] + weight_KC[:, :, None] * value_KCP
        most_KC = higher_KC

    most_K = tl.maximum(tl.max(most_KC, 1), score_K)
    share_KC = tl.exp2(most_KC - most_K[:, None])
    own_share_K = tl.exp2(score_K - most_K)
    sum_K = tl.sum(sum_KC * share_KC, 1) + own_share_K
    found_KP = tl.sum(found_KCP * share_KC[:, :, None], 1) + own_share_K[:, None] * value_KP.to(tl.float32)
    at_KP = sentence * out_s + own_K[:, None] * out_k + head * out_h + part_P
    tl.store(out_SKHP + at_KP, found_KP / sum_K[:, None], mask=real_K[:, None])
