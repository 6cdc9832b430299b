"""Denoising of whole passages (BART, arXiv 1910.13461): write a text from what little is left of it.

Spans of pieces, as long as a Poisson distribution draws them, are replaced by a single mask each, so that
the network has to tell how much is missing; a span of nothing is a mask that stands for nothing. Sentences
come in another order. The mask is the unknown piece.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trmt.errors import ConfigError
from trmt.objectives.translation import Translation, TranslationBatch, TranslationConfig
from trmt.sets.batches import Batches, BatchShape, RaggedBatch
from trmt.sets.passages import Passages
from trmt.sets.shards import RaggedArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig(TranslationConfig):
    """The options of the noise; the defaults are the paper's."""

    label_smoothing: float = 0.1
    rate: float = 0.3  # of the pieces that are masked
    span: float = 3.0  # pieces that a mask stands for, on average
    shuffle: bool = True  # whether sentences come in another order

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alignment_weight:
            raise ConfigError(
                "loss.alignment_weight is of links of words, and denoising has none; set it to 0"
            )
        if not 0 <= self.rate < 1:
            raise ConfigError(f"loss.rate = {self.rate} is out of range; set it from 0 to below 1")
        if not 0.1 <= self.span < 1000:
            raise ConfigError(f"loss.span = {self.span} is out of range; set it from 0.1 to below 1000")
        if not self.rate and not self.shuffle:
            raise ConfigError("loss.rate = 0 and loss.shuffle = false leave nothing to denoise; change one")


class Denoising(Translation):
    """The passage is the target, and what noise has made of it the source."""

    config_class = DenoisingConfig
    config: DenoisingConfig

    @classmethod
    def batches(cls, config: DenoisingConfig) -> Callable[..., Batches]:
        return Passages

    def tokens(self, examples: RaggedBatch) -> int:
        column = examples.columns["first.ids"]
        return len(column.values) + len(column.lengths)

    def collate(
        self, examples: RaggedBatch, device: torch.device, *, shape: BatchShape | None = None
    ) -> TranslationBatch:
        column, sizes, keys = (examples.columns[name] for name in ("first.ids", "sizes", "key"))
        texts = np.split(column.values.astype(np.int64), np.cumsum(column.lengths)[:-1])
        sentences = np.split(sizes.values, np.cumsum(sizes.lengths)[:-1])
        noised = [
            self.noised(text, cuts, int(key))
            for text, cuts, key in zip(texts, sentences, keys.values, strict=True)
        ]
        source = RaggedArray(np.concatenate(noised), np.array([len(text) for text in noised], np.int64))
        return super().collate(RaggedBatch({"source.ids": source, "target.ids": column}), device, shape=shape)

    def noised(self, text: Ints, sizes: Ints, key: int) -> Ints:
        """A passage of sentences of these sizes after the noise that belongs to `key`."""
        generator = np.random.default_rng(key)
        if self.config.shuffle:
            parts = np.split(text, np.cumsum(sizes)[:-1])
            text = np.concatenate([parts[place] for place in generator.permutation(len(parts))])
        return infilled(text, self.config.rate, self.config.span, self.specials.unk, generator)


def infilled(text: Ints, rate: float, mean: float, mask: int, generator: np.random.Generator) -> Ints:
    """`text` with spans replaced by `mask`, which cover `rate` of it and lie apart from each other."""
    wanted = round(rate * len(text))
    spans: list[int] = []
    while (left := wanted - sum(spans)) > 0:
        span = min(int(generator.poisson(mean)), left)
        if span or len(spans) < wanted:  # so that noise makes no text longer
            spans.append(span)
    kept = len(text) - wanted
    # A span lies before one of the kept pieces or at the end; two never touch, as far as there is room.
    if len(spans) > kept + 1:
        spans = _merged(spans, kept + 1)
    gaps = np.sort(generator.choice(kept + 1, len(spans), replace=False))
    pieces: list[Ints] = []
    begin = taken = 0
    for gap, span in zip(gaps.tolist(), spans, strict=True):
        at = gap + taken
        pieces += [text[begin:at], np.array([mask], np.int64)]
        begin, taken = at + span, taken + span
    return np.concatenate([*pieces, text[begin:]])


def _merged(spans: list[int], count: int) -> list[int]:
    """As many spans as there is room for, the last of which takes what the others leave."""
    return [*spans[: count - 1], sum(spans[count - 1 :])]
