"""Subword sampling of batches: the same text in other pieces, drawn anew for each step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trmt.sets.batches import Column
from trmt.text.tokenizer import Tokenizer


def resample_with(tokenizer: Tokenizer, alpha: float, longest: int) -> Callable[[str, Column, int], Column]:
    """Subword sampling as a transform of batches; a draw of more than `longest` pieces is not taken."""

    def resample(name: str, column: Column, seed: int) -> Column:
        side = tokenizer.source if name.startswith("source") else tokenizer.target
        before = Column(column.ids.astype(np.int64), column.lengths.astype(np.int64))
        after = Column(*side.sampler(alpha).draw(*before, seed=seed))
        return longer_ones_as_before(before, after, longest)

    return resample


def longer_ones_as_before(before: Column, after: Column, longest: int) -> Column:
    """`after`, but with the sentences of `before` where those of `after` have more than `longest` pieces."""
    if not (after.lengths > longest).any():
        return after
    parts = [np.split(column.ids, np.cumsum(column.lengths)[:-1]) for column in (before, after)]
    taken = [new if len(new) <= longest else old for old, new in zip(*parts, strict=True)]
    return Column(np.concatenate(taken), np.array(list(map(len, taken)), dtype=np.int64))
