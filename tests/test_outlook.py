from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from trmt.training.history import Point
from trmt.training.outlook import Outlook, expect, foresee, horizon

Law = Callable[[float], float]


def saturating(power: float) -> Law:
    return lambda step: 50 - 30 * (step / 1000) ** -power


def decaying(span: float) -> Law:
    return lambda step: 50 - 30 * float(np.exp(-step / span))


def seen(law: Law, *, count: int, noise: float, seed: int) -> tuple[list[int], list[float]]:
    steps = [1000 * number for number in range(1, count + 1)]
    drawn = np.random.default_rng(seed).standard_normal(count)
    return steps, [law(step) + noise * error for step, error in zip(steps, drawn, strict=True)]


def forecasts(law: Law, *, count: int, noise: float, seeds: int = 40) -> tuple[list[Outlook], float]:
    """What is foreseen for half as many steps again, and the true change."""
    last, more = 1000 * count, 500 * count
    found = [expect(*seen(law, count=count, noise=noise, seed=seed), more) for seed in range(seeds)]
    return [outlook for outlook in found if outlook], law(last + more) - law(last)


@pytest.mark.parametrize("count", [6, 16])
@pytest.mark.parametrize("law", [saturating(0.3), saturating(0.5), saturating(1.0), decaying(4000)])
@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(law: Law, count: int, noise: float) -> None:
    found, truth = forecasts(law, count=count, noise=noise)
    assert len(found) >= 8, "curves that follow a law are spoken about"
    covered = sum(outlook.low <= truth <= outlook.high for outlook in found) / len(found)
    # 80 % is meant; few points make it careful, and 40 seeds scatter by 6 %.
    assert covered >= 0.68


def test_more_points_make_it_surer() -> None:
    widths = [
        np.mean([outlook.high - outlook.low for outlook in forecasts(saturating(0.5), count=n, noise=0.1)[0]])
        for n in (6, 10, 20)
    ]
    assert widths[0] > 1.5 * widths[1] > 1.5 * 1.5 * widths[2]


def test_a_curve_without_noise_is_foretold_and_losses_fall() -> None:
    steps, values = seen(lambda step: 2 + 3 * (step / 1000) ** -0.7, count=15, noise=0, seed=0)
    found = expect(steps, values, 5000)
    assert found is not None
    truth = 3 * (20**-0.7 - 15**-0.7)
    assert found.gain == pytest.approx(truth, rel=0.02)
    assert found.low <= truth <= found.high < 0


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scale", [0.001, 1000])
def test_units_do_not_matter(sign: int, scale: float) -> None:
    steps, values = seen(saturating(0.5), count=12, noise=0.2, seed=3)
    plain = expect(steps, values, 4000)
    scaled = expect([10 * step for step in steps], [sign * scale * value for value in values], 40_000)
    assert plain and scaled
    edges = sorted([sign * scale * plain.low, sign * scale * plain.high])
    assert [scaled.low, scaled.high] == pytest.approx(edges, rel=0.05)


# Silence


def test_few_points_say_nothing() -> None:
    steps, values = seen(saturating(0.5), count=4, noise=0, seed=0)
    assert expect(steps, values, 1000) is None
    assert expect([], [], 1000) is None
    assert foresee([], "chrf", last=None, pace=1.0) == ""


def test_early_points_do_not_count() -> None:
    steps, values = seen(saturating(0.5), count=4, noise=0, seed=0)
    assert expect([1, 2, 3, *steps], [0.1, 0.2, 0.3, *values], 1000) is None


def test_a_curve_that_still_rises_faster_says_nothing() -> None:
    def rising(step: float) -> float:
        return 50 / (1 + float(np.exp(-(step - 12_000) / 1500)))

    for seed in range(20):
        assert expect(*seen(rising, count=10, noise=0.2, seed=seed), 5000) is None


def test_a_curve_that_has_turned_says_nothing() -> None:
    def turning(step: float) -> float:
        return 40 - 30 / (step / 1000) - 0.02 * (step / 1000) ** 2

    for seed in range(20):
        assert expect(*seen(turning, count=20, noise=0.2, seed=seed), 10_000) is None


def test_noise_alone_promises_nothing() -> None:
    found = [expect(*seen(lambda step: 30.0, count=8, noise=1, seed=seed), 4000) for seed in range(60)]
    spoken = [outlook for outlook in found if outlook]
    assert sum(outlook.low > 0 for outlook in spoken) <= 6  # of 60, a tenth by chance


def test_values_that_are_no_numbers_are_left_out() -> None:
    steps, values = seen(saturating(0.5), count=10, noise=0.1, seed=1)
    broken = [float("nan"), float("inf")]
    assert expect([500, 700, *steps], [*broken, *values], 2000) == expect(steps, values, 2000)
    assert expect(steps, [30.0] * 10, 2000) is None


# Words


@pytest.mark.parametrize(
    ("step", "last", "expected"),
    [
        (1000, None, 500),
        (10_000, 12_000, 2000),
        (10_000, 100_000, 10_000),
        (10_000, 10_000, 5000),
        (9000, 9000, 2000),
        (1, None, 1),
        (90_000, None, 20_000),
    ],
)
def test_it_looks_to_the_end_but_never_too_far(step: int, last: int | None, expected: int) -> None:
    assert horizon(step, last) == expected


def test_the_sentence() -> None:
    steps, values = seen(saturating(0.5), count=10, noise=0.05, seed=2)
    points = [Point(step, value) for step, value in zip(steps, values, strict=True)]
    said = foresee(points, "chrf", last=12_000, pace=0.3)
    assert said.startswith("the 2,000 steps to come (10 min 00 s) should bring about +0.")
    assert "dev chrF (80 %: +0." in said
    assert foresee(points, "chrf", last=10_000, pace=0.3).startswith("5,000 more steps (25 min 00 s)")


def test_no_more_is_promised_than_there_is() -> None:
    def points(top: float) -> list[Point]:
        steps, values = seen(lambda step: top - 30 * (step / 1000) ** -0.5, count=16, noise=0.1, seed=3)
        return [Point(step, value) for step, value in zip(steps, values, strict=True)]

    def high(said: str) -> float:
        return float(said.rpartition(" ")[2].rstrip(")"))

    free, bounded = points(90), points(105.3)
    assert high(foresee(free, "chrf", last=32_000, pace=0.3)) > 2.0
    assert high(foresee(bounded, "chrf", last=32_000, pace=0.3)) <= 100 - bounded[-1].value + 0.05
    assert foresee(points(107.4), "chrf", last=32_000, pace=0.3) == ""


def test_points_in_any_places_are_borne() -> None:
    chooser = np.random.default_rng(0)
    for _ in range(200):
        steps = np.unique(chooser.integers(1, 10 ** chooser.integers(1, 7), chooser.integers(1, 12))).tolist()
        values = chooser.choice([0.0, 1.0, 1e9, np.nan, -3.5], len(steps)).tolist()
        found = expect(steps, values, int(chooser.integers(0, 1000)))
        assert found is None or found.low <= found.gain <= found.high
