"""Files that are written whole or not at all, and the checksums that prove what was written."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from trmt.errors import TrmtError

LOCK = "lock"
PARTIAL = ".partial-"  # marks what a killed command left behind; never read, swept by the next writer


def _partial(path: Path) -> Path:
    return path.with_name(f"{PARTIAL}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _advice(path: Path, error: OSError) -> TrmtError:
    return TrmtError(
        f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
    )


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` complete when the block ends, and not at all if it fails."""
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        _discard(partial)
        raise _advice(path, error) from error
    except BaseException:
        _discard(partial)
        raise


def _discard(file: Path) -> None:
    with suppress(OSError):  # what went wrong first is what the user has to hear
        file.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A folder to fill, which takes its place under `path` complete when the block ends.

    A folder cannot be replaced in one call, so the old one steps aside first; a kill between the two
    renames leaves it under a `.partial-` name, and `recover` puts it back.
    """
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        partial.mkdir()
        yield partial
        _sync_folder(partial)
        if path.exists():
            if not replace:
                raise TrmtError(f"{path} exists already; choose another name or remove it first")
            old = path.with_name(f"{PARTIAL}old-{path.name}")
            path.replace(old)
            partial.replace(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.replace(path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _advice(path, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def recover(path: Path) -> None:
    """Bring back the old `path` if a writer was killed while exchanging it for a new one."""
    old = path.with_name(f"{PARTIAL}old-{path.name}")
    if old.exists():
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.replace(path)


def sweep(folder: Path) -> None:
    """Remove what killed writers left in `folder`. Only for folders that one process owns at a time."""
    for left in folder.glob(f"{PARTIAL}*"):
        if left.name.startswith(f"{PARTIAL}old-"):
            recover(left.with_name(left.name.removeprefix(f"{PARTIAL}old-")))
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())


@contextmanager
def only_one(folder: Path, *, job: str = "") -> Iterator[None]:
    """Make `folder` if need be, and keep it to this process; a second one is refused with a sentence.

    The system itself lets go of a lock when its process dies, however it dies. Where another machine
    shares the folder, its lock may not be seen here; then its name in the file counts. Whoever starts the
    processes of a `job` again, maybe elsewhere, has ended the ones before: their file does not count.
    """
    lock = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = _locked(lock, job)
        stream.write(f"{os.getpid()} {platform.node()} {job}".rstrip().encode())
        stream.flush()
    except OSError as error:
        raise _advice(folder, error) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # before it is let go: the next one makes its own
        stream.close()


def _locked(lock: Path, job: str) -> BinaryIO:
    """The lock file, emptied and held; refused where another process holds it."""
    while True:
        stream = os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        held = _hold(stream)
        owner = stream.read().decode(errors="replace").split()
        known = len(owner) >= 2 and owner[0].isdecimal()
        elsewhere = known and owner[1] != platform.node() and owner[2:] != [job]
        at_work = known and held is None and _runs(int(owner[0]))
        if held is False or elsewhere or at_work:
            stream.close()
            who = f"process {owner[0]} on {owner[1]}" if known else "another process"
            raise TrmtError(f"{who} is at work in {lock.parent}; wait for it, or remove {lock} if it is gone")
        # The one who held it may have removed the file between our opening and our holding it.
        if lock.exists() and os.path.samestat(os.fstat(stream.fileno()), lock.stat()):
            stream.seek(0)
            stream.truncate()
            return stream
        stream.close()


def _hold(stream: BinaryIO) -> bool | None:
    """Whether the system's lock on an open file is now ours; None where there are no such locks."""
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


def _runs(process: int) -> bool:
    """Whether there is a process with this number, other than this one."""
    if process == os.getpid():
        return False
    if os.name == "nt":  # there, asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, written atomically."""
    with atomic_file(path) as stream:
        stream.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def checksum(path: Path) -> str:
    """The SHA-256 of a file, as hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
