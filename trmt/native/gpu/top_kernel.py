"""The highest scores of a vocabulary, in one pass over the scores, in Triton.

The scores are read once, in chunks, of each of which the maximum and the sum of exponentials are kept. The
highest scores can lie only in the chunks with the highest maxima; those few are read again. The same in
plain PyTorch is in trmt/decoding/top.py.

A score and its id make one whole number, in whose order higher scores come first, and of equal ones the lower
id: so no two are equal, and nothing that is no number can lead astray.

Axes: R rows, V vocabulary, G chunks of it (W wide), C candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128  # scores
BLOCK = 32  # chunks of a program of the first stage
WARPS = 4


def launch(scores_RV: Tensor, best_RC: Tensor, ids_RC: Tensor, log_R1: Tensor) -> None:
    """Write the highest scores, their ids and the logarithm of all exponentials' sum."""
    rows, vocabulary = scores_RV.shape
    count, chunks = best_RC.shape[1], triton.cdiv(vocabulary, CHUNK)
    survey_2RG = log_R1.new_empty(2, rows, chunks)
    sizes = (scores_RV.stride(0), vocabulary, chunks)
    grid = (rows, triton.cdiv(chunks, BLOCK))
    _survey[grid](scores_RV, *survey_2RG, *sizes, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=WARPS)
    _pick[(rows,)](
        *(scores_RV, *survey_2RG, best_RC, ids_RC, log_R1, *sizes),
        CHUNK=CHUNK,
        CHUNKS=triton.next_power_of_2(chunks),
        COUNT=count,
        SPREAD=triton.next_power_of_2(count),
        num_warps=WARPS,
    )


@triton.jit
def _survey(
    scores_RV: tl.tensor,
    most_RG: tl.tensor,
    sum_RG: tl.tensor,
    stride: tl.tensor,
    vocabulary: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The maximum and the sum of exponentials, relative to it, of each chunk."""
    row = tl.program_id(0).to(tl.int64)
    chunk_G = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    id_GW = chunk_G[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    score_GW = tl.load(scores_RV + row * stride + id_GW, mask=id_GW < vocabulary, other=float("-inf"))
    score_GW = score_GW.to(tl.float32)
    most_G = tl.max(score_GW, 1)
    # Where nothing is possible: infinity less infinity is no number.
    level_G = tl.where(most_G == float("-inf"), 0.0, most_G)
    sum_G = tl.sum(tl.exp(score_GW - level_G[:, None]), 1)
    at_G = row * chunks + chunk_G
    tl.store(most_RG + at_G, most_G, mask=chunk_G < chunks)
    tl.store(sum_RG + at_G, sum_G, mask=chunk_G < chunks)


@triton.jit
def _pick(
    scores_RV: tl.tensor,
    most_RG: tl.tensor,
    sum_RG: tl.tensor,
    best_RC: tl.tensor,
    ids_RC: tl.tensor,
    log_R1: tl.tensor,
    stride: tl.tensor,
    vocabulary: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    COUNT: tl.constexpr,
    SPREAD: tl.constexpr,
) -> None:
    """From the chunks' maxima and sums to those of the row, and to its highest scores."""
    row = tl.program_id(0).to(tl.int64)
    chunk_G = tl.arange(0, CHUNKS)
    most_G = tl.load(most_RG + row * chunks + chunk_G, mask=chunk_G < chunks, other=float("-inf"))
    sum_G = tl.load(sum_RG + row * chunks + chunk_G, mask=chunk_G < chunks, other=0.0)
    most = tl.max(most_G, 0)
    level = tl.where(most == float("-inf"), 0.0, most)
    tl.store(log_R1 + row, level + tl.log(tl.sum(sum_G * tl.exp(most_G - level), 0)))

    ranked_G = _ranked(most_G, chunk_G, chunk_G < chunks)
    place_C = tl.arange(0, SPREAD)
    chosen_C = tl.zeros([SPREAD], tl.int32) + chunks  # where there are fewer, behind the last
    for place in range(COUNT):
        first = tl.max(ranked_G, 0)
        real = first != -(2**63)
        chosen_C = tl.where((place_C == place) & real, _id(first), chosen_C)
        ranked_G = tl.where(ranked_G == first, -(2**63), ranked_G)

    id_CW = chosen_C[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    score_CW = tl.load(scores_RV + row * stride + id_CW, mask=id_CW < vocabulary, other=float("-inf"))
    ranked_CW = _ranked(score_CW.to(tl.float32), id_CW, id_CW < vocabulary)
    for place in range(COUNT):
        first = tl.max(tl.max(ranked_CW, 1), 0)
        tl.store(best_RC + row * COUNT + place, _score(first))
        tl.store(ids_RC + row * COUNT + place, _id(first).to(tl.int64))
        ranked_CW = tl.where(ranked_CW == first, -(2**63), ranked_CW)


@triton.jit
def _ranked(score: tl.tensor, index: tl.tensor, real: tl.tensor) -> tl.tensor:
    """The score in the upper half, the index in the lower half of a number; what is not real comes last."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # both zeros are equal
    # As whole numbers, negative floats are in the wrong order.
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    both = (rank.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    return tl.where(real, both, -(2**63))


@triton.jit
def _id(ranked: tl.tensor) -> tl.tensor:
    return 0x7FFFFFFF - (ranked & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _score(ranked: tl.tensor) -> tl.tensor:
    rank = (ranked >> 32).to(tl.int32)
    return (rank ^ ((rank >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
