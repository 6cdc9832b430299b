"""A clock that stands still while the process does: for estimates of the time left."""

from __future__ import annotations

import time

_left_out = 0.0  # seconds of this process so far


def now() -> float:
    """Seconds since some moment, without pauses; a machine that sleeps does not count either."""
    return time.monotonic() - _left_out


def leave_out(seconds: float) -> None:
    """Take so many of the last seconds for a pause."""
    global _left_out
    _left_out += seconds
