"""Denoising of whole passages (BART, arXiv 1910.13461): predict a text from a corrupted copy of it.

Spans of tokens, whose lengths follow a Poisson distribution, are replaced by one mask each, so that the
network has to infer how much is missing; an empty span is a mask that replaces nothing. Sentences are
shuffled. The mask is the unknown token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trmt.errors import ConfigError
from trmt.objectives.translation import TranslationBatch, TranslationConfig, TranslationObjective
from trmt.sets.batches import Batches, BatchShape, RaggedBatch
from trmt.sets.passages import Passages
from trmt.sets.shards import RaggedArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig(TranslationConfig):
    """The options of the noise; the defaults are the paper's."""

    label_smoothing: float = 0.1
    rate: float = 0.3  # share of the tokens that are masked
    span: float = 3.0  # mean length of a span in tokens
    shuffle: bool = True  # whether sentences are shuffled

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alignment_weight:
            raise ConfigError(
                "loss.alignment_weight needs word alignments, which denoising has not; set it to 0"
            )
        if not 0 <= self.rate < 1:
            raise ConfigError(f"loss.rate = {self.rate} is out of range; set it from 0 to below 1")
        if not 0.1 <= self.span < 1000:
            raise ConfigError(f"loss.span = {self.span} is out of range; set it from 0.1 to below 1000")
        if not self.rate and not self.shuffle:
            raise ConfigError("loss.rate = 0 and loss.shuffle = false leave nothing to denoise; change one")


class Denoising(TranslationObjective):
    """The passage is the target, and a corrupted copy of it the source."""

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
        corrupted = [
            self.corrupt(text, lengths, int(key))
            for text, lengths, key in zip(texts, sentences, keys.values, strict=True)
        ]
        source = RaggedArray(np.concatenate(corrupted), np.array([len(text) for text in corrupted], np.int64))
        return super().collate(RaggedBatch({"source.ids": source, "target.ids": column}), device, shape=shape)

    def corrupt(self, text: Ints, sizes: Ints, key: int) -> Ints:
        """A passage of sentences of these sizes with noise, which depends on `key` alone."""
        generator = np.random.default_rng(key)
        if self.config.shuffle:
            sentences = np.split(text, np.cumsum(sizes)[:-1])
            text = np.concatenate([sentences[index] for index in generator.permutation(len(sentences))])
        return mask_spans(text, self.config.rate, self.config.span, self.specials.unk, generator)


def mask_spans(text: Ints, rate: float, mean: float, mask: int, generator: np.random.Generator) -> Ints:
    """`text` with spans replaced by `mask`, which cover a share `rate` of it and do not touch each other."""
    masked = round(rate * len(text))
    spans: list[int] = []
    while (left := masked - sum(spans)) > 0:
        span = min(int(generator.poisson(mean)), left)
        if span or len(spans) < masked:  # so that no text becomes longer
            spans.append(span)
    kept = len(text) - masked
    # A span is inserted before one of the tokens that are kept or at the end, no two at the same point.
    if len(spans) > kept + 1:
        spans = [*spans[:kept], sum(spans[kept:])]
    points = np.sort(generator.choice(kept + 1, len(spans), replace=False))
    pieces: list[Ints] = []
    begin = removed = 0
    for point, span in zip(points.tolist(), spans, strict=True):
        end = point + removed
        pieces += [text[begin:end], np.array([mask], np.int64)]
        begin, removed = end + span, removed + span
    return np.concatenate([*pieces, text[begin:]])
