"""Time that may be spent: commands are stopped in time to save what they have, and are run again later."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

GRACE = 25.0  # seconds in which a command that is told to stop saves its work
LOOK_EVERY = 1.0  # seconds
AGAIN = 75  # the exit status of a program that has more to do (EX_TEMPFAIL)
STOPPED = (AGAIN, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL)


_stopping = threading.Event()  # set once this program has been told to stop


class OutOfTime(Exception):
    """There was more to do; run it again to go on."""


def seconds(text: str) -> float:
    """`9m`, `540s` or `540` as seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not match:
        raise ValueError(f"{text!r} is no time; write it as 9m, 540s or 540")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


class TooLong(Exception):
    """A command took longer than it may, and was ended."""


class Budget:
    """So many seconds from now; any number of threads may share it."""

    def __init__(self, limit: float = float("inf"), *, grace: float = GRACE) -> None:
        self.grace = grace
        self._end = time.monotonic() + limit

    def left(self) -> float:
        """Seconds in which something may still be begun."""
        return float("-inf") if _stopping.is_set() else self._end - self.grace - time.monotonic()

    def run(
        self,
        command: list[str],
        *,
        log: Path,
        stdin: IO[Any] | None = None,
        look: Callable[[], None] | None = None,
        own_group: bool = False,
        most: float = float("inf"),
        **options: Any,
    ) -> None:
        """Run a command, its messages into `log`; when time runs out it gets SIGTERM, and later SIGKILL.

        So it does after `most` seconds.

        With `own_group` it leads a process group, of which nothing is left when this returns or raises.
        `look` is called now and then while it runs.
        """
        if self.left() <= 0:
            raise OutOfTime
        with log.open("ab") as messages:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                start_new_session=own_group,
                **{"stdout": messages, "stderr": messages, **options},
            )
            try:
                latest = time.monotonic() + most
                status, stopped = self._wait(process, look, latest)
            finally:
                if own_group:
                    end_group(process.pid)
        if stopped and status in STOPPED and self.left() > 0:
            raise TooLong
        if status == AGAIN or (stopped and status in STOPPED):
            raise OutOfTime
        if status != 0:
            raise SystemExit(f"{' '.join(command)}\nended with status {status}:\n{_tail(log)}")

    def _wait(
        self, process: subprocess.Popen[Any], look: Callable[[], None] | None, latest: float
    ) -> tuple[int, bool]:
        """The status with which a process ended, and whether it had to be stopped, at the latest then."""
        while (left := min(self.left(), latest - time.monotonic())) > 0:
            try:
                return process.wait(min(left, LOOK_EVERY)), False
            except subprocess.TimeoutExpired:
                if look:
                    look()
        process.terminate()
        try:
            return process.wait(self.grace), True
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(), True


def _tail(log: Path) -> str:
    return log.read_bytes()[-3000:].decode("utf-8", "replace")


def end_group(leader: int) -> None:
    """End what is left of a process group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def die_together() -> None:
    """When this program is told to stop, the processes that it measures end with it."""
    if os.getpgid(0) != os.getpid():  # otherwise it leads a group already
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)
        os.killpg(0, signal.SIGKILL)  # whoever started this was killed and cannot tell it

    threading.Thread(target=watch, daemon=True).start()


def stop_together() -> None:
    """When this program is told to stop, its budgets have ended: commands save what they have, and end."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: _stopping.set())


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
