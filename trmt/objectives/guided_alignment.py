"""Guided alignment: the cross-entropy of one attention head with the links of words.

Chen et al. (arXiv 1607.01628) guide all of a recurrent network's attention, Garg et al. (arXiv 1909.02074)
one head of a Transformer's last layer but one, so that the others stay free. The loss of a target token with
links is the mean of -log weight over the source tokens it is linked to; other target tokens count for
nothing.

Axes: A layers, S sentence, H heads, T target position, L source position, N links of a batch in a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from trmt.devices.transfer import to_device
from trmt.nets.base import layer_index
from trmt.sets.shards import RaggedArray

COLUMN = "alignment"  # of prepared sets: for each pair source token, target token, source token, ...
SMALLEST = 1e-9  # weights count as at least this: one that a network cannot give would make the loss infinite


@dataclass(frozen=True)
class BatchLinks:
    """The links of a batch's tokens, and what each counts."""

    sentence_N: Tensor
    source_N: Tensor
    target_N: Tensor
    share_N: Tensor  # the links of a target token add up to 1

    @classmethod
    def of(cls, column: RaggedArray, device: torch.device) -> Self:
        """The links in a column of a prepared set."""
        links = column.values.astype(np.int64).reshape(-1, 2)
        sentence = np.repeat(np.arange(len(column.lengths)), column.lengths // 2)
        token = sentence * (int(links[:, 1].max(initial=0)) + 1) + links[:, 1]
        _, index, counts = np.unique(token, return_inverse=True, return_counts=True)
        arrays = (sentence, links[:, 0], links[:, 1], (1 / counts[index]).astype(np.float32))
        return cls(*(to_device(torch.from_numpy(np.ascontiguousarray(array)), device) for array in arrays))


@dataclass(frozen=True)
class GuidedHead:
    """The head that is guided; with a `shift` of 1, at the step at which the target token is the input."""

    layer: int  # from 0, or from the last one, as -1
    head: int
    shift: int


def alignment_loss(attention_ASHTL: Tensor, links: BatchLinks, guided: GuidedHead) -> Tensor:
    """The loss of all links, summed; `attention` is of all layers and heads, or of the guided one alone."""
    layer = attention_ASHTL[layer_index(guided.layer, attention_ASHTL.shape[0])]
    head_STL = layer[:, min(guided.head, layer.shape[1] - 1)]
    weight_N = head_STL[links.sentence_N, links.target_N + guided.shift, links.source_N]
    return -(weight_N.float().clamp(min=SMALLEST).log() * links.share_N).sum()
