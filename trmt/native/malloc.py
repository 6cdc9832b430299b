"""Settings of the C library's memory allocator."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, for loops that allocate the same sizes again and again.

    The C library returns large blocks to the system at once, and the system clears the pages of each new one.
    """
    trim_threshold, mmap_max = -1, -4  # from malloc.h of glibc
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
