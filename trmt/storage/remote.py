"""Files on disks that several machines see, and in stores that have no disk: one name for either.

A name with `://` in it goes through fsspec (s3://, gs://, hdfs://, sftp://, memory://, with the packages
those need); any other is a path. What is written appears under its name complete or not at all. Renaming
does that on file systems. In object stores a file appears when its last byte has arrived, and what looks like
renaming is a copy, for which the same holds; only a kill between copying and removing leaves the one that was
copied, under a name that `sweep` knows.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from trmt.errors import ConfigError, DataError, TrmtError
from trmt.storage import files
from trmt.storage.files import PARTIAL, atomic_file


def is_remote(name: str) -> bool:
    """Whether a name is to go through fsspec."""
    return "://" in name


def absolute(name: str) -> str:
    """The name as other processes can use it."""
    return name if is_remote(name) else str(Path(name).absolute())


def join(folder: str, name: str) -> str:
    """The name of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder, name))


def is_file(name: str) -> bool:
    """Whether there is such a file."""
    if not is_remote(name):
        return Path(name).is_file()
    store, path = _store(name)
    with _told(name):
        return bool(store.isfile(path))


def files_below(folder: str) -> list[str]:
    """The names of all files in a folder and the folders in it, as seen from there, in order."""
    if not is_remote(folder):
        root = Path(folder)
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    store, path = _store(folder)
    with _told(folder):
        store.invalidate_cache(path)
        found = store.find(path)
    root_length = len(path.rstrip("/")) + 1
    return sorted(each[root_length:] for each in found)


def size_and_stamp(name: str) -> tuple[int, str]:
    """How many bytes a file has, and what changes whenever it is written."""
    if not is_remote(name):
        with _told(name):
            known = Path(name).stat()
        return known.st_size, str(known.st_mtime_ns)
    store, path = _store(name)
    with _told(name):
        return int(store.size(path)), str(store.ukey(path))


def opened(name: str) -> BinaryIO:
    """A file, open for reading bytes anywhere in it."""
    if not is_remote(name):
        with _told(name):
            return Path(name).open("rb")
    store, path = _store(name)
    with _told(name):
        return cast(BinaryIO, store.open(path, "rb"))


def checksum(name: str) -> str:
    """The SHA-256 of a file, as hex digits."""
    with opened(name) as stream, _told(name):
        return hashlib.file_digest(cast(Any, stream), "sha256").hexdigest()


@contextmanager
def published(name: str) -> Iterator[BinaryIO]:
    """A file to write, which appears under its name when the block ends, and not at all if it fails."""
    if not is_remote(name):
        with atomic_file(Path(name)) as stream:
            yield stream
        return
    with tempfile.TemporaryDirectory(prefix="trmt-") as folder:
        local = Path(folder, "file")
        # Not written straight to the store: fsspec publishes what there is of a file when its block fails.
        with local.open("wb") as stream:
            yield stream
        _put(local, name)


def _put(local: Path, name: str) -> None:
    store, path = _store(name)
    parent, _, last = path.rpartition("/")
    partial = f"{parent}/{PARTIAL}{last}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    try:
        store.makedirs(parent, exist_ok=True)
        store.put_file(str(local), partial)
        store.mv(partial, path)
    except Exception as error:  # each store raises what it likes
        raise TrmtError(
            f"cannot write {name}: {_reason(error)}; check the place and its permissions"
        ) from error


def sweep(folder: str) -> None:
    """Remove what killed writers left in a folder and those in it. Only where nobody is writing."""
    for name in files_below(folder):
        if name.rpartition("/")[2].startswith(PARTIAL):
            remove(join(folder, name))


def remove(name: str) -> None:
    """Remove a file, or a folder with all that is in it."""
    if not is_remote(name):
        path = Path(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    store, path_in_store = _store(name)
    with _told(name):
        store.rm(path_in_store, recursive=True)


@contextmanager
def kept_to_one(folder: str) -> Iterator[None]:
    """Keep a folder to this process; in a store, where nothing can be locked, nobody is kept out."""
    if is_remote(folder):
        yield
        return
    with files.only_one(Path(folder)):
        yield


def _store(name: str) -> tuple[Any, str]:
    """The file system of fsspec behind a name, and what the file is called there."""
    from fsspec.core import url_to_fs

    try:
        return cast(tuple[Any, str], url_to_fs(name))
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"cannot reach {name}: {_reason(error)}; install what fsspec needs for it or use a path"
        ) from error


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Errors of a file system or store as one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"there is no file {name}; check the path") from error
    except TrmtError:
        raise
    except Exception as error:  # each store raises what it likes
        raise DataError(
            f"cannot read {name}: {_reason(error)}; check the path and its permissions"
        ) from error


def _reason(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(said).split())
