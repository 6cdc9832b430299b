"""What a corpus is cut into and what is asked for, in a file beside the parts that are made of it.

The file, `manifest.json`, is written before any part is begun and never again. A second start reads it, is
refused if anything else is asked for or an input is not what it was, and goes on with the parts that are not
there. What says that a part is done is that it is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trmt import console
from trmt.errors import ConfigError, DataError
from trmt.storage import files
from trmt.storage.files import PARTIAL
from trmt.storage.locks import LOCK
from trmt.text.ranges import LineRange

MANIFEST = "manifest.json"
RESERVED = (MANIFEST, LOCK)  # what an input must not be called
FORMAT = 1
SHOWN = 3  # differences that a refusal names


@dataclass(frozen=True)
class Input:
    """A file as it was when it was cut."""

    name: str
    bytes: int
    stamp: str  # changes whenever the file is written
    ranges: tuple[LineRange, ...]


@dataclass(frozen=True)
class Partition:
    """All that decides what the parts hold."""

    job: str
    options: Mapping[str, Any]
    inputs: tuple[Input, ...]


def part_name(number: int, of: int) -> str:
    """What a part is called: the order of names is the order of parts."""
    return f"part-{number:0{max(len(str(of - 1)), 5)}d}"


def measured(name: str, cut: Callable[[str], Sequence[LineRange]]) -> Input:
    """An input, cut."""
    size, stamp = files.size_and_version(name)
    found = Input(name, size, stamp, tuple(cut(name)))
    if size != found.ranges[-1].end:
        raise DataError(f"{name} changes while it is read; wait until it is written")
    return found


def begun(
    folder: str,
    job: str,
    options: Mapping[str, Any],
    *,
    names: Sequence[str],
    cut: Callable[[], Sequence[Input]],
) -> Partition:
    """The partition in `folder`, written now or found there; what differs from an earlier one is an error.

    `names` are those of the inputs, which `cut` reads through.
    """
    path = files.join(folder, MANIFEST)
    before = _read(path)
    if before is None:
        foreign = [name for name in files.list_files(folder) if not _harmless(name)]
        if foreign:
            raise ConfigError(
                f"{folder} holds {foreign[0]} and no {MANIFEST}, so it is not of this command; choose an "
                "empty folder"
            )
        made = Partition(job, options, tuple(cut()))
        _write(path, made)
        return made
    differing = list(
        _differences(_flat({"job": before.job, **before.options}), _flat({"job": job, **options}))
    )
    differing = differing or list(_changed(before.inputs, names, cut))
    if differing:
        more = f", and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise ConfigError(
            f"{folder} was begun otherwise: {'; '.join(differing[:SHOWN])}{more}; ask for the same again or "
            "choose another folder"
        )
    return before


def missing(folder: str, names: Sequence[str]) -> list[str]:
    """Those of the names that are not yet there."""
    there = set(files.list_files(folder))
    return [name for name in names if name not in there]


def _harmless(name: str) -> bool:
    return name == LOCK or name.rpartition("/")[2].startswith(PARTIAL)


def _read(path: str) -> Partition | None:
    if not files.is_file(path):
        return None
    with files.open_file(path) as stream:
        raw = stream.read()
    try:
        tree = json.loads(raw)
        if tree["format"] != FORMAT:
            raise ValueError("of another format")
        inputs = (Input(**{**each, "ranges": tuple(map(_range, each["ranges"]))}) for each in tree["inputs"])
        return Partition(tree["job"], tree["options"], tuple(inputs))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); choose another folder") from error


def _write(path: str, made: Partition) -> None:
    inputs = [{**asdict(each), "ranges": list(map(_line, each.ranges))} for each in made.inputs]
    tree = {"format": FORMAT, "job": made.job, "options": dict(made.options), "inputs": inputs}
    with files.atomic_file(path) as stream:
        stream.write(json.dumps(tree, indent=2).encode() + b"\n")


def _line(one: LineRange) -> str:
    return f"{one.begin} {one.end} {one.first} {one.lines} {one.digest}"


def _range(line: str) -> LineRange:
    *numbers, digest = line.split()
    begin, end, first, lines = map(int, numbers)
    return LineRange(begin, end, first, lines, digest)


def _flat(tree: Any, place: str = "") -> dict[str, str]:
    """Every value in a tree as JSON, by where it stands."""
    if isinstance(tree, Mapping):
        branches = ((f"{place}.{key}" if place else str(key), each) for key, each in tree.items())
    elif isinstance(tree, list | tuple):
        branches = ((f"{place}.{number}", each) for number, each in enumerate(tree))
    else:
        return {place: json.dumps(tree, ensure_ascii=False)}
    return {key: value for where, each in branches for key, value in _flat(each, where).items()}


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for key in sorted({*before, *now}):
        one, other = before.get(key, "not there"), now.get(key, "not there")
        if one != other:
            yield f"{key} was {one} and is {other}"


def _changed(
    before: Sequence[Input], names: Sequence[str], cut: Callable[[], Sequence[Input]]
) -> Iterator[str]:
    known = [each.name for each in before]
    for name in sorted({*known} ^ {*names}):
        yield f"{name} {'is gone' if name in known else 'is new'}"
    if known != list(names):
        return
    if [files.size_and_version(name) for name in names] == [(each.bytes, each.stamp) for each in before]:
        return
    # Copied or touched: what is in them decides.
    console.say("an input was written since; comparing what is in all of them")
    for one, other in zip(before, cut(), strict=True):
        if one.ranges != other.ranges:
            yield f"what is in {one.name} has changed"
