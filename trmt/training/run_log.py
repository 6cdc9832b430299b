"""The log of a run: a line of JSON for each event, TensorBoard curves where it is installed, and a clock."""

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
from trmt.storage.files import write_advice
from trmt.training.history import TRAIN, VALIDATE, numeric_values, with_crc

T = TypeVar("T")

TENSORBOARD = "tensorboard"
RECENT = 200  # steps whose mean time stands in for that of a step with a pause


class RunLog:
    """The log file of a run; lines are only ever appended."""

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        try:
            _remove_partial_line(path)
        except OSError as error:
            raise self._write_error(error) from error
        self.tensorboard = _open_tensorboard(path.parent / TENSORBOARD, step)

    def write(self, event: str, step: int, **values: Any) -> dict[str, Any]:
        """Append an event that happened after `step`; returns the entry."""
        entry = {"event": event, "step": step, "time": round(time.time(), 3), **values}
        try:
            with self.path.open("ab") as stream:
                stream.write(with_crc(json.dumps(entry, ensure_ascii=False).encode()) + b"\n")
            if self.tensorboard is not None and event in (TRAIN, VALIDATE):
                for name, number in numeric_values(entry).items():
                    self.tensorboard.add_scalar(f"{event}/{name}", number, step)
                self.tensorboard.flush()
        except OSError as error:
            raise self._write_error(error) from error
        return entry

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _write_error(self, error: OSError) -> TrmtError:
        return TrmtError(
            f"cannot write {self.path}: {error.strerror or error}; {write_advice(error)}, "
            "and the same command goes on from the last checkpoint"
        )


def _remove_partial_line(path: Path) -> None:
    """Remove the incomplete line that a kill or a full disk may have left at the end."""
    if path.is_file():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)


def _open_tensorboard(folder: Path, step: int) -> Any:
    """A TensorBoard writer, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # An interrupted run may have written points after this step, which will be written again.
    return SummaryWriter(str(folder), purge_step=step + 1)


class StepClock:
    """The time spent in steps, without validating, saving and pauses."""

    def __init__(self, tokens: int) -> None:
        self.note = ""
        self.restart(tokens)

    def restart(self, tokens: int) -> None:
        """Start measuring now, after `tokens` target tokens."""
        self.tokens = tokens
        self.step_time = 0.0  # since `tokens_per_second` was last called
        self.wait_time = 0.0  # of that, spent waiting for data
        self.wait_share = 0.0  # wait_time / step_time when `tokens_per_second` was last called
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.last = time.monotonic()

    def next(self, stream: Iterator[T]) -> T:
        """The stream's next item; the time this takes counts as waiting for data."""
        began = time.monotonic()
        item = next(stream)
        self.wait_time += time.monotonic() - began
        return item

    def end_step(self, *, paused: bool = False) -> float:
        """Seconds since the last step ended; of one in which the process was paused, the usual time."""
        now = time.monotonic()
        passed, self.last = now - self.last, now
        if paused:
            usual = min(passed, self.mean_step())
            clock.exclude(passed - usual)
            passed = usual
        else:
            self.recent.append(passed)
        self.step_time += passed
        return passed

    def skip(self) -> None:
        """Do not count the time since the last step ended."""
        self.last = time.monotonic()

    def mean_step(self) -> float:
        """The mean time of recent steps in seconds."""
        return sum(self.recent) / max(len(self.recent), 1)

    def tokens_per_second(self, tokens: int) -> float:
        """The speed since the last call, where `tokens` are all target tokens so far."""
        rate = (tokens - self.tokens) / max(self.step_time, 1e-9)
        self.wait_share = self.wait_time / max(self.step_time, 1e-9)
        self.tokens, self.step_time, self.wait_time = tokens, 0.0, 0.0
        return rate
