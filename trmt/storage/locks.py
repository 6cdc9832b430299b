"""A lock that keeps a folder to one process."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from trmt.errors import TrmtError
from trmt.storage.files import write_error
from trmt.storage.urls import is_url

LOCK = "lock"  # the name of the lock file; it holds the process id, the host, and the job if there is one


@contextmanager
def exclusive(folder: Path | str, *, job: str = "") -> Iterator[None]:
    """Create `folder` if it is missing and lock it; a TrmtError if another process holds the lock.

    The operating system releases the lock of a process that dies. On a shared file system the lock of another
    host may be invisible; then the host in the lock file counts. A `job` is started again, perhaps on another
    host, only after its earlier processes have ended: the lock file of the same job does not count. A URL is
    not locked, since stores have no locks.
    """
    if is_url(folder):
        yield
        return
    path = Path(folder)
    lock = path / LOCK
    try:
        path.mkdir(parents=True, exist_ok=True)
        stream = _acquire(lock, job)
        stream.write(f"{os.getpid()} {platform.node()} {job}".rstrip().encode())
        stream.flush()
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # before the lock is released: the next process makes its own file
        stream.close()


def is_locked(folder: Path) -> bool:
    """Whether another process seems to be at work in a folder; that of another host is taken to be."""
    try:
        owner = (folder / LOCK).read_text(errors="replace").split()
    except OSError:
        return False
    if len(owner) < 2 or not (owner[0].isdecimal() and len(owner[0]) < 10):
        return False
    return owner[1] != platform.node() or _is_running(int(owner[0]))


def _acquire(lock: Path, job: str) -> BinaryIO:
    """The lock file, locked and emptied; a TrmtError if another process holds it."""
    while True:
        stream = os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        acquired = _try_flock(stream)
        owner = stream.read().decode(errors="replace").split()
        known = len(owner) >= 2 and owner[0].isdecimal()
        other_host = known and owner[1] != platform.node() and owner[2:] != [job]
        running = known and acquired is None and _is_running(int(owner[0]))
        if acquired is False or other_host or running:
            stream.close()
            holder = f"process {owner[0]} on {owner[1]}" if known else "another process"
            raise TrmtError(
                f"{holder} is at work in {lock.parent}; wait for it, or remove {lock} if it no longer runs"
            )
        # The previous holder may have removed the file after we opened it and before we locked it.
        if lock.exists() and os.path.samestat(os.fstat(stream.fileno()), lock.stat()):
            stream.seek(0)
            stream.truncate()
            return stream
        stream.close()


def _try_flock(stream: BinaryIO) -> bool | None:
    """Whether this process now holds the system's lock on a file; None where there are no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks
        return None
    return True


def _is_running(process: int) -> bool:
    """Whether another process with this id is running."""
    if process == os.getpid():
        return False
    if os.name == "nt":  # os.kill would end it there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
