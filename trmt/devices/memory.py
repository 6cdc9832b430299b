"""The memory of a device in bytes: all of it, what is free, what this process uses; out-of-memory errors."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import torch

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


def total(device: torch.device) -> int | None:
    """The memory of the device, or the limit of the container on the CPU; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return min(_known(_meminfo("MemTotal"), _physical_memory(), _container_limit()), default=None)


def free(device: torch.device) -> int | None:
    """The memory that can still be allocated; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    limit, used_by_container = _container_limit(), _container_usage()
    left = limit - used_by_container if limit is not None and used_by_container is not None else None
    return min(_known(_meminfo("MemAvailable"), left), default=None)


def used(device: torch.device) -> int | None:
    """The memory that this process uses now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return _process_status("VmRSS")


def peak(device: torch.device) -> int | None:
    """The most memory that this process has used since `reset_peak`, or ever."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return _process_status("VmHWM") or _max_resident_size()


def reset_peak(device: torch.device) -> None:
    """Restart the measurement of the peak, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        (PROC / "self/clear_refs").write_text("5")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if error.__cause__ and is_out_of_memory(error.__cause__):  # wrapped in an error of trmt
        return True
    # The CPU's allocator and the libraries of GPUs raise a plain RuntimeError.
    return bool(re.search("can't allocate memory|out of memory|_status_alloc_failed", str(error).lower()))


def is_device_error(error: BaseException) -> bool:
    """Whether a GPU or its driver failed, not for lack of memory; mostly nothing more can be run on it."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def _known(*sizes: int | None) -> list[int]:
    return [size for size in sizes if size is not None]


def _meminfo(name: str) -> int | None:
    return _read_kibibytes(PROC / "meminfo", name)


def _process_status(name: str) -> int | None:
    return _read_kibibytes(PROC / "self/status", name)


def _read_kibibytes(file: Path, name: str) -> int | None:
    with suppress(OSError):
        found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


def _physical_memory() -> int | None:
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _max_resident_size() -> int | None:
    with suppress(ImportError):  # Windows has no such module
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def _container_limit() -> int | None:
    """The memory limit of this process's container (cgroup v2 or v1); None without one."""
    return _read_int(CGROUP / "memory.max") or _read_int(CGROUP / "memory/memory.limit_in_bytes")


def _container_usage() -> int | None:
    """The memory that the container uses, without the reclaimable page cache."""
    usage = _read_int(CGROUP / "memory.current") or _read_int(CGROUP / "memory/memory.usage_in_bytes")
    for file in (CGROUP / "memory.stat", CGROUP / "memory/memory.stat"):
        with suppress(OSError):
            found = re.search(r"^inactive_file (\d+)$", file.read_text(), re.MULTILINE)
            return usage - int(found[1]) if usage is not None and found else usage
    return usage


def _read_int(file: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(file.read_text())
    return None
