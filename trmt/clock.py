"""A monotonic clock without the time that the process was suspended, for estimates of the time left."""

from __future__ import annotations

import time

_excluded = 0.0  # seconds


def now() -> float:
    """Seconds since an arbitrary moment, without suspended time; a sleeping machine does not count either."""
    return time.monotonic() - _excluded


def exclude(seconds: float) -> None:
    """Do not count the last `seconds`: the process was suspended."""
    global _excluded
    _excluded += seconds
