"""Files behind URLs, through fsspec (s3://, gs://, hdfs://, sftp://, memory:// with their packages).

A file appears under its name complete or not at all. File systems do that by renaming. In an object store a
file appears with its last byte, and renaming is a copy, for which the same holds; a kill between copying and
removing leaves the original behind, under a partial name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from trmt.errors import ConfigError, DataError, TrmtError

# What stands behind :// in the URLs of a protocol, without which some file systems fail half built.
HOSTS = ("http", "https", "ftp", "sftp", "ssh", "smb", "webhdfs")
BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "github")


def is_url(location: Path | str) -> bool:
    """Whether a location is a URL, which fsspec opens, and no local path."""
    return "://" in str(location)


def filesystem(url: str) -> tuple[Any, str]:
    """The file system of fsspec that serves a URL, and the path of the file in it."""
    from fsspec.core import url_to_fs

    _check_host(url)
    try:
        return cast(tuple[Any, str], url_to_fs(url))
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"cannot reach {url}: {_reason(error)}; install what fsspec needs for it, or use a path"
        ) from error
    except Exception as error:  # each file system has its own exceptions
        raise ConfigError(f"cannot reach {url}: {_reason(error)}; check the URL, or use a path") from error


def _check_host(url: str) -> None:
    for part in url.split("::"):
        protocol, separator, rest = part.partition("://")
        name = rest.partition("/")[0]
        if protocol in HOSTS:
            name = name.rpartition("@")[2].partition(":")[0].partition(".")[0]
        if separator and not name and protocol in (*HOSTS, *BUCKETS):
            what = "host" if protocol in HOSTS else "bucket" if protocol != "github" else "repository"
            raise ConfigError(f"{url} names no {what}; write {protocol}://{what.upper()}/FILE, or use a path")


def upload(local: Path, url: str, *, partial_name: str) -> None:
    """Copy a local file to a URL, first under `partial_name` in the same folder."""
    store, path = filesystem(url)
    folder = path.rpartition("/")[0]
    partial = f"{folder}/{partial_name}"
    try:
        store.makedirs(folder, exist_ok=True)
        store.put_file(str(local), partial)
        store.mv(partial, path)
    except Exception as error:  # each store has its own exceptions
        raise TrmtError(f"cannot write {url}: {_reason(error)}; check the URL and its permissions") from error


@contextmanager
def read_errors(location: str) -> Iterator[None]:
    """Turn the exceptions of a file system or store into a DataError of one sentence."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"there is no file {location}; check the path") from error
    except TrmtError:
        raise
    except Exception as error:  # each store has its own exceptions
        raise DataError(
            f"cannot read {location}: {_reason(error)}; check the path and its permissions"
        ) from error


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
