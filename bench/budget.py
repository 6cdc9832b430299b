"""Time that may be spent: commands are stopped in time to save what they have, and are run again later."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import IO, Any

GRACE = 25.0  # seconds in which a command that is told to stop saves its work
AGAIN = 75  # the exit status of a program that has more to do (EX_TEMPFAIL)
STOPPED = (AGAIN, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL)


class OutOfTime(Exception):
    """There was more to do; run it again to go on."""


def seconds(text: str) -> float:
    """`9m`, `540s` or `540` as seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not match:
        raise ValueError(f"{text!r} is no time; write it as 9m, 540s or 540")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


class Budget:
    """So many seconds from now; any number of threads may share it."""

    def __init__(self, limit: float = float("inf"), *, grace: float = GRACE) -> None:
        self.grace = grace
        self._end = time.monotonic() + limit

    def left(self) -> float:
        """Seconds in which something may still be begun."""
        return self._end - self.grace - time.monotonic()

    def run(self, command: list[str], *, log: Path, stdin: IO[Any] | None = None, **options: Any) -> None:
        """Run a command, its messages into `log`; when time runs out it gets SIGTERM, and later SIGKILL."""
        if self.left() <= 0:
            raise OutOfTime
        with log.open("ab") as messages:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                **{"stdout": messages, "stderr": messages, **options},
            )
            status, stopped = self._wait(process)
        if status == AGAIN or (stopped and status in STOPPED):
            raise OutOfTime
        if status != 0:
            raise SystemExit(f"{' '.join(command)}\nended with status {status}:\n{_tail(log)}")

    def _wait(self, process: subprocess.Popen[Any]) -> tuple[int, bool]:
        """The status with which a process ended, and whether it had to be stopped."""
        left = self.left()
        try:
            return process.wait(None if left == float("inf") else max(left, 0)), False
        except subprocess.TimeoutExpired:
            process.terminate()
        try:
            return process.wait(self.grace), True
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(), True


def _tail(log: Path) -> str:
    return log.read_bytes()[-3000:].decode("utf-8", "replace")


def die_together() -> None:
    """When this program is told to stop, the processes that it measures end with it."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))


class Ledger:
    """How long each stage took, over all the calls it was spread over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def add(self, stage: str, spent: float) -> None:
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(f"{stage}\t{spent:.2f}\n")

    def totals(self) -> dict[str, float]:
        """Seconds by stage."""
        found: dict[str, float] = {}
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        for line in lines:
            stage, spent = line.split("\t")
            found[stage] = round(found.get(stage, 0.0) + float(spent), 2)
        return found
