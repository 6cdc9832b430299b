"""Attention that is taught where to look: the cross-entropy of one head with the links of words.

Chen et al. (arXiv 1607.01628) guide all of a recurrent network's attention, Garg et al. (arXiv 1909.02074)
one head of a Transformer's last layer but one, so that the others stay free. The loss of a target piece with
links is the mean of -log weight over the source pieces it is linked to; others count for nothing.

Axes: A layers, S sentence, H heads, T target position, L source position, N links of a batch in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from trmt.nets.base import place_of
from trmt.sets.shards import RaggedArray

COLUMN = "alignment"  # of prepared sets: for each pair source piece, target piece, source piece, ...
LEAST = 1e-9  # below what a weight counts as: one that a network cannot give would make the loss infinite


@dataclass(frozen=True)
class Guide:
    """The links of a batch's pieces, and what each counts."""

    sentence_N: Tensor
    source_N: Tensor
    target_N: Tensor
    share_N: Tensor  # the links of a target piece add up to 1

    @classmethod
    def of(cls, column: RaggedArray, device: torch.device) -> Self:
        """The links in a column of a prepared set."""
        links = column.values.astype(np.int64).reshape(-1, 2)
        sentence = np.repeat(np.arange(len(column.lengths)), column.lengths // 2)
        piece = sentence * (int(links[:, 1].max(initial=0)) + 1) + links[:, 1]
        _, kind, counts = np.unique(piece, return_inverse=True, return_counts=True)
        arrays = (sentence, links[:, 0], links[:, 1], (1 / counts[kind]).astype(np.float32))
        return cls(*(torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays))


@dataclass(frozen=True)
class Place:
    """Which attention is taught; `shift` 1 is that of the step at which the target piece goes in."""

    layer: int  # from 0, or from the last one, as -1
    head: int
    shift: int


def guidance(attention: Tensor, guide: Guide, place: Place) -> Tensor:
    """The loss of all links, summed; `attention` is of all layers and heads, or of the place's alone."""
    layer = attention[place_of(place.layer, attention.shape[0])]
    head_STL = layer[:, min(place.head, layer.shape[1] - 1)]
    weight_N = head_STL[guide.sentence_N, guide.target_N + place.shift, guide.source_N]
    return -(weight_N.float().clamp(min=LEAST).log() * guide.share_N).sum()
