"""Subword sampling of batches: another segmentation of the same text at each step."""

from __future__ import annotations

import numpy as np

from trmt.sets.batches import Resample
from trmt.sets.shards import RaggedArray
from trmt.text.tokenizer import Tokenizer


def subword_resampler(tokenizer: Tokenizer, alpha: float, max_length: int) -> Resample:
    """The `resample` argument of `Batches`; a sentence is not resampled to more than `max_length` pieces."""

    def resample(name: str, column: RaggedArray, seed: int) -> RaggedArray:
        side = tokenizer.source if name.startswith("source") else tokenizer.target
        before = RaggedArray(column.values.astype(np.int64), column.lengths.astype(np.int64))
        after = RaggedArray(*side.sampler(alpha).draw(*before, seed=seed))
        return _within_length(before, after, max_length)

    return resample


def _within_length(before: RaggedArray, after: RaggedArray, max_length: int) -> RaggedArray:
    """`after`, but with the sentence of `before` where that of `after` is longer than `max_length`."""
    if not (after.lengths > max_length).any():
        return after
    pairs = zip(before.split(), after.split(), strict=True)
    chosen = [new if len(new) <= max_length else old for old, new in pairs]
    return RaggedArray(np.concatenate(chosen), np.array(list(map(len, chosen)), dtype=np.int64))
