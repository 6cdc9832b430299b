"""The end of training: when steps, epochs or patience are used up, or by Ctrl-C and SIGTERM after saving."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from trmt import console
from trmt.errors import TrmtError
from trmt.training.distributed import Distributed
from trmt.training.history import LABELS
from trmt.training.recipe import Recipe
from trmt.training.state import TrainProgress


@dataclass(frozen=True)
class Ending:
    """Why a run has ended, and the setting with which it would go on."""

    reason: str
    setting: str


def ending(recipe: Recipe, progress: TrainProgress, *, last_step: int | None) -> Ending | None:
    """Why training ends at this point; None if it goes on."""
    training = recipe.training
    if last_step is not None and progress.step >= last_step:
        if training.steps and training.steps == last_step:
            return Ending(f"training.steps = {training.steps} is reached", "training.steps")
        return Ending(f"training.epochs = {training.epochs} is reached", "training.epochs")
    if training.patience and progress.validations_since_best >= training.patience:
        metric = LABELS[recipe.validation.metric]
        return Ending(
            f"the last {training.patience} validations brought no better dev {metric}", "training.patience"
        )
    return None


class Interrupted(TrmtError):
    """A signal asked the run to stop; everything is saved."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopNow(BaseException):
    """Raised by the signal handler where nothing is lost; not an Exception, so that no library catches it."""


class StopSignals:
    """The signals that a run receives.

    A scheduler sends SIGKILL half a minute after SIGTERM. So whatever may take longer than a step, and can be
    repeated, runs within `stop_at_once`.
    """

    def __init__(self, distributed: Distributed) -> None:
        self.distributed = distributed
        self._at_once = False
        self._continued = False

    @property
    def number(self) -> int | None:
        """The first signal that asked to stop; with several processes, once all ranks know of it."""
        return self.distributed.agreed_signal

    @number.setter
    def number(self, number: int) -> None:
        self.distributed.requested_signal = number

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Record the first signal to stop; a second one acts at once."""
        handlers: dict[int, Callable[[int, FrameType | None], None]] = {
            signal.SIGINT: self._stop,
            signal.SIGTERM: self._stop,
        }
        if hasattr(signal, "SIGCONT"):
            handlers[signal.SIGCONT] = self._continue
        before: dict[int, Any] = {}
        with suppress(ValueError):  # not the main thread, so signals are handled elsewhere
            for number, handler in handlers.items():
                before[number] = signal.signal(number, handler)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def stop_at_once(self) -> Iterator[None]:
        """Within this block a signal raises StopNow; with several processes it takes effect after it."""
        self._at_once = self.distributed.world_size == 1
        try:
            if self._at_once and self.number is not None:
                raise StopNow
            yield
        finally:
            self._at_once = False

    def was_paused(self) -> bool:
        """Whether the process was stopped and continued since the last call."""
        continued, self._continued = self._continued, False
        return continued

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.distributed.requested_signal = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if self._at_once:
            raise StopNow
        # The interrupted code may be writing to the same stream, which raises RuntimeError when re-entered.
        with suppress(RuntimeError):
            console.say(
                "stopping after this step; a second signal stops at once and loses the steps since the last "
                "checkpoint"
            )

    def _continue(self, number: int, frame: FrameType | None) -> None:
        self._continued = True
