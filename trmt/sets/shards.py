"""Prepared sets: checksummed, memory-mapped shards of named columns, with an index that describes them.

A prepared set is a folder:

    index.json                          what is in it, what it was made from, size and checksum of each file
    tokenizer/                          the tokenizer that made the ids
    train-00000.source.ids              the ids of shard 0, one sentence after the other
    train-00000.source.ids.offsets      where each sentence begins, and at last where the shard ends
    train-00000.corpus                  a column with one value for each pair has no offsets
    dev.source.txt, dev.target.txt      the text of the dev set, one line for each of its pairs

Columns are raw little-endian arrays. This file knows columns and pairs, and nothing of what they mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trmt.errors import DataError
from trmt.storage.files import checksum, recover, write_json

Array = NDArray[Any]

FORMAT = 1
INDEX = "index.json"
TOKENIZER = "tokenizer"
KEYS = {"languages", "corpora", "splits", "files"}
SIDES = ("source", "target")
PAIRS, DOCUMENTS = "pairs", "documents"  # kinds of sets; without a word a set holds pairs
SHARD_PAIRS = 1 << 20
SHARD_BYTES = 256 << 20
OFFSETS = np.dtype("<u8")


@dataclass(frozen=True)
class Column:
    """A named column: one value for each pair, or, where it is ragged, a run of values."""

    name: str
    dtype: str  # as numpy spells it, byte order included: "<u2"
    ragged: bool = True


class Ragged(NamedTuple):
    """Runs of values, one after the other in `values`, and how long each is."""

    values: Array
    lengths: Array

    def select(self, mask: NDArray[np.bool_]) -> Ragged:
        """The runs where `mask` is true."""
        return Ragged(self.values[np.repeat(mask, self.lengths.astype(np.int64))], self.lengths[mask])


Block = Mapping[str, Ragged | Array]  # a run of pairs: for each column its values


# Writing


@dataclass
class _Stream:
    """A file on its way to the disk, with its checksum."""

    path: Path
    file: BinaryIO = field(init=False)
    size: int = 0

    def __post_init__(self) -> None:
        self.file = self.path.open("wb")
        self._digest = hashlib.sha256()

    def write(self, array: Array) -> None:
        data = array.tobytes()
        self.file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def entry(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self._digest.hexdigest()}


class ShardWriter:
    """Writes the shards of one split; a new shard begins where one has grown large enough.

    Where shards end depends on the blocks alone, so the same blocks always give the same files.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        columns: Sequence[Column],
        shard_pairs: int = SHARD_PAIRS,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder, self.split, self.columns = folder, split, tuple(columns)
        self.shard_pairs, self.shard_bytes = shard_pairs, shard_bytes
        self.files: dict[str, dict[str, Any]] = {}
        self._counts: list[int] = []
        self._streams: dict[str, _Stream] = {}
        self._ends: dict[str, int] = {}  # of each ragged column, in the open shard
        self._values = {column.name: 0 for column in columns if column.ragged}  # in all shards

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def write(self, block: Block) -> None:
        """Append the pairs of a block, which has all the columns, each with the same number of pairs."""
        assert set(block) == {column.name for column in self.columns}, "a block has all the columns"
        counts = {_pairs_in(part) for part in block.values()}
        assert len(counts) == 1, "the columns of a block are equally long"
        (count,) = counts
        if not count:
            return
        if not self._streams:
            self._begin()
        for column in self.columns:
            self._append(column, block[column.name])
        self._counts[-1] += count
        size = sum(stream.size for stream in self._streams.values())
        if self._counts[-1] >= self.shard_pairs or size >= self.shard_bytes:
            self._finish()

    def entry(self) -> dict[str, Any]:
        """What the index says of this split, once the writer is closed."""
        return {
            "pairs": sum(self._counts),
            "columns": [asdict(column) for column in self.columns],
            "shards": self._counts,
            "values": self._values,
        }

    def _begin(self) -> None:
        number = len(self._counts)
        self._counts.append(0)
        for column in self.columns:
            name = _file_name(self.split, number, column)
            self._streams[name] = _Stream(self.folder / name)
            if column.ragged:
                offsets = _offsets_name(name)
                self._streams[offsets] = _Stream(self.folder / offsets)
                self._streams[offsets].write(np.zeros(1, OFFSETS))
                self._ends[column.name] = 0

    def _append(self, column: Column, part: Ragged | Array) -> None:
        name = _file_name(self.split, len(self._counts) - 1, column)
        if not isinstance(part, Ragged):
            self._streams[name].write(part.astype(column.dtype, copy=False))
            return
        ends = self._ends[column.name] + np.cumsum(part.lengths, dtype=OFFSETS)
        assert int(ends[-1]) - self._ends[column.name] == len(part.values), "lengths add up to the values"
        self._streams[name].write(part.values.astype(column.dtype, copy=False))
        self._streams[_offsets_name(name)].write(ends)
        self._ends[column.name] = int(ends[-1])
        self._values[column.name] += len(part.values)

    def _finish(self) -> None:
        for name, stream in self._streams.items():
            stream.file.close()
            self.files[name] = stream.entry()
        self._streams = {}


def _pairs_in(part: Ragged | Array) -> int:
    return len(part.lengths) if isinstance(part, Ragged) else len(part)


def _file_name(split: str, number: int, column: Column) -> str:
    return f"{split}-{number:05d}.{column.name}"


def _offsets_name(name: str) -> str:
    return f"{name}.offsets"


def dev_file(side: str) -> str:
    """The name of the file with the dev set's text of `source` or `target`."""
    return f"dev.{side}.txt"


def describe_file(path: Path) -> dict[str, Any]:
    """The entry of a file in the index."""
    return {"bytes": path.stat().st_size, "sha256": checksum(path)}


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write the index; it is what makes a folder a prepared set, so it comes last."""
    write_json(folder / INDEX, {"format": FORMAT, **index})


# Reading


def _map(path: Path, dtype: np.dtype[Any], count: int) -> Array:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.empty(0, dtype)


class _Shard:
    """One shard with its columns mapped into memory when they are first asked for."""

    def __init__(self, folder: Path, split: str, *, number: int, pairs: int) -> None:
        self.folder, self.split, self.number, self.pairs = folder, split, number, pairs
        self._maps: dict[str, Array] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Pickled, a map would be a copy of the file; another process makes its own.
        return {**self.__dict__, "_maps": {}}

    def values(self, column: Column) -> Array:
        name = _file_name(self.split, self.number, column)
        if name not in self._maps:
            dtype = np.dtype(column.dtype)
            path = self.folder / name
            self._maps[name] = _map(path, dtype, path.stat().st_size // dtype.itemsize)
        return self._maps[name]

    def offsets(self, column: Column) -> Array:
        name = _offsets_name(_file_name(self.split, self.number, column))
        if name not in self._maps:
            self._maps[name] = _map(self.folder / name, OFFSETS, self.pairs + 1)
        return self._maps[name]


class Split:
    """The pairs of one split, numbered through all of its shards."""

    def __init__(self, folder: Path, name: str, *, entry: Mapping[str, Any]) -> None:
        self.name = name
        self._folder = folder
        self._columns = {column["name"]: Column(**column) for column in entry["columns"]}
        self._counts: list[int] = entry["shards"]
        self._begins = np.cumsum([0, *self._counts], dtype=np.int64)
        self._shards = [
            _Shard(folder, name, number=number, pairs=pairs) for number, pairs in enumerate(self._counts)
        ]

    def __len__(self) -> int:
        return int(self._begins[-1])

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns that each pair has."""
        return tuple(self._columns.values())

    def lengths(self, column: str) -> NDArray[np.int32]:
        """How many values each pair has in a ragged column."""
        wanted = self._column(column, ragged=True)
        out = np.empty(len(self), np.int32)
        for shard, (begin, end) in zip(self._shards, pairwise(self._begins.tolist()), strict=True):
            out[begin:end] = np.diff(shard.offsets(wanted))
        return out

    def gather(self, column: str, indices: Array) -> tuple[Array, NDArray[np.int64]]:
        """The values of these pairs one after the other, in the column's own type, and their lengths."""
        wanted = self._column(column, ragged=True)
        begins = np.empty(len(indices), np.int64)
        lengths = np.empty(len(indices), np.int64)
        parts = list(self._by_shard(indices))
        for shard, at, local in parts:
            offsets = shard.offsets(wanted)
            begins[at] = offsets[local]
            lengths[at] = offsets[local + 1].astype(np.int64) - begins[at]
        ends = np.cumsum(lengths)
        out = np.empty(int(ends[-1]) if len(ends) else 0, wanted.dtype)
        for shard, at, _ in parts:
            runs = lengths[at]
            within = np.arange(int(runs.sum())) - np.repeat(np.cumsum(runs) - runs, runs)
            values = shard.values(wanted)[np.repeat(begins[at], runs) + within]
            out[np.repeat(ends[at] - runs, runs) + within] = values
        return out, lengths

    def scalars(self, column: str, indices: Array) -> Array:
        """The value of each of these pairs in a column that is not ragged."""
        wanted = self._column(column, ragged=False)
        out = np.empty(len(indices), wanted.dtype)
        for shard, at, local in self._by_shard(indices):
            out[at] = shard.values(wanted)[local]
        return out

    def blocks(self, size: int) -> Iterator[dict[str, Ragged | Array]]:
        """All columns of all pairs in order, up to `size` pairs at a time; one shard is mapped at a time."""
        for number, pairs in enumerate(self._counts):
            shard = _Shard(self._folder, self.name, number=number, pairs=pairs)
            for begin in range(0, pairs, size):
                yield self._block(shard, begin, min(begin + size, pairs))

    def _block(self, shard: _Shard, begin: int, end: int) -> dict[str, Ragged | Array]:
        block: dict[str, Ragged | Array] = {}
        for column in self.columns:
            if column.ragged:
                offsets = np.array(shard.offsets(column)[begin : end + 1])
                values = np.array(shard.values(column)[int(offsets[0]) : int(offsets[-1])])
                block[column.name] = Ragged(values, np.diff(offsets))
            else:
                block[column.name] = np.array(shard.values(column)[begin:end])
        return block

    def _by_shard(self, indices: Array) -> Iterator[tuple[_Shard, Array, Array]]:
        """Each shard that `indices` touch, with the places in `indices` and the places in the shard."""
        numbers = np.searchsorted(self._begins, indices, side="right") - 1
        for number in np.unique(numbers):
            if not 0 <= number < len(self._shards):
                raise IndexError(f"the split {self.name!r} has {len(self)} pairs")
            (at,) = np.nonzero(numbers == number)
            yield self._shards[number], at, np.asarray(indices)[at] - self._begins[number]

    def _column(self, name: str, *, ragged: bool) -> Column:
        column = self._columns.get(name)
        if column is None:
            raise DataError(
                f"the split {self.name!r} in {self._folder} has no column {name!r}, only "
                f"{', '.join(self._columns)}; run `trmt prepare` again with this version of trmt"
            )
        assert column.ragged == ragged, f"{name} is {'not ' if ragged else ''}ragged"
        return column


class PreparedSet:
    """A prepared set opened for reading."""

    def __init__(self, folder: Path, index: dict[str, Any], *, fingerprint: str) -> None:
        self.folder, self.index, self.fingerprint = folder, index, fingerprint

    @classmethod
    def open(cls, folder: Path | str) -> PreparedSet:
        """Open the set in `folder`, after making sure that each of its files is there and has its size."""
        folder = Path(folder)
        recover(folder)
        index, raw = _read_index(folder)
        for name, entry in index["files"].items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                what = "is missing" if size is None else f"has {size:,} bytes, not {entry['bytes']:,}"
                raise DataError(f"{path} {what}; run `trmt prepare` again")
        return cls(folder, index, fingerprint=hashlib.sha256(raw).hexdigest())

    @property
    def languages(self) -> tuple[str, str]:
        """The language translated from, and the one translated to."""
        source, target = self.index["languages"]
        return source, target

    @property
    def kind(self) -> str:
        """Whether it holds pairs of sentences or documents in one language."""
        return str(self.index.get("kind", PAIRS))

    @property
    def tokenizer_folder(self) -> Path:
        """The tokenizer that made the ids."""
        return self.folder / TOKENIZER

    @cached_property
    def corpus_weights(self) -> NDArray[np.float64]:
        """The weight of each corpus; the column `corpus` numbers them."""
        return np.array([corpus["weight"] for corpus in self.index["corpora"]], np.float64)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits there are."""
        return tuple(self.index["splits"])

    def split(self, name: str) -> Split:
        """The pairs of `train` or `dev`."""
        if name not in self.splits:
            raise DataError(f"{self.folder} has no {name} set; run `trmt prepare` again with --{name}")
        return Split(self.folder, name, entry=self.index["splits"][name])

    def dev_text(self) -> tuple[list[str], list[str]]:
        """Source and target of the dev set as they were before any normalisation."""
        count = len(self.split("dev"))
        source, target = (_read_text(self.folder / dev_file(side), count) for side in SIDES)
        return source, target

    def verify(self) -> None:
        """Compare every file with its checksum; the first that was altered is a DataError."""
        files = self.index["files"]
        with ThreadPoolExecutor() as threads:
            found = threads.map(checksum, [self.folder / name for name in files])
            for (name, entry), digest in zip(files.items(), found, strict=True):
                if digest != entry["sha256"]:
                    raise DataError(
                        f"{self.folder / name} was altered or damaged: it is not what {INDEX} says; "
                        "run `trmt prepare` again"
                    )


def _read_text(path: Path, count: int) -> list[str]:
    # `\n` alone ends a line: str.splitlines would also cut at U+2028 and its kind.
    texts = path.read_bytes().decode().split("\n")[:-1]
    if len(texts) != count:
        raise DataError(f"{path} has {len(texts):,} lines, not {count:,}; run `trmt prepare` again")
    return texts


def _read_index(folder: Path) -> tuple[dict[str, Any], bytes]:
    path = folder / INDEX
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{folder} is not a prepared set; make one with `trmt prepare {folder}`") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    try:
        index = json.loads(raw)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON; remove {folder} and run `trmt prepare` again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT or not index.keys() >= KEYS:
        raise DataError(f"{path} is not of format {FORMAT}; run `trmt prepare` again with this trmt")
    return index, raw
