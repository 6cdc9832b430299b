"""Translation: predict each target token from the source and the tokens before it.

Axes: N all target tokens of a batch in a row, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trmt.devices.transfer import to_device
from trmt.errors import ConfigError
from trmt.nets.base import NO_WEIGHTS, Output, Seq2Seq, WantedWeights
from trmt.nets.ragged import Ragged, Source
from trmt.objectives.base import Loss, Objective, Specials
from trmt.objectives.cross_entropy import SmoothedCrossEntropy, smoothed_cross_entropy
from trmt.objectives.guided_alignment import COLUMN, BatchLinks, GuidedHead, alignment_loss
from trmt.sets.batches import Batches, BatchShape, RaggedBatch
from trmt.sets.shards import RaggedArray

PADDING = -1  # a target that counts for nothing


@dataclass(frozen=True, kw_only=True)
class TranslationConfig:
    """The options of the translation loss."""

    label_smoothing: float = 0.1  # the share of probability that is spread evenly over the vocabulary
    alignment_weight: float = (
        0.0  # of the guided alignment loss, for sets prepared with --alignments; 0 is off
    )
    alignment_layer: int = -2  # whose cross-attention is guided: from 1, or from the last one, which is -1
    alignment_head: int = 1  # which head of it is guided, from 1
    alignment_shift: bool = False  # guide the attention one step later, when the target token is the input

    def __post_init__(self) -> None:
        if self.alignment_weight < 0 or self.alignment_layer == 0 or self.alignment_head < 1:
            raise ConfigError(
                "loss.alignment_weight is at least 0, loss.alignment_head at least 1, and "
                "loss.alignment_layer counts from 1, or from the last one, which is -1"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"loss.label_smoothing = {self.label_smoothing} is out of range; set it from 0 to below 1"
            )


@dataclass(frozen=True)
class TranslationBatch:
    """A batch as tensors: the target twice, shifted by one."""

    source: Source
    before: Ragged  # the decoder's input, which begins with bos
    after_N: Tensor  # the tokens to predict, which end with eos; PADDING where the batch was filled up
    tokens: int  # without padding
    links: BatchLinks | None = None  # of words, if attention is guided by them


class TranslationObjective(Objective):
    """Label-smoothed cross-entropy of the target."""

    config_class = TranslationConfig

    def __init__(self, config: TranslationConfig, specials: Specials) -> None:
        self.config, self.specials = config, specials
        layer = config.alignment_layer
        self.head = GuidedHead(layer - (layer > 0), config.alignment_head - 1, int(config.alignment_shift))

    @classmethod
    def batches(cls, config: Any) -> Callable[..., Batches]:
        return partial(Batches, extra_columns=(COLUMN,)) if config.alignment_weight else Batches

    def told(self) -> dict[str, Any]:
        return {COLUMN: vars(self.head)} if self.config.alignment_weight else {}

    def tokens(self, examples: RaggedBatch) -> int:
        column = examples.columns["target.ids"]
        return int(column.lengths.sum()) + len(column.lengths)  # each sentence ends with eos

    def collate(
        self, examples: RaggedBatch, device: torch.device, *, shape: BatchShape | None = None
    ) -> TranslationBatch:
        source, target = examples.columns["source.ids"], examples.columns["target.ids"]
        ends = np.cumsum(target.lengths)
        before = _inserted(target, ends - target.lengths, self.specials.bos)
        after = _inserted(target, ends, self.specials.eos)
        source = _inserted(source, np.cumsum(source.lengths), self.specials.eos)
        tokens = len(after.values)
        longest = None
        if shape and (filler := _filler(source, before, shape)):
            source, before = (_filled(column, filler[n], 0) for n, column in enumerate((source, before)))
            after = _filled(after, filler[1], PADDING)
            longest = shape.max_length
        return TranslationBatch(
            Source(*_tensors(source, device, longest)),
            Ragged(*_tensors(before, device, longest)),
            _moved(after.values, device),
            tokens,
            BatchLinks.of(examples.columns[COLUMN], device) if COLUMN in examples.columns else None,
        )

    def loss(self, net: Seq2Seq, batch: TranslationBatch) -> Loss:
        want = NO_WEIGHTS
        if batch.links is not None:
            want = WantedWeights(cross=True, layer=self.head.layer, head=self.head.head)
        output = net(batch.source, batch.before, want=want)
        total, nll = self.distance(net, output.hidden, batch.after_N)
        total = total + sum(output.aux.values())
        if batch.links is not None:
            total = total + self.config.alignment_weight * self._alignment_loss(output, batch.links)
        return Loss(total, nll.detach(), batch.tokens)

    def _alignment_loss(self, output: Output, links: BatchLinks) -> Tensor:
        if output.cross_attention is None:
            raise ConfigError(
                "loss.alignment_weight guides cross-attention, and this network has none; set it to 0 or "
                "choose another architecture"
            )
        return alignment_loss(output.cross_attention, links, self.head)

    def distance(self, net: Seq2Seq, hidden_ND: Tensor, after_N: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the negative log likelihood, two sums over tokens; other objectives replace it."""
        weight_VD, smoothing = net.readout_matrix(), self.config.label_smoothing
        if weight_VD is not None:
            return smoothed_cross_entropy(hidden_ND, weight_VD, after_N, smoothing)
        smoothed: Any = SmoothedCrossEntropy.apply  # torch leaves it untyped
        total, nll = smoothed(net.readout(hidden_ND).float(), after_N, smoothing)
        return total, nll


def _inserted(column: RaggedArray, places: np.ndarray, token: int) -> RaggedArray:
    """Every sentence one longer, with `token` at the given places of the row."""
    return RaggedArray(np.insert(column.values.astype(np.int64), places, token), column.lengths + 1)


def _filler(source: RaggedArray, target: RaggedArray, shape: BatchShape) -> list[np.ndarray] | None:
    """The lengths of the padding sentences of each side, as many on both; None if the batch does not fit."""
    count = shape.sentences - len(source.lengths)
    missing = [shape.source_tokens - len(source.values), shape.target_tokens - len(target.values)]
    longest = max(int(source.lengths.max()), int(target.lengths.max()))
    if count < 1 or min(missing) < 0 or max(missing) > count * shape.max_length or longest > shape.max_length:
        return None
    return [(np.arange(count) + rows) // count for rows in missing]


def _filled(column: RaggedArray, lengths: np.ndarray, token: int) -> RaggedArray:
    ids = np.concatenate([column.values, np.full(int(lengths.sum()), token, np.int64)])
    return RaggedArray(ids, np.concatenate([column.lengths, lengths]))


def _tensors(column: RaggedArray, device: torch.device, longest: int | None) -> tuple[Tensor, Tensor, int]:
    lengths = column.lengths.astype(np.int64)
    return _moved(column.values, device), _moved(lengths, device), longest or int(lengths.max())


def _moved(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on a device, copied there while the host goes on."""
    return to_device(torch.from_numpy(array), device)
