"""Attention of one step of decoding over what each hypothesis has behind it, by a kernel or in plain PyTorch.

Nothing here asks an accelerator for a value, and all shapes are fixed: a CUDA graph can hold it.

Axes: S sentence, K hypothesis, C columns, J slots (C * K), H heads, P width of one head,
D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trmt.native import gpu
from trmt.nets.layers import attend, blocked

PARTS = (16, 32, 64, 128)  # widths of a head that the kernel is made for
KINDS = (torch.bfloat16, torch.float16, torch.float32)


def suits(like: Tensor, part: int) -> bool:
    """Whether a kernel may be at hand for tensors like this one and heads of this width."""
    return part in PARTS and like.dtype in KINDS and gpu.at_hand(like)


def look_back(
    query_SHKP: Tensor,
    fresh_2SHKP: Tensor,
    store_2SHJP: Tensor,
    *,
    table_SKC: Tensor | None,
    position_S: Tensor,
    columns: int,
) -> Tensor:
    """Store the keys and values of the newest tokens, and look at all there are so far: [S, K, D].

    What hypothesis k of a sentence has made goes to slot `position * K + k`. Of each column c before, it
    sees the slot `c * K + table[k, c]`; without a table, `c * K + k`. Columns from `columns` on, a number of
    the host, are not read or written: a position beyond is taken for the last. The last axis of the queries,
    of what is fresh and of the store must be contiguous, and the store free of NaN from the beginning.
    """
    assert columns * query_SHKP.shape[2] <= store_2SHJP.shape[3]
    assert query_SHKP.stride(3) == fresh_2SHKP.stride(4) == store_2SHJP.stride(4) == 1
    sentences, heads, hypotheses, part = query_SHKP.shape
    if suits(query_SHKP, part):
        out_SKHP = query_SHKP.new_empty(sentences, hypotheses, heads, part)

        def launch() -> None:
            from trmt.native.gpu import looking_back

            tensors = (out_SKHP, query_SHKP, fresh_2SHKP, store_2SHJP)
            looking_back.launch(*tensors, table_SKC=table_SKC, position_S=position_S, columns=columns)

        if gpu.launched(launch, query_SHKP):
            return out_SKHP.flatten(2)
    put(fresh_2SHKP, store_2SHJP, position_S, columns)
    mask = seen(table_SKC, position_S, hypotheses=hypotheses, columns=columns)
    return look(query_SHKP, store_2SHJP, mask)


def put(fresh_2SHKP: Tensor, store_2SHJP: Tensor, position_S: Tensor, columns: int) -> None:
    """Store the keys and values of the newest tokens in their slots."""
    hypotheses = fresh_2SHKP.shape[3]
    own_K = torch.arange(hypotheses, device=position_S.device)
    slot_SK = position_S.clamp(max=columns - 1)[:, None] * hypotheses + own_K
    places = slot_SK[None, :, None, :, None].expand_as(fresh_2SHKP)
    store_2SHJP.scatter_(3, places, fresh_2SHKP.to(store_2SHJP.dtype))


def seen(table_SKC: Tensor | None, position_S: Tensor, *, hypotheses: int, columns: int) -> Tensor:
    """The additive mask of the slots that each hypothesis sees: [S, 1, K, J]."""
    own_K = torch.arange(hypotheses, device=position_S.device)
    column_C = torch.arange(columns, device=position_S.device)
    newest_S11 = position_S.clamp(max=columns - 1)[:, None, None]
    row_SKC = own_K[:, None] if table_SKC is None else table_SKC[:, :, :columns]
    row_SKC = torch.where(column_C == newest_S11, own_K[:, None], row_SKC)
    seen_SKCK = (row_SKC[..., None] == own_K) & (column_C <= newest_S11)[..., None]
    return blocked(seen_SKCK.flatten(2))[:, None]


def look(query_SHKP: Tensor, store_2SHJP: Tensor, mask: Tensor) -> Tensor:
    """What the queries find in the slots that the mask is about: [S, K, D]."""
    key_SHJP, value_SHJP = store_2SHJP.narrow(3, 0, mask.shape[-1]).unbind(0)
    return attend(query_SHKP, key_SHJP, value_SHJP, mask.to(query_SHKP.dtype))
