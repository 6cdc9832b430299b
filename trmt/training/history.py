"""The history of a run: the curves in its log, without what was interrupted and repeated.

A run that was killed after logging step 900 and resumed at step 800 logs the steps in between again. Only the
entries that led to the current weights count: resuming or rolling back removes all that was logged after.
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

from trmt import console
from trmt.bundles.schema import GoldenSentence, StoredScore
from trmt.config import Count, build_table
from trmt.errors import ConfigError, DataError
from trmt.trees import TreeError, parse_json

LOG = "log.jsonl"  # in a run folder
NEW = "new.json"  # in one that `trmt new` made, which holds the tokenizer and the prepared set too
TRAIN, VALIDATE = "train", "validate"
BEGIN, END = "begin", "end"  # the events with which a run starts and ends
RESTORING = ("resume", "rollback")  # events after which a run is at their step, or at their `to`
# How the metrics are written for people.
LABELS = {"loss": "loss", "chrf": "chrF", "bleu": "BLEU", "right": "answers right (%)"}
NOT_PLOTTED = ("time", "elapsed", "seconds")  # when an entry was written, and how long validating took


CRC = re.compile(rb', "crc": "([0-9a-f]{8})"\}$')


class LogEntry(TypedDict):
    """A line of the log; there may be more keys."""

    event: str
    step: Count
    to: NotRequired[Count]  # the step that a rollback restored
    scores: NotRequired[list[StoredScore]]
    samples: NotRequired[list[GoldenSentence]]
    loss: NotRequired[float | None]
    lr: NotRequired[float]
    tokens: NotRequired[Count]  # target tokens trained on
    tokens_per_second: NotRequired[float]
    elapsed: NotRequired[float]  # seconds spent in training steps
    crc: NotRequired[str]


@dataclass(frozen=True)
class Point:
    """A point of a curve."""

    step: int
    value: float
    tokens: float | None = None  # target tokens trained on; None if the log lacks them
    hours: float | None = None  # spent in training steps; None if the log lacks them


def numeric_values(entry: Mapping[str, Any]) -> dict[str, float]:
    """What can be plotted of an entry: its floats by name, its scores by metric."""
    plotted = {
        key: value for key, value in entry.items() if isinstance(value, float) and key not in NOT_PLOTTED
    }
    return plotted | {score["metric"]: float(score["value"]) for score in entry.get("scores", ())}


class LogTimes(NamedTuple):
    """When a log was last written, and when training last ended, by what its entries say."""

    last: float = 0.0  # seconds since 1970; 0 if it is unknown
    ended: float = 0.0
    end_step: int | None = None  # the step at which training ended; None if it never did


def read_times(path: Path) -> LogTimes:
    """The times in a log; without one, all are unknown."""
    times = LogTimes()
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return times
    for line in reversed(lines):
        if times.last and b'"end"' not in line:  # most entries need not be parsed
            continue
        try:
            entry = parse_json(line)
            written, event, step = float(entry["time"]), entry["event"], int(entry["step"])
        except (TreeError, ValueError, KeyError, TypeError, OverflowError):
            continue
        times = times._replace(last=times.last or written)
        if event == END:
            return times._replace(ended=written, end_step=step)
    return times


class History:
    """The training and validation entries that led to the current state of a run, oldest first."""

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
                f"cannot read {path}: {error.strerror or error}; name a folder that trmt train wrote"
            ) from error
        for line in text[: text.rfind(b"\n") + 1].splitlines():
            try:
                history.add(cast(Mapping[str, Any], _parse_entry(line)))
            except (TreeError, ConfigError):
                history.damaged += 1
        if history.damaged:
            lines = "1 damaged line is" if history.damaged == 1 else f"{history.damaged:,} damaged lines are"
            console.warn(f"{path}: {lines} left out")
        return history

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add an entry; entries of later steps are removed."""
        event = entry["event"]
        if event == BEGIN:
            self.entries.clear()
            self._curves.clear()
        elif event in RESTORING:
            self._remove_after(int(entry.get("to", entry["step"])))
        elif event in (TRAIN, VALIDATE):
            self._remove_after(entry["step"])
            self._append(entry)

    def _remove_after(self, step: int) -> None:
        while self.entries and self.entries[-1]["step"] > step:
            self.entries.pop()
        for curve in self._curves.values():
            while curve and curve[-1].step > step:
                curve.pop()

    def _append(self, entry: Mapping[str, Any]) -> None:
        step, event = entry["step"], entry["event"]
        points = {
            name: Point(step, value, entry.get("tokens"), _hours(entry))
            for name, value in numeric_values(entry).items()
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
        """The last entry of an event, or the one `back` entries before it."""
        found = (entry for entry in reversed(self.entries) if entry["event"] == event)
        return next(itertools.islice(found, back, None), None)

    def metrics(self) -> list[str]:
        """The metrics of the validations; the one that selects checkpoints comes first."""
        last = self.last(VALIDATE)
        latest = [score["metric"] for score in last.get("scores", ())] if last else []
        known = [name for event, name in self._curves if event == VALIDATE]
        return list(dict.fromkeys(latest + known))


def _parse_entry(line: bytes) -> LogEntry:
    """The entry in a line; an altered line is an error, and so is one with values of wrong types."""
    match = CRC.search(line)
    if match and int(match[1], 16) != zlib.crc32(line[: match.start()] + b"}"):
        raise TreeError("is not as it was written: its checksum differs")
    entry = build_table(LogEntry, parse_json(line), where="entry")
    entry.pop("crc", None)
    return entry


def with_crc(line: bytes) -> bytes:
    """The JSON of an entry with a checksum as its last value."""
    return b'%s, "crc": "%08x"}' % (line[:-1], zlib.crc32(line))


def _hours(entry: Mapping[str, Any]) -> float | None:
    elapsed = entry.get("elapsed")
    return None if elapsed is None else elapsed / 3600


def best(points: Sequence[Point], metric: str) -> Point | None:
    """The point with the best value of this metric; of equal ones the oldest."""
    order = min if metric == "loss" else max
    return order(points, key=lambda point: point.value, default=None)
