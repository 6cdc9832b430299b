"""The highest scores of a vocabulary, and the normaliser of the softmax.

Axes: R rows (S * K), V vocabulary, C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trmt.acceleration import accelerated

CHUNK = 128  # of the vocabulary, in the first stage of `top_k`
BLOCK = 16  # rows whose exponentials stay in a processor's cache


def top(scores_RV: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` highest scores of each row, their ids, and the logarithm of the sum of exponentials [R, 1].

    The scores may be of any precision, and may be overwritten; the result has single precision. The highest
    scores are the same whether a kernel finds them or PyTorch; the logarithms may differ in the last bit.
    """
    if fast := accelerated("top"):
        found = fast(scores_RV, count)
        if found is not None:
            return found
    best_RC, ids_RC = top_k(scores_RV, count)
    best_RC = best_RC.float()
    # In half precision a sum over a vocabulary would lose the differences that decide.
    scores_RV = scores_RV.float()
    if scores_RV.device.type == "cpu":
        return best_RC, ids_RC, log_sum_exp(scores_RV, best_RC[:, :1])
    return best_RC, ids_RC, scores_RV.logsumexp(-1, keepdim=True)


def top_k(scores_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest scores of each row and their ids; exactly torch.topk, but faster.

    The maxima of chunks say which chunks can hold one of the highest; only those are searched.
    """
    vocabulary = scores_RV.shape[1]
    chunks = vocabulary // CHUNK
    if chunks <= count:
        best = scores_RV.topk(min(count, vocabulary), -1)
        return best.values, best.indices
    even = chunks * CHUNK
    grid = scores_RV[:, :even].unflatten(1, (chunks, CHUNK))
    # In ascending order, so that equal scores are met in the order of their ids.
    chosen = grid.amax(-1).topk(count, -1).indices.sort(-1).values
    near = grid.gather(1, chosen[:, :, None].expand(-1, -1, CHUNK)).flatten(1)
    ids = (chosen[:, :, None] * CHUNK + torch.arange(CHUNK, device=chosen.device)).flatten(1)
    if even < vocabulary:
        near = torch.cat([near, scores_RV[:, even:]], 1)
        rest = torch.arange(even, vocabulary, device=ids.device)
        ids = torch.cat([ids, rest.expand(ids.shape[0], -1)], 1)
    best = near.topk(count, -1)
    return best.values, ids.gather(1, best.indices)


def log_sum_exp(scores_RV: Tensor, largest_R1: Tensor) -> Tensor:
    """The logarithm of the sum of exponentials of each row [R, 1], whose greatest score is given.

    The scores are overwritten: at the size of a vocabulary, memory for the exponentials costs more than they
    do.
    """
    sums = []
    for scores, largest in zip(scores_RV.split(BLOCK), largest_R1.split(BLOCK), strict=True):
        sums.append(scores.sub_(largest).exp_().sum(-1, keepdim=True))
    return (torch.cat(sums) if len(sums) > 1 else sums[0]).log_().add_(largest_R1)
