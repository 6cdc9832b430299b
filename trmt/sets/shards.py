"""Prepared sets: checksummed, memory-mapped shards of named columns, with an index that describes them.

A prepared set is a folder:

    index.json                          its contents, the inputs, the size and checksum of each file
    tokenizer/                          the tokenizer that made the ids
    train-00000.source.ids              the ids of shard 0, sentences concatenated
    train-00000.source.ids.offsets      where each sentence begins, and where the last one ends
    train-00000.corpus                  a column with one value per pair has no offsets
    dev.source.txt, dev.target.txt      the text of the dev set, one line per pair

Columns are raw little-endian arrays.
"""

from __future__ import annotations

import hashlib
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
from trmt.sets.index import (
    ADVICE,
    FORMAT,
    INDEX,
    OFFSET_BYTES,
    SplitEntry,
    read_index,
    verify_index,
)
from trmt.storage.files import checksum, recover_folder, write_verified_json
from trmt.trees import read_bytes

Array = NDArray[Any]

TOKENIZER = "tokenizer"
SIDES = ("source", "target")
PAIRS, DOCUMENTS = "pairs", "documents"  # kinds of sets; an index without a kind is of pairs
SHARD_PAIRS = 1 << 20
SHARD_BYTES = 256 << 20
OFFSETS = np.dtype(f"<u{OFFSET_BYTES}")


@dataclass(frozen=True)
class ColumnSpec:
    """The name and type of a column: one value per pair, or a sequence of values if it is ragged."""

    name: str
    dtype: str  # of numpy with the byte order: "<u2"
    ragged: bool = True


class RaggedArray(NamedTuple):
    """Concatenated sequences, and the length of each."""

    values: Array
    lengths: Array

    def select(self, mask: NDArray[np.bool_]) -> RaggedArray:
        """The sequences where `mask` is true."""
        return RaggedArray(self.values[np.repeat(mask, self.lengths.astype(np.int64))], self.lengths[mask])

    def split(self) -> list[Array]:
        """Each sequence as an array of its own; there must be at least one."""
        return np.split(self.values, np.cumsum(self.lengths)[:-1])


ColumnBlock = Mapping[str, RaggedArray | Array]  # the values of some consecutive pairs, by column


# Writing


@dataclass
class _ColumnFile:
    """A file that is being written, with its size and checksum."""

    path: Path
    stream: BinaryIO = field(init=False)
    size: int = 0

    def __post_init__(self) -> None:
        self.stream = self.path.open("wb")
        self._digest = hashlib.sha256()

    def write(self, array: Array) -> None:
        data = array.tobytes()
        self.stream.write(data)
        self._digest.update(data)
        self.size += len(data)

    def entry(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self._digest.hexdigest()}


class ShardWriter:
    """Writes the shards of one split; a new shard begins when one is large enough.

    Where shards end depends on the blocks alone: the same blocks always give the same files.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        columns: Sequence[ColumnSpec],
        shard_pairs: int = SHARD_PAIRS,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder, self.split, self.columns = folder, split, tuple(columns)
        self.shard_pairs, self.shard_bytes = shard_pairs, shard_bytes
        self.files: dict[str, dict[str, Any]] = {}
        self._counts: list[int] = []
        self._open_files: dict[str, _ColumnFile] = {}
        self._ends: dict[str, int] = {}  # the values of each ragged column in the open shard
        self._values = {column.name: 0 for column in columns if column.ragged}  # in all shards

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish_shard()

    def write(self, block: ColumnBlock) -> None:
        """Append the pairs of a block, which has all columns with the same number of pairs."""
        assert set(block) == {column.name for column in self.columns}, "a block has all columns"
        counts = {_count_pairs(values) for values in block.values()}
        assert len(counts) == 1, "the columns of a block have the same number of pairs"
        (count,) = counts
        if not count:
            return
        if not self._open_files:
            self._begin_shard()
        for column in self.columns:
            self._append(column, block[column.name])
        self._counts[-1] += count
        size = sum(file.size for file in self._open_files.values())
        if self._counts[-1] >= self.shard_pairs or size >= self.shard_bytes:
            self._finish_shard()

    def entry(self) -> dict[str, Any]:
        """The entry of this split in the index, once the writer is closed."""
        return {
            "pairs": sum(self._counts),
            "columns": [asdict(column) for column in self.columns],
            "shards": self._counts,
            "values": self._values,
        }

    def _begin_shard(self) -> None:
        number = len(self._counts)
        self._counts.append(0)
        for column in self.columns:
            name = _file_name(self.split, number, column)
            self._open_files[name] = _ColumnFile(self.folder / name)
            if column.ragged:
                offsets = _offsets_name(name)
                self._open_files[offsets] = _ColumnFile(self.folder / offsets)
                self._open_files[offsets].write(np.zeros(1, OFFSETS))
                self._ends[column.name] = 0

    def _append(self, column: ColumnSpec, values: RaggedArray | Array) -> None:
        name = _file_name(self.split, len(self._counts) - 1, column)
        if not isinstance(values, RaggedArray):
            self._open_files[name].write(values.astype(column.dtype, copy=False))
            return
        flat, lengths = values
        ends = self._ends[column.name] + np.cumsum(lengths, dtype=OFFSETS)
        assert int(ends[-1]) - self._ends[column.name] == len(flat), "lengths add up to the values"
        self._open_files[name].write(flat.astype(column.dtype, copy=False))
        self._open_files[_offsets_name(name)].write(ends)
        self._ends[column.name] = int(ends[-1])
        self._values[column.name] += len(flat)

    def _finish_shard(self) -> None:
        for name, file in self._open_files.items():
            file.stream.close()
            self.files[name] = file.entry()
        self._open_files = {}


def _count_pairs(values: RaggedArray | Array) -> int:
    return len(values.lengths) if isinstance(values, RaggedArray) else len(values)


def _file_name(split: str, number: int, column: ColumnSpec) -> str:
    return f"{split}-{number:05d}.{column.name}"


def _offsets_name(name: str) -> str:
    return f"{name}.offsets"


def dev_file(side: str) -> str:
    """The name of the file with the source or target text of the dev set."""
    return f"dev.{side}.txt"


def describe_file(path: Path) -> dict[str, Any]:
    """The entry of a file in the index."""
    return {"bytes": path.stat().st_size, "sha256": checksum(path)}


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write the index, last of all: a folder with an index is a prepared set."""
    write_verified_json(folder / INDEX, {"format": FORMAT, **index})


# Reading


def _map_file(path: Path, dtype: np.dtype[Any], count: int) -> Array:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.empty(0, dtype)


class _Shard:
    """One shard, whose columns are mapped into memory at their first use."""

    def __init__(self, folder: Path, split: str, *, number: int, pairs: int) -> None:
        self.folder, self.split, self.number, self.pairs = folder, split, number, pairs
        self._maps: dict[str, Array] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A pickled map would be a copy of the file; another process maps it again.
        return {**self.__dict__, "_maps": {}}

    def values(self, column: ColumnSpec) -> Array:
        name = _file_name(self.split, self.number, column)
        if name not in self._maps:
            dtype = np.dtype(column.dtype)
            path = self.folder / name
            self._maps[name] = _map_file(path, dtype, path.stat().st_size // dtype.itemsize)
        return self._maps[name]

    def offsets(self, column: ColumnSpec) -> Array:
        name = _offsets_name(_file_name(self.split, self.number, column))
        if name not in self._maps:
            offsets = _map_file(self.folder / name, OFFSETS, self.pairs + 1)
            # Whatever reads values relies on it that each sentence ends where the next one begins.
            if offsets[0] or offsets[-1] != len(self.values(column)) or (offsets[1:] < offsets[:-1]).any():
                raise DataError(
                    f"{self.folder / name} was altered or damaged: it does not fit the values; {ADVICE}"
                )
            self._maps[name] = offsets
        return self._maps[name]


class Split:
    """The pairs of one split, numbered across its shards."""

    def __init__(self, folder: Path, name: str, *, entry: SplitEntry | Mapping[str, Any]) -> None:
        self.name = name
        self._folder = folder
        specs = (ColumnSpec(each["name"], each["dtype"], each["ragged"]) for each in entry["columns"])
        self._columns = {spec.name: spec for spec in specs}  # an entry may have more keys
        self._counts: list[int] = entry["shards"]
        self._begins = np.cumsum([0, *self._counts], dtype=np.int64)
        self._shards = [
            _Shard(folder, name, number=number, pairs=pairs) for number, pairs in enumerate(self._counts)
        ]

    def __len__(self) -> int:
        return int(self._begins[-1])

    @property
    def columns(self) -> tuple[ColumnSpec, ...]:
        """The columns of the split."""
        return tuple(self._columns.values())

    def lengths(self, column: str) -> NDArray[np.int32]:
        """The number of values of each pair in a ragged column."""
        wanted = self._column(column, ragged=True)
        out = np.empty(len(self), np.int32)
        for shard, (begin, end) in zip(self._shards, pairwise(self._begins.tolist()), strict=True):
            out[begin:end] = np.diff(shard.offsets(wanted))
        return out

    def gather(self, column: str, indices: Array) -> RaggedArray:
        """The values of these pairs in a ragged column, in the dtype of the column."""
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
            sizes = lengths[at]
            within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            values = shard.values(wanted)[np.repeat(begins[at], sizes) + within]
            out[np.repeat(ends[at] - sizes, sizes) + within] = values
        return RaggedArray(out, lengths)

    def scalars(self, column: str, indices: Array) -> Array:
        """The values of these pairs in a column that is not ragged."""
        wanted = self._column(column, ragged=False)
        out = np.empty(len(indices), wanted.dtype)
        for shard, at, local in self._by_shard(indices):
            out[at] = shard.values(wanted)[local]
        return out

    def blocks(self, size: int) -> Iterator[ColumnBlock]:
        """All columns of all pairs in order, up to `size` pairs at a time; one shard is mapped at a time."""
        for number, pairs in enumerate(self._counts):
            shard = _Shard(self._folder, self.name, number=number, pairs=pairs)
            for begin in range(0, pairs, size):
                yield self._block(shard, begin, min(begin + size, pairs))

    def _block(self, shard: _Shard, begin: int, end: int) -> ColumnBlock:
        block: dict[str, RaggedArray | Array] = {}
        for column in self.columns:
            if column.ragged:
                offsets = np.array(shard.offsets(column)[begin : end + 1])
                values = np.array(shard.values(column)[int(offsets[0]) : int(offsets[-1])])
                block[column.name] = RaggedArray(values, np.diff(offsets))
            else:
                block[column.name] = np.array(shard.values(column)[begin:end])
        return block

    def _by_shard(self, indices: Array) -> Iterator[tuple[_Shard, Array, Array]]:
        """Each shard of these pairs, with their positions in `indices` and their positions in the shard."""
        numbers = np.searchsorted(self._begins, indices, side="right") - 1
        for number in np.unique(numbers):
            if not 0 <= number < len(self._shards):
                raise IndexError(f"the split {self.name!r} has {len(self)} pairs")
            (at,) = np.nonzero(numbers == number)
            yield self._shards[number], at, np.asarray(indices)[at] - self._begins[number]

    def _column(self, name: str, *, ragged: bool) -> ColumnSpec:
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
        """Open the set in `folder`, after a check that each of its files exists and has its size."""
        folder = Path(folder)
        recover_folder(folder)
        index, raw = read_index(folder)
        for name, entry in index["files"].items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                what = "is missing" if size is None else f"has {size:,} bytes, not {entry['bytes']:,}"
                raise DataError(f"{path} {what}; run `trmt prepare` again")
        return cls(folder, index, fingerprint=hashlib.sha256(raw).hexdigest())

    @property
    def languages(self) -> tuple[str, str]:
        """The source and the target language."""
        source, target = self.index["languages"]
        return source, target

    @property
    def kind(self) -> str:
        """Whether it has pairs of sentences or documents in one language: PAIRS or DOCUMENTS."""
        return str(self.index.get("kind", PAIRS))

    @property
    def tokenizer_folder(self) -> Path:
        """The folder of the tokenizer that made the ids."""
        return self.folder / TOKENIZER

    @cached_property
    def corpus_weights(self) -> NDArray[np.float64]:
        """The weight of each corpus, by its number in the column `corpus`."""
        return np.array([corpus.get("weight", 1.0) for corpus in self.index["corpora"]], np.float64)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return tuple(self.index["splits"])

    def split(self, name: str) -> Split:
        """The pairs of `train` or `dev`."""
        if name not in self.splits:
            raise DataError(f"{self.folder} has no {name} set; run `trmt prepare` again with --{name}")
        return Split(self.folder, name, entry=self.index["splits"][name])

    def dev_text(self) -> tuple[list[str], list[str]]:
        """Source and target text of the dev set, not normalised."""
        count = len(self.split("dev"))
        source, target = (self._dev_lines(dev_file(side), count) for side in SIDES)
        return source, target

    def _dev_lines(self, name: str, count: int) -> list[str]:
        path = self.folder / name
        entry = self.index["files"].get(name)
        raw = read_bytes(path) if entry else b""
        if not entry or hashlib.sha256(raw).hexdigest() != entry["sha256"]:
            raise DataError(f"{path} was altered or damaged: it is not what {INDEX} says; {ADVICE}")
        return _read_text(path, raw, count)

    def verify(self) -> None:
        """Compare every file with its checksum; the first one that differs is a DataError."""
        verify_index(self.folder)
        files = self.index["files"]
        with ThreadPoolExecutor() as threads:
            found = threads.map(checksum, [self.folder / name for name in files])
            for (name, entry), digest in zip(files.items(), found, strict=True):
                if digest != entry["sha256"]:
                    raise DataError(
                        f"{self.folder / name} was altered or damaged: it is not what {INDEX} says; "
                        "run `trmt prepare` again"
                    )


def _read_text(path: Path, raw: bytes, count: int) -> list[str]:
    # Only `\n` ends a line: str.splitlines would also split at U+2028 and others.
    texts = raw.decode(errors="replace").split("\n")[:-1]
    if len(texts) != count:
        raise DataError(f"{path} has {len(texts):,} lines, not {count:,}; run `trmt prepare` again")
    return texts
