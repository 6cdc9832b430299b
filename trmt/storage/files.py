"""Files and folders that are written atomically, and their checksums.

A location is a local path or a URL that fsspec opens. A URL is always a `str`: a `Path` would drop one of its
slashes. What a killed writer leaves behind has a name that begins with PARTIAL; it is never read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from trmt.errors import TrmtError
from trmt.storage.urls import filesystem, is_url, read_errors, upload
from trmt.trees import with_checksum

PARTIAL = ".partial-"
REPLACED = f"{PARTIAL}old-"  # a folder that was being replaced
STALE = 3600  # seconds without a write after which a partial folder belongs to a killed command


def _partial_name(name: str) -> str:
    return f"{PARTIAL}{name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def write_error(path: Path, error: OSError) -> TrmtError:
    """The error for a path that cannot be written."""
    return TrmtError(f"cannot write {path}: {error.strerror or error}; {write_advice(error)}")


def write_advice(error: OSError) -> str:
    """What to do about an error of writing."""
    # safetensors gives the number in the text only.
    found = re.search(r"os error (\d+)", str(error))
    number = int(found[1]) if found and error.errno is None else error.errno
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a folder that you may write to, or change its permissions"
    if number in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return "there is a file where a folder is needed, or a folder in place of a file; choose another path"
    if number == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if number == errno.EFBIG:
        return "allow larger files (ulimit -f) or choose another path"
    if number in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
        return "free some space or choose another path"
    return "choose another path"


# Writing


@contextmanager
def atomic_file(location: Path | str) -> Iterator[BinaryIO]:
    """A binary file that appears at `location` complete when the block ends, and not at all if it fails."""
    if is_url(location):
        with tempfile.TemporaryDirectory(prefix="trmt-") as folder:
            local = Path(folder, "file")
            # Not written straight to the store: fsspec publishes an incomplete file when the block fails.
            with local.open("wb") as stream:
                yield stream
            name = str(location).rpartition("/")[2]
            upload(local, str(location), partial_name=_partial_name(name))
        return
    path = Path(location)
    partial = path.with_name(_partial_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        _discard(partial)
        raise write_error(path, error) from error
    except BaseException:
        _discard(partial)
        raise


def _discard(file: Path) -> None:
    with suppress(OSError):  # the first error is the one to report
        file.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A folder to fill, which is moved to `path` complete when the block ends.

    A folder cannot be replaced in one call, so the old one is renamed first. A kill between the two renames
    leaves it under its REPLACED name, and `recover_folder` puts it back.
    """
    partial = path.with_name(_partial_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(path)
        partial.mkdir()
        yield partial
        _finish_folder(partial)
        if path.exists():
            if not replace:
                raise TrmtError(f"{path} exists already; choose another name or remove it first")
            old = path.with_name(f"{REPLACED}{path.name}")
            path.replace(old)
            partial.replace(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.replace(path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise write_error(path, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _finish_folder(folder: Path) -> None:
    """Give each file the permissions that new files have, and bring it to the disk.

    Some libraries write a private file and rename it, which nobody else could read.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as stream:
        stream.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def write_verified_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write an object as JSON with a checksum of its values, which `trmt.trees.verified` compares."""
    write_json(path, with_checksum(tree))


# What killed writers left behind


def recover_folder(path: Path) -> None:
    """Put the old folder back at `path` if a writer was killed while it replaced it."""
    try:
        old = path.with_name(f"{REPLACED}{path.name}")
        left = old.exists()
    except (OSError, ValueError):  # no folder can have such a name
        return
    if left:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.replace(path)


def remove_partials(folder: Path | str, *, recursive: bool = False) -> None:
    """Remove what killed writers left in `folder`. Only for folders that one process owns at a time."""
    if is_url(folder):
        for name in list_files(str(folder)):
            if name.rpartition("/")[2].startswith(PARTIAL) and (recursive or "/" not in name):
                remove(join(str(folder), name))
        return
    root = Path(folder)
    for left in [*(root.rglob if recursive else root.glob)(f"{PARTIAL}*")]:
        if left.name.startswith(REPLACED):
            recover_folder(left.with_name(left.name.removeprefix(REPLACED)))
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def remove_stale_partials(path: Path) -> None:
    """Remove what killed writers of the folder `path` left, but not what another process is writing."""
    ours = re.compile(re.escape(f"{PARTIAL}{path.name}") + r"-\d+-[0-9a-f]{8}")
    for left in path.parent.glob(f"{PARTIAL}*"):
        if ours.fullmatch(left.name) and time.time() - _last_written(left) > STALE:
            shutil.rmtree(left, ignore_errors=True)


def _last_written(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
    except OSError:  # a file was removed just now, so the writer is running
        return time.time()


# Reading


def checksum(file: Path | BinaryIO) -> str:
    """The SHA-256 of a file, given by its path or open for reading, as hex digits."""
    if isinstance(file, Path):
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    return hashlib.file_digest(cast(Any, file), "sha256").hexdigest()


def absolute(location: str) -> str:
    """The location as other processes can use it."""
    return location if is_url(location) else str(Path(location).absolute())


def join(folder: str, name: str) -> str:
    """The location of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder, name))


def is_file(location: str) -> bool:
    """Whether there is a file at this location."""
    with read_errors(location):
        if not is_url(location):
            return Path(location).is_file()
        store, path = filesystem(location)
        return bool(store.isfile(path))


def list_files(folder: str) -> list[str]:
    """The names of all files in a folder and its subfolders, relative to it and sorted."""
    if not is_url(folder):
        root = Path(folder)
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    store, path = filesystem(folder)
    with read_errors(folder):
        store.invalidate_cache(path)
        found = store.find(path)
    root_length = len(path.rstrip("/")) + 1
    return sorted(each[root_length:] for each in found)


def size_and_version(location: str) -> tuple[int, str]:
    """The size of a file in bytes, and a text that changes whenever the file is written."""
    with read_errors(location):
        if not is_url(location):
            known = Path(location).stat()
            return known.st_size, str(known.st_mtime_ns)
        store, path = filesystem(location)
        return int(store.size(path)), str(store.ukey(path))


def open_file(location: str) -> BinaryIO:
    """A file, open for reading and seeking; one that cannot be opened is a DataError."""
    with read_errors(location):
        if not is_url(location):
            return Path(location).open("rb")
        store, path = filesystem(location)
        return cast(BinaryIO, store.open(path, "rb"))


def remove(location: str) -> None:
    """Remove a file, or a folder with everything in it."""
    if is_url(location):
        store, path_in_store = filesystem(location)
        with read_errors(location):
            store.rm(path_in_store, recursive=True)
        return
    path = Path(location)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
