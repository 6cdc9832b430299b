"""The input and the output of `trmt translate`: standard streams, files, or folders of parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from trmt.cli.common import exit_after_write_error, input_stream, output_stream
from trmt.errors import ConfigError
from trmt.registry import require

STREAM = "-"  # standard input or output


def in_parts(
    source: str | None, out: str | None, *, ray: str | None, part_size: float | None
) -> tuple[str, str] | None:
    """The input and the output folder if the input is translated in parts, and None if it is one stream.

    A folder always is. A file is if the output is an existing folder or ends in a slash, or if an option asks
    for it.
    """
    needed = {"--ray": ray, "--part-size": part_size}
    asked = next((name for name, value in needed.items() if value is not None), None)
    if source in (None, STREAM) or out in (None, STREAM):
        if asked:
            raise ConfigError(f"{asked} is for files translated in parts; give both --input and --output")
        if source and source != STREAM and _is_folder(source):
            raise ConfigError(
                f"{source} is a folder, whose files are translated in parts; add --output FOLDER"
            )
        if out and out != STREAM and _is_folder(out):
            raise ConfigError(
                f"{out} is a folder; name a file with --output, or what to translate with --input"
            )
        return None
    assert source and out
    if not (asked or _is_folder(source) or _is_folder(out)):
        return None
    require("trmt.scale", "--input")
    return source, out


def _is_folder(location: str) -> bool:
    return location.endswith("/") or Path(location).is_dir() or _is_remote_folder(location)


def _is_remote_folder(location: str) -> bool:
    """Whether there are files below a URL."""
    from trmt.storage.files import is_file, list_files
    from trmt.storage.urls import is_url

    return is_url(location) and not is_file(location) and bool(list_files(location))


@contextmanager
def open_input(location: str | None) -> Iterator[BinaryIO]:
    """The text of a file, or of standard input, decompressed if it is compressed."""
    from trmt.storage.compression import Decompressed
    from trmt.storage.files import open_file

    if location in (None, STREAM):
        yield input_stream()
        return
    with open_file(location) as stream:
        yield cast(BinaryIO, Decompressed(stream, location))


@contextmanager
def open_output(location: str | None, source: str | None) -> Iterator[BinaryIO]:
    """A stream to standard output, or to a file that appears complete when the block ends.

    A file whose name ends in .gz and the like is compressed.
    """
    from trmt.storage.compression import compressing
    from trmt.storage.files import atomic_file

    if location in (None, STREAM):
        try:
            yield output_stream()
        except OSError as error:
            exit_after_write_error(error, "translations")
        return
    if (source and location == source) or _is_same_file(location, source):
        raise ConfigError(f"{location} is the input; choose another file for the output")
    with atomic_file(location) as stream:
        packed = compressing(stream, location)
        yield packed
        if packed is not stream:
            packed.close()


def _is_same_file(one: str, other: str | None) -> bool:
    paths = [Path(each) for each in (one, other) if each]
    return len(paths) == 2 and all(path.is_file() for path in paths) and paths[0].samefile(paths[1])
