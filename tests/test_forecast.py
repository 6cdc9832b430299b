from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from trmt.training.forecast import Forecast, describe_forecast, forecast, horizon
from trmt.training.history import Point

Curve = Callable[[float], float]


def saturating(power: float) -> Curve:
    return lambda step: 50 - 30 * (step / 1000) ** -power


def decaying(span: float) -> Curve:
    return lambda step: 50 - 30 * float(np.exp(-step / span))


def observed(curve: Curve, *, count: int, noise: float, seed: int) -> tuple[list[int], list[float]]:
    steps = [1000 * number for number in range(1, count + 1)]
    drawn = np.random.default_rng(seed).standard_normal(count)
    return steps, [curve(step) + noise * error for step, error in zip(steps, drawn, strict=True)]


def forecasts(curve: Curve, *, count: int, noise: float, seeds: int = 40) -> tuple[list[Forecast], float]:
    """The forecasts for half as many steps again, and the true change."""
    last, more = 1000 * count, 500 * count
    found = [forecast(*observed(curve, count=count, noise=noise, seed=seed), more) for seed in range(seeds)]
    return [each for each in found if each], curve(last + more) - curve(last)


@pytest.mark.parametrize("count", [6, 16])
@pytest.mark.parametrize("curve", [saturating(0.3), saturating(0.5), saturating(1.0), decaying(4000)])
@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_the_interval_contains_the_truth_about_as_often_as_it_says(
    curve: Curve, count: int, noise: float
) -> None:
    found, truth = forecasts(curve, count=count, noise=noise)
    assert len(found) >= 8, "simple curves are forecast"
    covered = sum(each.low <= truth <= each.high for each in found) / len(found)
    # The interval is for 80 %; the standard deviation of 40 seeds is 6 %.
    assert covered >= 0.68


def test_more_points_narrow_the_interval() -> None:
    widths = [
        np.mean([each.high - each.low for each in forecasts(saturating(0.5), count=n, noise=0.1)[0]])
        for n in (6, 10, 20)
    ]
    assert widths[0] > 1.5 * widths[1] > 1.5 * 1.5 * widths[2]


def test_a_curve_without_noise_is_forecast_exactly() -> None:
    steps, values = observed(lambda step: 2 + 3 * (step / 1000) ** -0.7, count=15, noise=0, seed=0)
    found = forecast(steps, values, 5000)
    assert found is not None
    truth = 3 * (20**-0.7 - 15**-0.7)
    assert found.gain == pytest.approx(truth, rel=0.02)
    assert found.low <= truth <= found.high < 0


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("scale", [0.001, 1000])
def test_units_do_not_matter(sign: int, scale: float) -> None:
    steps, values = observed(saturating(0.5), count=12, noise=0.2, seed=3)
    plain = forecast(steps, values, 4000)
    scaled = forecast([10 * step for step in steps], [sign * scale * value for value in values], 40_000)
    assert plain and scaled
    edges = sorted([sign * scale * plain.low, sign * scale * plain.high])
    assert [scaled.low, scaled.high] == pytest.approx(edges, rel=0.05)


# No forecast


def test_few_points_give_no_forecast() -> None:
    steps, values = observed(saturating(0.5), count=4, noise=0, seed=0)
    assert forecast(steps, values, 1000) is None
    assert forecast([], [], 1000) is None
    assert describe_forecast([], "chrf", last=None, seconds=1.0) == ""


def test_early_points_do_not_count() -> None:
    steps, values = observed(saturating(0.5), count=4, noise=0, seed=0)
    assert forecast([1, 2, 3, *steps], [0.1, 0.2, 0.3, *values], 1000) is None


def test_a_curve_that_rises_ever_faster_gives_no_forecast() -> None:
    def rising(step: float) -> float:
        return 50 / (1 + float(np.exp(-(step - 12_000) / 1500)))

    for seed in range(20):
        assert forecast(*observed(rising, count=10, noise=0.2, seed=seed), 5000) is None


def test_a_curve_that_has_turned_gives_no_forecast() -> None:
    def turning(step: float) -> float:
        return 40 - 30 / (step / 1000) - 0.02 * (step / 1000) ** 2

    for seed in range(20):
        assert forecast(*observed(turning, count=20, noise=0.2, seed=seed), 10_000) is None


def test_noise_alone_gives_no_forecast_of_a_gain() -> None:
    found = [forecast(*observed(lambda step: 30.0, count=8, noise=1, seed=seed), 4000) for seed in range(60)]
    given = [each for each in found if each]
    assert sum(each.low > 0 for each in given) <= 6  # of 60, a tenth by chance


def test_values_that_are_not_finite_are_ignored() -> None:
    steps, values = observed(saturating(0.5), count=10, noise=0.1, seed=1)
    broken = [float("nan"), float("inf")]
    assert forecast([500, 700, *steps], [*broken, *values], 2000) == forecast(steps, values, 2000)
    assert forecast(steps, [30.0] * 10, 2000) is None


# The sentence


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
def test_the_horizon_is_the_end_but_never_too_far(step: int, last: int | None, expected: int) -> None:
    assert horizon(step, last) == expected


def test_the_sentence() -> None:
    steps, values = observed(saturating(0.5), count=10, noise=0.05, seed=2)
    points = [Point(step, value) for step, value in zip(steps, values, strict=True)]
    text = describe_forecast(points, "chrf", last=12_000, seconds=0.3)
    assert text.startswith("the 2,000 steps to come (10 min 00 s) should bring about +0.")
    assert "dev chrF (80 %: +0." in text
    assert describe_forecast(points, "chrf", last=10_000, seconds=0.3).startswith(
        "5,000 more steps (25 min 00 s)"
    )


def test_a_forecast_does_not_exceed_the_best_possible_score() -> None:
    def points(top: float) -> list[Point]:
        steps, values = observed(lambda step: top - 30 * (step / 1000) ** -0.5, count=16, noise=0.1, seed=3)
        return [Point(step, value) for step, value in zip(steps, values, strict=True)]

    def high(text: str) -> float:
        return float(text.rpartition(" ")[2].rstrip(")"))

    free, bounded = points(90), points(105.3)
    assert high(describe_forecast(free, "chrf", last=32_000, seconds=0.3)) > 2.0
    assert (
        high(describe_forecast(bounded, "chrf", last=32_000, seconds=0.3)) <= 100 - bounded[-1].value + 0.05
    )
    assert describe_forecast(points(107.4), "chrf", last=32_000, seconds=0.3) == ""


def test_any_points_are_accepted() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        steps = np.unique(
            generator.integers(1, 10 ** generator.integers(1, 7), generator.integers(1, 12))
        ).tolist()
        values = generator.choice([0.0, 1.0, 1e9, np.nan, -3.5], len(steps)).tolist()
        found = forecast(steps, values, int(generator.integers(0, 1000)))
        assert found is None or found.low <= found.gain <= found.high
