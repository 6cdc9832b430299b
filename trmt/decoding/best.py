"""The ranker that trusts the search."""

from __future__ import annotations

from collections.abc import Sequence

from trmt.decoding.base import Hypothesis, Ranker


class Best(Ranker):
    """The hypothesis with the highest normalised score."""

    def pick(self, hypotheses: Sequence[Hypothesis]) -> Hypothesis:
        return max(hypotheses, key=lambda hypothesis: hypothesis.normalised)
