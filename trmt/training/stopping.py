"""Signals during a run: Ctrl-C and SIGTERM end it where nothing is lost, and a pause is noticed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from trmt import console
from trmt.errors import TrmtError
from trmt.training.distributed import Team


class Interrupted(TrmtError):
    """A signal asked the run to stop; everything is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StoppedHere(BaseException):
    """Raised by a signal where nothing is lost; no library takes it for an error of its own."""


class Signals:
    """What a run has been told from outside.

    A scheduler kills half a minute after it has asked. So whatever may take longer than a step, and can be
    done again, runs under `harmless`.
    """

    def __init__(self, team: Team) -> None:
        self.team = team
        self._harmless = False
        self._continued = False

    @property
    def number(self) -> int | None:
        """The first signal that asked to stop; in a team, once all know of it."""
        return self.team.signal

    @number.setter
    def number(self, number: int) -> None:
        self.team.wish = number

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Let the first signal to stop be noted; the second one acts at once."""
        numbers: dict[int, Callable[[int, FrameType | None], None]] = {
            signal.SIGINT: self._note,
            signal.SIGTERM: self._note,
        }
        if hasattr(signal, "SIGCONT"):
            numbers[signal.SIGCONT] = self._continue
        before: dict[int, Any] = {}
        try:
            for number, handler in numbers.items():
                before[number] = signal.signal(number, handler)
        except ValueError:  # not the main thread: signals are somebody else's
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def harmless(self) -> Iterator[None]:
        """While this block runs, a signal ends it at once, by StoppedHere; in a team it is waited for."""
        self._harmless = self.team.size == 1
        try:
            if self._harmless and self.number is not None:
                raise StoppedHere
            yield
        finally:
            self._harmless = False

    def was_paused(self) -> bool:
        """Whether the process was stopped and continued since this was last asked."""
        continued, self._continued = self._continued, False
        return continued

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.team.wish = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if self._harmless:
            raise StoppedHere
        # Whoever is interrupted may be writing to the same stream, which refuses to be entered twice.
        with suppress(RuntimeError):
            console.say(
                "stopping after this step; once more stops at once and loses the steps since the last save"
            )

    def _continue(self, number: int, frame: FrameType | None) -> None:
        self._continued = True
