"""Overfitting: the training loss still falls, and the dev loss has risen over several validations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from trmt.training.history import LABELS, TRAIN, VALIDATE, History, Point, best
from trmt.training.recipe import Recipe

VALIDATIONS = 3  # in a row whose dev loss is above the lowest
RISE = 0.005  # of the lowest dev loss; smaller changes are noise
FALL = 0.01  # of the training loss at that time


@dataclass(frozen=True)
class Overfitting:
    """What shows it: the losses at the lowest dev loss, and now."""

    since: int  # the step of the lowest dev loss
    dev_loss: tuple[float, float]
    train_loss: tuple[float, float]


def find(history: History) -> Overfitting | None:
    """Overfitting that the last validation shows, and none before it since the lowest dev loss."""
    dev = history.curve(VALIDATE, "loss")
    found = _shown_by(dev, history.curve(TRAIN, "loss"))
    if not found:
        return None
    earlier = (dev[:count] for count in range(1, len(dev)) if dev[count - 1].step > found.since)
    if any(_shown_by(points, history.curve(TRAIN, "loss")) for points in earlier):
        return None
    return found


def _shown_by(dev: Sequence[Point], train: Sequence[Point]) -> Overfitting | None:
    lowest = best(dev, "loss")
    if not lowest:
        return None
    after = [point for point in dev if point.step > lowest.step]
    if len(after) < VALIDATIONS or min(point.value for point in after[-VALIDATIONS:]) < lowest.value * (
        1 + RISE
    ):
        return None
    # The training loss of a few batches is noisy: means over the steps between two validations are compared.
    every = after[-1].step - after[-2].step
    before, now = (_mean(train, end, every) for end in (lowest.step, after[-1].step))
    if before is None or now is None or now > before * (1 - FALL):
        return None
    return Overfitting(lowest.step, (lowest.value, after[-1].value), (before, now))


def _mean(points: Sequence[Point], end: int, steps: int) -> float | None:
    """The mean of the values in so many steps up to `end`, or else the last one before it."""
    values = [point.value for point in points if point.step <= end]
    recent = [point.value for point in points if end - steps < point.step <= end]
    return mean(recent or values[-1:]) if values else None


def describe(found: Overfitting, recipe: Recipe) -> str:
    """A sentence with numbers and advice."""
    (dev, dev_now), (train, train_now) = found.dev_loss, found.train_loss
    metric = LABELS[recipe.validation.metric]
    patience = recipe.training.patience
    end = (
        f"training ends when {patience} validations in a row bring no better dev {metric}"
        if patience
        else "set training.patience to end training when the dev set no longer gains"
    )
    dropout = recipe.network.get("dropout")
    known = "" if dropout is None else f" (now {dropout:g})"
    return (
        f"overfitting: since step {found.since:,} the training loss fell from {train:.2f} to {train_now:.2f} "
        f"and the dev loss rose from {dev:.2f} to {dev_now:.2f}; {end}; more text, a higher "
        f"network.dropout{known} or a smaller network would help a new run"
    )
