"""How much memory a device has, how much of it is free, how much this process takes; whether it ran out."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import torch

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def total(device: torch.device) -> int | None:
    """What the device has, or what a container may take of it; None if it does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return min(_known(_machine("MemTotal"), _pages(), _limit()), default=None)


def free(device: torch.device) -> int | None:
    """What can still be had of it; None if nobody knows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    limit, taken = _limit(), _taken()
    left = limit - taken if limit is not None and taken is not None else None
    return min(_known(_machine("MemAvailable"), left), default=None)


def peak(device: torch.device) -> int | None:
    """The most this process has taken since `forget_peak`, or ever."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return _status("VmHWM") or _largest()


def forget_peak(device: torch.device) -> None:
    """Begin the measurement of the peak anew, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        (PROC / "self/clear_refs").write_text("5")


def taken(device: torch.device) -> int | None:
    """What this process takes now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return _status("VmRSS")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if error.__cause__ and is_out_of_memory(error.__cause__):  # told in a sentence of ours
        return True
    # The CPU's allocator raises a plain RuntimeError.
    return "can't allocate memory" in str(error) or "out of memory" in str(error).lower()


def _known(*sizes: int | None) -> list[int]:
    return [size for size in sizes if size is not None]


def _machine(name: str) -> int | None:
    return _kibibytes(PROC / "meminfo", name)


def _status(name: str) -> int | None:
    return _kibibytes(PROC / "self/status", name)


def _kibibytes(file: Path, name: str) -> int | None:
    with suppress(OSError):
        found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


def _pages() -> int | None:
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _largest() -> int | None:
    with suppress(ImportError):  # Windows has none
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def _limit() -> int | None:
    """What the container of this process may take; a machine without one says nothing."""
    return _number(CGROUP / "memory.max") or _number(CGROUP / "memory/memory.limit_in_bytes")


def _taken() -> int | None:
    """What the container takes, without file contents that only wait to be read again."""
    now = _number(CGROUP / "memory.current") or _number(CGROUP / "memory/memory.usage_in_bytes")
    for file in (CGROUP / "memory.stat", CGROUP / "memory/memory.stat"):
        with suppress(OSError):
            found = re.search(r"^inactive_file (\d+)$", file.read_text(), re.MULTILINE)
            return now - int(found[1]) if now is not None and found else now
    return now


def _number(file: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(file.read_text())
    return None
