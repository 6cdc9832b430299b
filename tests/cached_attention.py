"""Attention over a KV cache as kernels compute it, in plain PyTorch and one hypothesis after the other.

Axes as in trmt/nets/kv_cache.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def store(kv_2SHKP: Tensor, cached_2SHJP: Tensor, position_ST: Tensor, columns: int) -> None:
    """Write the newest keys and values to their column, which is the last one for those beyond it."""
    hypotheses = kv_2SHKP.shape[3]
    for sentence, position in enumerate(position_ST[:, 0].clamp(max=columns - 1).tolist()):
        slot = position * hypotheses
        cached_2SHJP[:, sentence, :, slot : slot + hypotheses] = kv_2SHKP[:, sentence].to(cached_2SHJP.dtype)


def slots(
    ancestors_SKC: Tensor | None,
    position_ST: Tensor,
    columns: int,
    hypothesis: tuple[int, int],
    hypotheses: int,
) -> list[int]:
    """The slots that a hypothesis (sentence, number) attends to, its newest one last."""
    sentence, number = hypothesis
    newest = min(int(position_ST[sentence, 0]), columns - 1)
    rows = [number] * newest
    if ancestors_SKC is not None:
        rows = ancestors_SKC[sentence, number, :newest].tolist()
    return [column * hypotheses + row for column, row in enumerate([*rows, number])]


def cached_attention(
    query_SHKP: Tensor,
    kv_2SHKP: Tensor,
    cached_2SHJP: Tensor,
    ancestors_SKC: Tensor | None,
    position_ST: Tensor,
    columns: int,
) -> Tensor:
    """Store keys and values, then attend, in double precision: [S, K, D]."""
    store(kv_2SHKP, cached_2SHJP, position_ST, columns)
    sentences, heads, hypotheses, head_dim = query_SHKP.shape
    out_SKHP = torch.empty(sentences, hypotheses, heads, head_dim, dtype=torch.double)
    for sentence in range(sentences):
        for hypothesis in range(hypotheses):
            seen = slots(ancestors_SKC, position_ST, columns, (sentence, hypothesis), hypotheses)
            key_HCP, value_HCP = cached_2SHJP[:, sentence, :, seen].double().cpu()
            query_HP = query_SHKP[sentence, :, hypothesis].double().cpu()
            score_HC = (key_HCP @ query_HP[:, :, None])[..., 0] / math.sqrt(head_dim)
            out_SKHP[sentence, hypothesis] = (score_HC.softmax(-1)[:, None] @ value_HCP)[:, 0]
    return out_SKHP.flatten(2)
