"""What more training is expected to bring, from the validations so far.

Learning curves flatten. How they do is not known, so many simple laws are fitted, powers of the step and
exponentials, each `a + b * law(step)`, and each counts for as much as the points speak for it (the marginal
likelihood of a linear fit under flat priors). What they foresee together is a mixture of Student
distributions, whose spread holds both the noise of the points and the doubt about the law.

No law knows of what changes on the way: a learning rate that falls to zero at the end brings more than is
foreseen here, overfitting less. So the fit has to prove itself first: its errors must not look like those
around a curve of another shape, and made without the latest points, it must have foreseen them. Where the
first points spoil that, it is tried without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trmt import console
from trmt.training.history import LABELS, Point

Floats = NDArray[np.float64]

FEWEST = 5  # validations, below which nothing is said
EARLY = (0.15, 0.3, 0.5)  # of the steps, left out: where training begins, curves follow other laws
ALIKE = 1.2  # of the Durbin-Watson statistic, which is 2 where errors are independent
EXACT = 0.003  # of what the points span: errors that matter to nobody
# Of one over the step; 0 is its logarithm, and what is not above -1 does not flatten.
POWERS = np.arange(-2.0, 2.51, 0.05)
DECAYS = np.geomspace(0.15, 2.0, 50)  # in units of the steps so far
LEVEL = 0.8  # of the interval
PROOF = 0.8  # the interval in which held-out points have to lie
MOST = 1 / 3  # of what the points have gone through: a curve that may go further is not flattening yet
STEEP = 0.2  # the share of laws that do not flatten above which nothing is said
AGE = 0.5  # a point of half the age of the run counts as this power of a half
DRAWS = 4_000


@dataclass(frozen=True)
class Outlook:
    """The expected change of a metric, and the interval that holds it 4 times in 5."""

    gain: float
    low: float
    high: float


def foresee(points: Sequence[Point], metric: str, *, last: int | None, pace: float) -> str:
    """A sentence on what more steps of `pace` seconds would bring; none if the points say too little."""
    if not points:
        return ""
    step = points[-1].step
    more = horizon(step, last)
    found = expect([point.step for point in points], [point.value for point in points], more)
    if not found:
        return ""
    # Laws know no end, scores do: one that expects to be beyond it is the wrong law.
    room = points[-1].value if metric == "loss" else 100 - points[-1].value
    better = -1 if metric == "loss" else 1
    if better * found.gain > room:
        return ""
    expected = [better * min(better * value, room) for value in (found.gain, found.low, found.high)]
    steps = f"the {more:,} steps to come" if step + more == last else f"{more:,} more steps"
    gain, low, high = (f"{value:+.{3 if metric == 'loss' else 1}f}" for value in expected)
    return (
        f"{steps} ({console.duration(more * pace)}) should bring about {gain} dev "
        f"{LABELS.get(metric, metric)} (80 %: {low} to {high})"
    )


def horizon(step: int, last: int | None) -> int:
    """How many more steps to look ahead: to the end of the run, or half as far again, never twice as far."""
    if last and step < last:
        return min(last - step, step)
    half = max(step // 2, 1)
    power = 10 ** (len(str(half)) - 1)
    return next(count * power for count in (5, 2, 1) if count * power <= half)


def expect(steps: Sequence[int], values: Sequence[float], more: int) -> Outlook | None:
    """What `more` steps would change, seen from the validations so far; None if they do not support that."""
    at, seen = np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)
    usable = np.isfinite(seen) & (at > 0)
    at, seen = at[usable], seen[usable]
    if not len(at) or more <= 0:
        return None
    for early in EARLY:
        recent = at >= early * at[-1]
        if recent.sum() < FEWEST or np.ptp(seen[recent]) == 0:
            return None
        fit = _Fit(at[recent], seen[recent])
        if fit.wavy or fit.steep > STEEP or not _proven(at[recent], seen[recent]):
            continue
        change = fit.change(at[-1], at[-1] + more)
        low, middle, high = np.quantile(change, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
        if max(abs(low), abs(high)) > MOST * np.ptp(seen[recent]):
            continue
        return Outlook(gain=float(middle), low=float(low), high=float(high))
    return None


def _proven(at: Floats, seen: Floats) -> bool:
    """Whether fits to the earlier points foresaw the mean of the last quarter, and of the last half."""
    quarter, half = max(len(at) // 4, 1), len(at) // 2
    return _foreseen(at, seen, quarter) and (len(at) - half < FEWEST or _foreseen(at, seen, half))


def _foreseen(at: Floats, seen: Floats, held: int) -> bool:
    fit = _Fit(at[:-held], seen[:-held])
    curve = np.mean([fit.value(step) for step in at[-held:]], axis=0)
    low, high = np.quantile(curve + fit.noise() / np.sqrt(held), [(1 - PROOF) / 2, (1 + PROOF) / 2])
    return bool(low <= seen[-held:].mean() <= high)


class _Fit:
    """Draws from what the points let expect: a law, its coefficients and the noise, for each draw.

    A point counts the less the older it is: what the law leaves out shows most over long spans.
    """

    def __init__(self, at: Floats, seen: Floats) -> None:
        self.unit, self.random = at[-1], np.random.default_rng(0)
        weights = (at / self.unit) ** AGE
        freedom = max(weights.sum() - 2, 1.0)
        mean = weights @ seen / weights.sum()
        laws = _laws(at / self.unit)
        self.middle = laws @ weights / weights.sum()
        centred = laws - self.middle[:, None]
        # Laws of one spread over the points: a flat prior on their slopes then favours none of them.
        self.spread = np.sqrt(centred**2 @ weights / weights.sum())
        columns = centred / self.spread[:, None]
        slopes = columns @ (weights * (seen - mean)) / weights.sum()
        misfit = (seen - mean - slopes[:, None] * columns) ** 2 @ weights
        misfit += 1e-9 * np.ptp(seen) ** 2  # points without any noise are no certainty
        plausible = np.exp(-freedom / 2 * np.log(misfit / misfit.min()))
        plausible /= plausible.sum()
        self.steep = float(plausible[: np.count_nonzero(POWERS <= -0.999)].sum())
        self.wavy = self._wavy(seen - mean - slopes[misfit.argmin()] * columns[misfit.argmin()], np.ptp(seen))
        self.law = self.random.choice(len(laws), size=DRAWS, p=plausible)
        self.deviation = np.sqrt(misfit[self.law] / self.random.chisquare(freedom, DRAWS))
        error = self.deviation / np.sqrt(weights.sum())
        self.level = mean + error * self.random.standard_normal(DRAWS)
        self.slope = slopes[self.law] + error * self.random.standard_normal(DRAWS)

    def _wavy(self, errors: Floats, span: float) -> bool:
        """Whether neighbours err alike even under the best law, as around a curve of another shape."""
        if np.sqrt(np.mean(errors**2)) < EXACT * span:
            return False
        return bool((np.diff(errors) ** 2).sum() < ALIKE * (errors**2).sum())

    def _column(self, step: float) -> Floats:
        return ((_laws(np.array([step / self.unit]))[:, 0] - self.middle) / self.spread)[self.law]

    def value(self, step: float) -> Floats:
        """What the curve is at `step`, in each draw."""
        return self.level + self.slope * self._column(step)

    def change(self, before: float, after: float) -> Floats:
        """What the curve changes between two steps, in each draw."""
        return self.slope * (self._column(after) - self._column(before))

    def noise(self) -> Floats:
        """What one validation is off its curve, in each draw."""
        return self.deviation * self.random.standard_normal(DRAWS)


def _laws(time: Floats) -> Floats:
    """One row for each law: powers of the time, then exponentials."""
    powers = [np.log(time) if abs(power) < 1e-6 else time**-power for power in POWERS]
    return np.stack(powers + [np.exp(-time / decay) for decay in DECAYS])
