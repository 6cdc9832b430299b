"""What a run has been through: its log as clean curves, whatever was interrupted, resumed or done twice.

A run that was killed after logging step 900 and resumed at step 800 logs the steps in between again. What
counts is what led to the weights: going back to a step takes back all that was logged after it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trmt.errors import DataError

LOG = "log.jsonl"  # in a run folder
TRAIN, VALIDATE = "train", "validate"
AFRESH = "begin"  # the event of a run folder that starts from nothing
GOING_BACK = ("resume", "rollback")  # events after which a run stands at their step, or at their `to`
# How people write the metrics.
LABELS = {"loss": "loss", "chrf": "chrF", "bleu": "BLEU", "right": "answers right (%)"}
NOT_DRAWN = ("time", "elapsed", "seconds")  # where a point stands, and how long looking took


@dataclass(frozen=True)
class Point:
    """A value and where it was met; tokens and hours are of training alone, None if the log lacks them."""

    step: int
    value: float
    tokens: float | None = None
    hours: float | None = None


def numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn of an entry: its fractions by name, its scores by metric."""
    drawn = {key: value for key, value in entry.items() if isinstance(value, float) and key not in NOT_DRAWN}
    return drawn | {score["metric"]: float(score["value"]) for score in entry.get("scores", ())}


class History:
    """The training and validation entries that led to where a run is now, oldest first, and their curves."""

    def __init__(self) -> None:
        self.entries: list[Mapping[str, Any]] = []
        self.damaged = 0  # lines that cannot be read
        self._curves: dict[tuple[str, str], list[Point]] = {}

    @classmethod
    def read(cls, path: Path) -> History:
        """The history in a log; a line that is still being written is left out."""
        history = cls()
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror or error}; name a run folder that trmt train has made"
            ) from error
        for line in text[: text.rfind(b"\n") + 1].splitlines():
            try:
                entry = json.loads(line)
                history.add({**entry, "step": int(entry["step"]), "event": str(entry["event"])})
            except (ValueError, KeyError, TypeError, AttributeError):
                history.damaged += 1
        return history

    def add(self, entry: Mapping[str, Any]) -> None:
        """Take note of an entry; what was logged for later steps no longer counts."""
        event = entry["event"]
        if event == AFRESH:
            self.entries.clear()
            self._curves.clear()
        elif event in GOING_BACK:
            self._go_back(int(entry.get("to", entry["step"])))
        elif event in (TRAIN, VALIDATE):
            self._go_back(entry["step"])
            self._extend(entry)

    def _go_back(self, step: int) -> None:
        while self.entries and self.entries[-1]["step"] > step:
            self.entries.pop()
        for curve in self._curves.values():
            while curve and curve[-1].step > step:
                curve.pop()

    def _extend(self, entry: Mapping[str, Any]) -> None:
        step, event = entry["step"], entry["event"]
        points = {
            name: Point(step, value, entry.get("tokens"), _hours(entry))
            for name, value in numbers(entry).items()
            if math.isfinite(value)
        }
        if any((old["step"], old["event"]) == (step, event) for old in self.entries[-2:]):
            self.entries = [old for old in self.entries if (old["step"], old["event"]) != (step, event)]
        self.entries.append(entry)
        for name, point in points.items():
            curve = self._curves.setdefault((event, name), [])
            if curve and curve[-1].step == step:
                curve.pop()
            curve.append(point)

    def curve(self, event: str, name: str) -> Sequence[Point]:
        """The finite values of one number, such as the "loss" of each "train" or the "chrf" of "validate"."""
        return self._curves.get((event, name), [])

    def last(self, event: str, back: int = 0) -> Mapping[str, Any] | None:
        """The last entry of a kind, or the one so many before it."""
        found = (entry for entry in reversed(self.entries) if entry["event"] == event)
        return next(itertools.islice(found, back, None), None)

    def metrics(self) -> list[str]:
        """The scores of the validations, the one that chooses first."""
        last = self.last(VALIDATE)
        chosen = [score["metric"] for score in last.get("scores", ())] if last else []
        seen = [name for event, name in self._curves if event == VALIDATE]
        return list(dict.fromkeys(chosen + seen))


def _hours(entry: Mapping[str, Any]) -> float | None:
    elapsed = entry.get("elapsed")
    return None if elapsed is None else elapsed / 3600


def best(points: Sequence[Point], metric: str) -> Point | None:
    """The point with the best value of this metric; of equals the older."""
    order = min if metric == "loss" else max
    return order(points, key=lambda point: point.value, default=None)
