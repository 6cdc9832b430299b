"""Every registered ranker answers to these."""

from __future__ import annotations

import pytest

from trmt.decoding.base import Hypothesis, Ranker
from trmt.decoding.best import Best
from trmt.registry import RANKERS, resolve

SEVERAL = [Hypothesis((4, 5), -3.0, -1.5), Hypothesis((4,), -1.2, -1.2), Hypothesis((), -9.0, -9.0)]


@pytest.fixture(params=RANKERS)
def ranker(request: pytest.FixtureRequest) -> Ranker:
    return resolve(RANKERS, request.param)()


def test_it_picks_one_of_those_it_was_given(ranker: Ranker) -> None:
    assert ranker.pick(SEVERAL) in SEVERAL
    assert ranker.pick(SEVERAL[:1]) == SEVERAL[0]


def test_of_identical_candidates_it_picks_that_candidate(ranker: Ranker) -> None:
    assert ranker.pick([SEVERAL[0]] * 5) == SEVERAL[0]


def test_the_best_is_by_normalised_score_and_the_first_of_equals() -> None:
    assert Best().pick(SEVERAL) == SEVERAL[1]
    equal = [Hypothesis((4,), -1.0, -1.0), Hypothesis((5,), -1.0, -1.0)]
    assert Best().pick(equal) == equal[0]
