"""The manifest of a corpus that is processed in parts: its inputs, how they were cut, and all options.

`manifest.json` is written beside the parts before the first of them and never changed. When a command is run
again, it reads the manifest, refuses to continue if an option or an input has changed, and processes the
missing parts. A part is done if its file exists.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from trmt import console
from trmt.config import Count, build_stored
from trmt.errors import ConfigError, DataError
from trmt.storage import files
from trmt.storage.files import PARTIAL
from trmt.storage.locks import LOCK
from trmt.text.ranges import LineRange
from trmt.trees import TreeError, parse_json, verified, with_checksum

MANIFEST = "manifest.json"
RESERVED = (MANIFEST, LOCK)  # names that an input must not have
FORMAT = 1
MAX_SHOWN = 3  # differences that an error message names


@dataclass(frozen=True)
class InputFile:
    """A file and its ranges, as it was when it was cut."""

    name: str
    bytes: int
    stamp: str  # changes whenever the file is written
    ranges: tuple[LineRange, ...]


@dataclass(frozen=True)
class Partition:
    """Everything that determines the contents of the parts."""

    job: str
    options: Mapping[str, Any]
    inputs: tuple[InputFile, ...]


class StoredInput(TypedDict):
    """An input file in the manifest; a range is its four numbers and its digest as one string."""

    name: str
    bytes: Count
    stamp: str
    ranges: list[str]


@dataclass(frozen=True)
class StoredPartition:
    """What the manifest holds."""

    format: Count
    job: str
    options: dict[str, Any]
    inputs: tuple[StoredInput, ...]


def part_name(number: int, count: int) -> str:
    """The file name of a part; names sort in the order of the parts."""
    return f"part-{number:0{max(len(str(count - 1)), 5)}d}"


def cut_input(name: str, cut: Callable[[str], Sequence[LineRange]]) -> InputFile:
    """Cut a file into ranges, and record its size and time stamp."""
    size, stamp = files.size_and_version(name)
    found = InputFile(name, size, stamp, tuple(cut(name)))
    if size != found.ranges[-1].end:
        raise DataError(f"{name} changes while it is read; wait until it is complete")
    return found


def open_partition(
    folder: str,
    job: str,
    options: Mapping[str, Any],
    *,
    names: Sequence[str],
    cut: Callable[[], Sequence[InputFile]],
) -> Partition:
    """The partition in `folder`: read from its manifest, or made and written if there is none.

    `names` are those of the inputs, which `cut` reads completely. If the manifest differs from what is asked
    for, it is a ConfigError that names the differences.
    """
    path = files.join(folder, MANIFEST)
    existing = _read(path)
    if existing is None:
        foreign = [name for name in files.list_files(folder) if not _is_own(name)]
        if foreign:
            raise ConfigError(
                f"{folder} contains {foreign[0]} but no {MANIFEST}, so it was not made by this command; "
                "choose an empty folder"
            )
        made = Partition(job, options, tuple(cut()))
        _write(path, made)
        return made
    differences = list(
        _differences(_flatten({"job": existing.job, **existing.options}), _flatten({"job": job, **options}))
    )
    differences = differences or list(_changed_inputs(existing.inputs, names, cut))
    if differences:
        more = f", and {len(differences) - MAX_SHOWN} more" if len(differences) > MAX_SHOWN else ""
        raise ConfigError(
            f"{folder} was started with other options or inputs: {'; '.join(differences[:MAX_SHOWN])}{more}; "
            "use the same ones or choose another folder"
        )
    return existing


def missing_parts(folder: str, names: Sequence[str]) -> list[str]:
    """Those of the names for which there is no file yet."""
    existing = set(files.list_files(folder))
    return [name for name in names if name not in existing]


def _is_own(name: str) -> bool:
    return name == LOCK or name.rpartition("/")[2].startswith(PARTIAL)


def _read(path: str) -> Partition | None:
    if not files.is_file(path):
        return None
    with files.open_file(path) as stream:
        raw = stream.read()
    advice = "choose another folder"
    try:
        tree = parse_json(raw)
        stored = build_stored(StoredPartition, tree, where=path, advice=advice, error=DataError)
        verified(tree)
        if stored.format != FORMAT:
            raise TreeError("is of another format")
        inputs = (
            InputFile(each["name"], each["bytes"], each["stamp"], tuple(map(_parse_range, each["ranges"])))
            for each in stored.inputs
        )
        return Partition(stored.job, stored.options, tuple(inputs))
    except ValueError as error:
        raise DataError(f"{path} cannot be read ({error}); {advice}") from error


def _write(path: str, made: Partition) -> None:
    inputs = [{**asdict(each), "ranges": list(map(_format_range, each.ranges))} for each in made.inputs]
    tree: dict[str, Any] = {
        "format": FORMAT,
        "job": made.job,
        "options": dict(made.options),
        "inputs": inputs,
    }
    with files.atomic_file(path) as stream:
        stream.write(json.dumps(with_checksum(tree), indent=2).encode() + b"\n")


def _format_range(one: LineRange) -> str:
    return f"{one.begin} {one.end} {one.first} {one.lines} {one.digest}"


def _parse_range(line: str) -> LineRange:
    *numbers, digest = line.split()
    begin, end, first, lines = map(int, numbers)
    return LineRange(begin, end, first, lines, digest)


def _flatten(tree: Any, path: str = "") -> dict[str, str]:
    """The values in a tree as JSON, by their paths, such as "search.beam"."""
    if isinstance(tree, Mapping):
        branches = ((f"{path}.{key}" if path else str(key), each) for key, each in tree.items())
    elif isinstance(tree, list | tuple):
        branches = ((f"{path}.{number}", each) for number, each in enumerate(tree))
    else:
        return {path: json.dumps(tree, ensure_ascii=False)}
    return {key: value for branch, each in branches for key, value in _flatten(each, branch).items()}


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for key in sorted({*before, *now}):
        old, new = before.get(key, "missing"), now.get(key, "missing")
        if old != new:
            yield f"{key} was {old} and is {new}"


def _changed_inputs(
    before: Sequence[InputFile], names: Sequence[str], cut: Callable[[], Sequence[InputFile]]
) -> Iterator[str]:
    known = [each.name for each in before]
    for name in sorted({*known} ^ {*names}):
        yield f"{name} {'is missing' if name in known else 'is new'}"
    if known != list(names):
        return
    if [files.size_and_version(name) for name in names] == [(each.bytes, each.stamp) for each in before]:
        return
    # The file was copied or touched, or has really changed: only its contents can tell.
    console.say("an input was written since the start; comparing the contents of all inputs")
    for old, new in zip(before, cut(), strict=True):
        if old.ranges != new.ranges:
            yield f"the contents of {old.name} have changed"
