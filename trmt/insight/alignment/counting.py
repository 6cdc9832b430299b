"""Links by counting: what pieces stood beside each other in many pairs, and where in the sentence they are.

The probabilities are those of Model 1 (aligning.py). What it cannot know, where a piece stands, is added
when links are chosen, as in fast_align (Dyer et al. 2013): links along the diagonal are more probable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trmt.insight.alignment.aligning import Ids, model_one, sample
from trmt.sets.shards import Split
from trmt.text.tokenizer import Tokenizer

CELLS = 1 << 25  # of the sample that is counted; memory is about 60 bytes for each
ITERATIONS = 5
FROM_NOTHING = 0.08  # probability that a piece translates none
TENSION = 4.0  # how much the diagonal is preferred
UNSEEN = 1e-9  # probability of pieces that never stood beside each other


@dataclass(frozen=True)
class Counts:
    """How probable each target piece is beside a source piece, in one direction."""

    keys: Ids  # source * vocabulary + target, ascending
    values: NDArray[np.float64]
    nothing: int  # the source piece that stands for none
    vocabulary: int  # of the target

    @classmethod
    def learned(
        cls, split: Split, tokenizer: Tokenizer, *, backward: bool = False, most: int = CELLS
    ) -> Counts:
        """Those of a prepared set; `backward` takes the target for what is translated from."""
        sizes = tokenizer.source.vocabulary, tokenizer.target.vocabulary
        if backward:
            sizes, sides = sizes[::-1], ("target", "source")
        else:
            sides = ("source", "target")
        counted = sample(split, vocabularies=sizes, most=most, sides=sides)
        found = model_one(counted, target_vocabulary=sizes[1], iterations=ITERATIONS)
        return cls(counted.keys, found.value, sizes[0], sizes[1])

    def probability(self, source: Ids, target: Ids) -> NDArray[np.float64]:
        """Of each target piece beside each source piece: [target, source]."""
        wanted = source[None, :] * self.vocabulary + target[:, None]
        place = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return np.where(self.keys[place] == wanted, self.values[place], UNSEEN)

    def chosen(self, source: Sequence[int], target: Sequence[int]) -> list[int]:
        """For each target piece the place of the source piece that it most probably translates; -1: none."""
        ids = np.array(source, np.int64), np.array(target, np.int64)
        weighed = (1 - FROM_NOTHING) * _diagonal(len(source), len(target)) * self.probability(*ids)
        alone = FROM_NOTHING * self.probability(np.array([self.nothing]), ids[1])[:, 0]
        best = weighed.argmax(1)
        return np.where(weighed.max(1) >= alone, best, -1).tolist()


def _diagonal(source: int, target: int) -> NDArray[np.float64]:
    """The probability of each source place for each target place, before anything is known of the pieces."""
    places = [(np.arange(count) + 0.5) / count for count in (source, target)]
    weight = np.exp(-TENSION * np.abs(places[0][None, :] - places[1][:, None]))
    return weight / weight.sum(1, keepdims=True)
