"""The index of a prepared set: what it has to hold, and whether the files can be what it says.

Sizes are checked against each other when a set is opened, checksums when it is verified.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

from trmt.config import Count, Within, build_table
from trmt.errors import ConfigError, DataError
from trmt.trees import TreeError, parse_json, read_bytes, shown, verified

FORMAT = 1
INDEX = "index.json"
OFFSET_BYTES = 8  # of each offset of a ragged column
NAME_BYTES = 255  # of a file, which is what file systems allow
ADVICE = "run `trmt prepare` again"


class FileEntry(TypedDict):
    """A file of the set."""

    bytes: Count
    sha256: str


class ColumnEntry(TypedDict):
    """A column of a split."""

    name: str
    dtype: Literal["<u1", "<u2", "<u4", "<u8", "<i4", "<i8", "<f4"]
    ragged: bool


class SplitEntry(TypedDict):
    """A split; `values` are those of each ragged column in all shards."""

    pairs: Count
    columns: list[ColumnEntry]
    shards: list[Count]  # the pairs of each
    values: dict[str, Count]


class CorpusFacts(TypedDict):
    """A corpus that the set was made of; there are counts of its pairs, too."""

    name: NotRequired[str]
    weight: NotRequired[Annotated[float, Within(0, 1e9)]]
    kept: NotRequired[Count]
    documents: NotRequired[Count]


class SetIndex(TypedDict):
    """The index; there may be more keys."""

    format: Literal[1]
    kind: NotRequired[Literal["pairs", "documents"]]
    languages: tuple[str, str]
    side: NotRequired[Literal["source", "target"]]
    vocabulary: NotRequired[list[Count]]
    corpora: list[CorpusFacts]
    splits: dict[str, SplitEntry]
    files: dict[str, FileEntry]


def read_index(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The index of the set in `folder`, and its bytes; one that cannot be used is a DataError."""
    path = folder / INDEX
    try:
        raw = read_bytes(path)
        tree = parse_json(raw)
        if not isinstance(tree, dict) or tree.get("format") != FORMAT:
            raise DataError(
                f"{path} is not of format {FORMAT}; run `trmt prepare` again with this version of trmt"
            )
        index = check_index(tree)
    except FileNotFoundError as error:
        raise DataError(f"{folder} is not a prepared set; {_advice(folder)}") from error
    except NotADirectoryError as error:
        raise DataError(f"{folder} is a file and not a prepared set; {_advice(folder)}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except TreeError as error:
        raise DataError(f"{path} {error}; remove {folder} and {ADVICE}") from error
    except ConfigError as error:
        what = str(error).partition(";")[0]
        raise DataError(f"{path} is not the index of a prepared set ({what}); {ADVICE}") from error
    for name in index["files"]:
        _check_name(path, name)
    for name, split in index["splits"].items():
        _check_sizes(path, name, split, index["files"])
    return index, raw


def _advice(folder: Path) -> str:
    """What to do about a folder that is no prepared set; what else it holds must not be overwritten."""
    if not folder.exists():
        return f"make one with `trmt prepare -o {folder} --train CORPUS`, or check the path"
    return "name a folder that `trmt prepare` wrote, or prepare the text into a folder of its own"


def check_index(tree: Any) -> dict[str, Any]:
    """The values of an index, if they have the right types; else a ConfigError."""
    return cast(dict[str, Any], build_table(SetIndex, tree, where="index"))


def verify_index(folder: Path) -> None:
    """Compare the index with its checksum, if it has one; older sets have none."""
    path = folder / INDEX
    try:
        verified(parse_json(read_bytes(path)))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    except TreeError as error:
        raise DataError(f"{path} {error}; {ADVICE}") from error


def _check_name(path: Path, name: str) -> None:
    """Refuse the name of a file that lies outside the folder, or that no file can have."""
    parts = PurePosixPath(name).parts
    plain = parts and not name.startswith("/") and ".." not in parts and not re.search(r"[\0\\]", name)
    if not plain or max(len(part.encode()) for part in parts) > NAME_BYTES:
        raise DataError(f"{path} names {shown(name)}, which cannot be a file of the set; {ADVICE}")


def _check_sizes(path: Path, name: str, split: SplitEntry, files: Mapping[str, FileEntry]) -> None:
    """Compare the pairs of a split with the sizes of its files."""
    if sum(split["shards"]) != split["pairs"]:
        raise DataError(f"{path} has shards of {name} that are not its {split['pairs']:,} pairs; {ADVICE}")
    for number, pairs in enumerate(split["shards"]):
        for column in split["columns"]:
            file = f"{name}-{number:05d}.{column['name']}"
            width = int(column["dtype"][-1])
            sizes = {
                each: files[each]["bytes"] if each in files else -1 for each in (file, f"{file}.offsets")
            }
            fits = sizes[file] == pairs * width
            if column["ragged"]:
                fits = sizes[file] >= 0 and not sizes[file] % width
                fits = fits and sizes[f"{file}.offsets"] == (pairs + 1) * OFFSET_BYTES
            if not fits:
                raise DataError(f"{path} has other sizes than {file} with {pairs:,} pairs has; {ADVICE}")
