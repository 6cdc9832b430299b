"""A forecast of what more training is expected to gain, from the validation scores so far.

Learning curves flatten, but not all in the same way. So many simple curves are fitted, powers of the step and
exponentials, each `a + b * basis(step)`, and weighted by their marginal likelihood (of a linear fit under
flat priors). The forecast is a mixture of Student distributions, whose spread contains both the noise of the
scores and the uncertainty about the curve.

No curve accounts for later changes: a learning rate that falls to zero at the end gains more than is
forecast here, overfitting less. So a fit has to pass two tests first: its residuals must not be
autocorrelated, as they are around a curve of another shape, and fitted without the latest scores, it must
have forecast them. Where the first scores spoil a fit, it is tried without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trmt import console
from trmt.training.history import LABELS, Point

Floats = NDArray[np.float64]

MIN_POINTS = 5  # validations that a forecast needs
EARLY = (0.15, 0.3, 0.5)  # shares of the steps to leave out: the beginning of training follows other curves
MIN_DURBIN_WATSON = 1.2  # statistic of autocorrelation; 2 where residuals are independent
EXACT = 0.003  # residuals below this share of the scores' range are never tested
# Exponents of 1 / step; 0 stands for the logarithm, and curves with exponents up to -1 do not flatten.
POWERS = np.arange(-2.0, 2.51, 0.05)
DECAYS = np.geomspace(0.15, 2.0, 50)  # of the exponentials, in units of the steps so far
INTERVAL = 0.8  # probability of the interval that is printed
HELD_OUT_INTERVAL = 0.8  # probability of the interval in which held-out scores have to lie
MAX_CHANGE = 1 / 3  # of the scores' range; a curve that may change more is not flattening yet
MAX_RISING = 0.2  # share of curves that do not flatten, above which nothing is forecast
AGE_EXPONENT = 0.5  # a score at half of the steps has a weight of 0.5 to this power
DRAWS = 4_000


@dataclass(frozen=True)
class Forecast:
    """The expected change of a metric, and the interval that contains it with a probability of 80 %."""

    gain: float
    low: float
    high: float


def describe_forecast(points: Sequence[Point], metric: str, *, last: int | None, seconds: float) -> str:
    """A sentence on the gain of more steps of so many seconds each; empty if the points allow no forecast."""
    if not points:
        return ""
    step = points[-1].step
    more = horizon(step, last)
    found = forecast([point.step for point in points], [point.value for point in points], more)
    if not found:
        return ""
    # The curves have no bound, but scores do: a curve that passes it is wrong.
    possible = points[-1].value if metric == "loss" else 100 - points[-1].value
    sign = -1 if metric == "loss" else 1
    if sign * found.gain > possible:
        return ""
    bounded = [sign * min(sign * value, possible) for value in (found.gain, found.low, found.high)]
    steps = f"the {more:,} steps to come" if step + more == last else f"{more:,} more steps"
    gain, low, high = (f"{value:+.{3 if metric == 'loss' else 1}f}" for value in bounded)
    return (
        f"{steps} ({console.duration(more * seconds)}) should bring about {gain} dev "
        f"{LABELS.get(metric, metric)} (80 %: {low} to {high})"
    )


def horizon(step: int, last: int | None) -> int:
    """How many steps to forecast: up to the end of the run, but at most as many as were taken so far.

    Without a known end it is a round number of up to half of them.
    """
    if last and step < last:
        return min(last - step, step)
    half = max(step // 2, 1)
    power = 10 ** (len(str(half)) - 1)
    return next(count * power for count in (5, 2, 1) if count * power <= half)


def forecast(steps: Sequence[int], values: Sequence[float], more: int) -> Forecast | None:
    """The change over `more` steps after the last; None if the values do not support a forecast."""
    all_steps, all_values = np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)
    usable = np.isfinite(all_values) & (all_steps > 0)
    all_steps, all_values = all_steps[usable], all_values[usable]
    if not len(all_steps) or more <= 0:
        return None
    for early in EARLY:
        recent = all_steps >= early * all_steps[-1]
        x, y = all_steps[recent], all_values[recent]
        if len(x) < MIN_POINTS or np.ptp(y) == 0:
            return None
        fit = _Fit(x, y)
        if fit.autocorrelated or fit.rising > MAX_RISING or not _passes_held_out(x, y):
            continue
        change = fit.change(x[-1], x[-1] + more)
        low, middle, high = np.quantile(change, [(1 - INTERVAL) / 2, 0.5, (1 + INTERVAL) / 2])
        if max(abs(low), abs(high)) > MAX_CHANGE * np.ptp(y):
            continue
        return Forecast(gain=float(middle), low=float(low), high=float(high))
    return None


def _passes_held_out(x: Floats, y: Floats) -> bool:
    """Whether fits to the earlier points forecast the mean of the last quarter, and of the last half."""
    quarter, half = max(len(x) // 4, 1), len(x) // 2
    return _forecasts_last(x, y, quarter) and (len(x) - half < MIN_POINTS or _forecasts_last(x, y, half))


def _forecasts_last(x: Floats, y: Floats, count: int) -> bool:
    fit = _Fit(x[:-count], y[:-count])
    curve = np.mean([fit.value(step) for step in x[-count:]], axis=0)
    interval = [(1 - HELD_OUT_INTERVAL) / 2, (1 + HELD_OUT_INTERVAL) / 2]
    low, high = np.quantile(curve + fit.noise() / np.sqrt(count), interval)
    return bool(low <= y[-count:].mean() <= high)


class _Fit:
    """Draws from the posterior distribution: a basis function, its coefficients and the noise in each draw.

    Older points have less weight, because the errors of a simple curve grow with the span that it covers.
    """

    def __init__(self, x: Floats, y: Floats) -> None:
        self.unit, self.random = x[-1], np.random.default_rng(0)
        weights = (x / self.unit) ** AGE_EXPONENT
        freedom = max(weights.sum() - 2, 1.0)
        mean = weights @ y / weights.sum()
        bases = _bases(x / self.unit)
        self.middle = bases @ weights / weights.sum()
        centred = bases - self.middle[:, None]
        # Scaled to the same spread over the points, so that flat priors on the slopes favour no basis.
        self.spread = np.sqrt(centred**2 @ weights / weights.sum())
        columns = centred / self.spread[:, None]
        slopes = columns @ (weights * (y - mean)) / weights.sum()
        misfit = (y - mean - slopes[:, None] * columns) ** 2 @ weights
        misfit += 1e-9 * np.ptp(y) ** 2  # points without any noise must not give certainty
        likelihood = np.exp(-freedom / 2 * np.log(misfit / misfit.min()))
        likelihood /= likelihood.sum()
        best = misfit.argmin()
        self.rising = float(likelihood[: np.count_nonzero(POWERS <= -0.999)].sum())
        self.autocorrelated = _is_autocorrelated(y - mean - slopes[best] * columns[best], np.ptp(y))
        self.basis = self.random.choice(len(bases), size=DRAWS, p=likelihood)
        self.deviation = np.sqrt(misfit[self.basis] / self.random.chisquare(freedom, DRAWS))
        error = self.deviation / np.sqrt(weights.sum())
        self.level = mean + error * self.random.standard_normal(DRAWS)
        self.slope = slopes[self.basis] + error * self.random.standard_normal(DRAWS)

    def _column(self, step: float) -> Floats:
        return ((_bases(np.array([step / self.unit]))[:, 0] - self.middle) / self.spread)[self.basis]

    def value(self, step: float) -> Floats:
        """The value of the curve at `step` in each draw."""
        return self.level + self.slope * self._column(step)

    def change(self, before: float, after: float) -> Floats:
        """The change of the curve between two steps in each draw."""
        return self.slope * (self._column(after) - self._column(before))

    def noise(self) -> Floats:
        """The deviation of one validation from the curve in each draw."""
        return self.deviation * self.random.standard_normal(DRAWS)


def _is_autocorrelated(residuals: Floats, value_range: float) -> bool:
    """Whether neighbouring residuals of the best fit are alike, as around a curve of another shape."""
    if np.sqrt(np.mean(residuals**2)) < EXACT * value_range:
        return False
    return bool((np.diff(residuals) ** 2).sum() < MIN_DURBIN_WATSON * (residuals**2).sum())


def _bases(time: Floats) -> Floats:
    """One row for each basis function: powers of the time, then exponentials."""
    powers = [np.log(time) if abs(power) < 1e-6 else time**-power for power in POWERS]
    return np.stack(powers + [np.exp(-time / decay) for decay in DECAYS])
