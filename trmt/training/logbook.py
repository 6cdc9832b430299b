"""The log of a run: a line of JSON for each event, curves for TensorBoard where it is installed, a clock."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from trmt import clock
from trmt.errors import TrmtError
from trmt.training.history import TRAIN, VALIDATE, numbers

T = TypeVar("T")

TENSORBOARD = "tensorboard"
RECENT = 200  # laps whose mean is the usual one


class Logbook:
    """The log of the run in a folder; it is only ever added to."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        try:
            _drop_half_line(path)
        except OSError as error:
            raise self._explained(error) from error
        self.curves = _curves(path.parent / TENSORBOARD, step)

    def write(self, event: str, step: int, **values: Any) -> dict[str, Any]:
        """Add what happened after `step`, and return the entry."""
        entry = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
            if self.curves is not None and event in (TRAIN, VALIDATE):
                for name, number in numbers(entry).items():
                    self.curves.add_scalar(f"{event}/{name}", number, step)
                self.curves.flush()
        except OSError as error:
            raise self._explained(error) from error
        return entry

    def close(self) -> None:
        """Let go of the curves' file."""
        if self.curves is not None:
            self.curves.close()

    def _explained(self, error: OSError) -> TrmtError:
        return TrmtError(
            f"cannot write {self.path}: {error.strerror or error}; free some space, "
            "and the same command goes on from the last checkpoint"
        )


def _drop_half_line(path: Path) -> None:
    """Remove the beginning of a line that a kill or a full disk has left at the end."""
    if path.is_file():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)


def _curves(folder: Path, step: int) -> Any:
    """A writer of curves, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # What an interrupted run drew after this step is going to be drawn again.
    return SummaryWriter(str(folder), purge_step=step + 1)


class Clock:
    """Time spent in steps, without what validating, saving and pauses took."""

    def __init__(self, tokens: int) -> None:
        self.note = ""
        self.restart(tokens)

    def restart(self, tokens: int) -> None:
        """Begin to measure here, where so many tokens have been seen."""
        self.tokens = tokens
        self.spent = 0.0
        self.waited = 0.0
        self.wait_share = 0.0  # of the time that `speed` was last asked about
        self.laps: deque[float] = deque(maxlen=RECENT)
        self.last = time.monotonic()

    def next(self, stream: Iterator[T]) -> T:
        """The stream's next item; the time it takes counts as waiting."""
        began = time.monotonic()
        item = next(stream)
        self.waited += time.monotonic() - began
        return item

    def lap(self, *, paused: bool = False) -> float:
        """Seconds since the last lap; of one in which the process was paused, what a lap usually takes."""
        now = time.monotonic()
        passed, self.last = now - self.last, now
        if paused:
            usual = min(passed, self.usual())
            clock.exclude(passed - usual)
            passed = usual
        else:
            self.laps.append(passed)
        self.spent += passed
        return passed

    def skip(self) -> None:
        """Leave out what has passed since the last lap."""
        self.last = time.monotonic()

    def usual(self) -> float:
        """Seconds that a lap has taken lately: for estimates of the time left."""
        return sum(self.laps) / max(len(self.laps), 1)

    def speed(self, tokens: int) -> float:
        """Tokens per second since the last time it was asked."""
        rate = (tokens - self.tokens) / max(self.spent, 1e-9)
        self.wait_share = self.waited / max(self.spent, 1e-9)
        self.tokens, self.spent, self.waited = tokens, 0.0, 0.0
        return rate
