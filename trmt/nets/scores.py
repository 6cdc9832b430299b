"""How alike a decoder's state and a source's state are: the scores that attention is made of.

Axes: S sentence, Q queries, L source position, H heads, D width, P width of one head.

For a query q (the decoder's state) and a source state k, in each head:

    dot        q . k                          (Luong et al., arXiv 1508.04025)
    scaled     q . k / sqrt(P)                (Vaswani et al., arXiv 1706.03762)
    general    q . W k                        (Luong et al.)
    cosine     b q . k / (|q| |k|)            (Graves et al., arXiv 1410.5401; b is learned)
    additive   v . tanh(W q + U k)            (Bahdanau et al., arXiv 1409.0473)
    location   the row of W q for the position of k, whatever stands there  (Luong et al.)
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.nets import layers

Score = Literal["dot", "scaled", "general", "cosine", "additive", "location"]

SHARPNESS = 5.0  # where the cosine's factor begins: a cosine alone cannot tell ten words apart


class Similarity(nn.Module):
    """What a score learns."""

    def __init__(self, score: Score, width: int, heads: int, places: int) -> None:
        super().__init__()
        if score in ("general", "additive"):
            self.key = layers.xavier(nn.Linear(width, width, bias=False))
        if score == "additive":
            self.query = layers.xavier(nn.Linear(width, width))
            self.vector = nn.Parameter(torch.randn(heads, 1, 1, width // heads) * (width // heads) ** -0.5)
        if score == "cosine":
            self.sharpness = nn.Parameter(torch.full((heads, 1, 1), SHARPNESS))
        if score == "location":
            self.places = layers.xavier(nn.Linear(width, heads * places))


def keys(net: Any, score: Score, states_SLD: Tensor, heads: int) -> Tensor:
    """What of a source is the same for every query: [S, H, L, P]."""
    if score in ("general", "additive"):
        states_SLD = net.key(states_SLD)
    key_SHLP = layers.heads(states_SLD, heads)
    return _of_length_one(key_SHLP) if score == "cosine" else key_SHLP


def _of_length_one(x: Tensor) -> Tensor:
    # What is divided by must not be rounded to nothing, where x is a row of zeros.
    return F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny))


def scores(net: Any, score: Score, query_SQD: Tensor, key_SHLP: Tensor) -> Tensor:
    """The score of each query with each key: [S, H, Q, L]."""
    heads, length = key_SHLP.shape[1:3]
    if score == "location":
        row = layers.heads(net.places(query_SQD), heads)
        # A source is padded beyond the last place there is; nobody looks there.
        return F.pad(row, (0, max(length - row.shape[-1], 0)))[..., :length]
    if score == "additive":
        query_SHQP = layers.heads(net.query(query_SQD), heads)
        # Not a product: a matrix with one column is not row-invariant on the CPU.
        return (torch.tanh(query_SHQP[..., None, :] + key_SHLP[:, :, None]) * net.vector).sum(-1)
    query_SHQP = layers.heads(query_SQD, heads)
    if score == "cosine":
        query_SHQP = _of_length_one(query_SHQP) * net.sharpness
    if score == "scaled":
        query_SHQP = query_SHQP / math.sqrt(query_SHQP.shape[-1])
    return query_SHQP @ key_SHLP.transpose(-2, -1)
