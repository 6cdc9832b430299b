"""Tensors that lie in slices: each process writes the rows it has, and reads the rows it wants.

    slices-00000-of-00002.safetensors    the rows that one process held, in whole tensors' names
    slices.json                          which rows of which tensor each file has, and its checksum

A slice is a range of rows, so a tensor's bytes are those of its slices one after another: merging them into
one file, or cutting them anew for another number of processes, needs no more memory than a slice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trmt.errors import BundleError
from trmt.storage.files import checksum, write_json

INDEX = "slices.json"
FORMAT = 1
BLOCK = 2**20  # bytes copied at a time


@dataclass(frozen=True)
class Slice:
    """Some rows of a tensor."""

    rows: Tensor
    begin: int  # the number of the first row
    shape: tuple[int, ...]  # of the whole tensor


def chunk(length: int, number: int, count: int) -> tuple[int, int]:
    """The rows from and up to which one of `count` processes holds a tensor of so many; some hold none."""
    size = -(-length // count)
    return min(number * size, length), min((number + 1) * size, length)


def write(folder: Path, slices: Mapping[str, Slice], *, number: int, count: int) -> dict[str, Any]:
    """Write the slices of one process; what the index has to know of them."""
    path = folder / f"slices-{number:05d}-of-{count:05d}.safetensors"
    stored = {name: each.rows.detach().cpu().contiguous() for name, each in slices.items()}
    try:
        save_file(stored, path)
    except SafetensorError as error:  # its own kind even where the system refused to write
        raise OSError(str(error)) from error
    return {
        "file": path.name,
        "sha256": checksum(path),
        "tensors": {
            name: {"shape": list(each.shape), "begin": each.begin, "rows": _rows(each.rows)}
            for name, each in slices.items()
        },
    }


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 1


def write_index(folder: Path, written: Sequence[Mapping[str, Any]]) -> None:
    """Join what `write` said of each process's slices; without this file there are no slices."""
    tensors: dict[str, Any] = {}
    for part in written:
        for name, about in part["tensors"].items():
            entry = tensors.setdefault(name, {"shape": about["shape"], "slices": []})
            if about["rows"]:
                entry["slices"].append([part["file"], about["begin"], about["begin"] + about["rows"]])
    files = {part["file"]: part["sha256"] for part in written}
    write_json(folder / INDEX, {"format": FORMAT, "files": files, "tensors": tensors})


class Slices(Mapping[str, Tensor]):
    """The tensors of a folder with an index, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = json.loads((folder / INDEX).read_bytes())
        if index["format"] != FORMAT:
            raise BundleError(f"{folder} is of format {index['format']}, not {FORMAT}; use a newer trmt")
        self.files: dict[str, str] = index["files"]
        self.tensors: dict[str, Any] = index["tensors"]
        self._open: dict[str, Any] = {}

    def altered(self) -> Path | None:
        """A file that is not as it was written, if there is one."""
        paths = [self.folder / name for name in self.files]
        return next((p for p in paths if not p.is_file() or checksum(p) != self.files[p.name]), None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.tensors[name]["shape"]
        return (
            self.rows(name, 0, shape[0]) if shape else self._file(self._places(name)[0][0]).get_tensor(name)
        )

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """The rows of a tensor from `begin` up to `end`, from whatever files they are in."""
        parts = [
            self._file(file).get_slice(name)[max(begin - first, 0) : min(end, last) - first]
            for file, first, last in self._places(name)
            if first < end and last > begin
        ]
        if parts:
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        file = self._places(name)[0][0]
        return self._file(file).get_slice(name)[0:0]

    def _places(self, name: str) -> list[tuple[str, int, int]]:
        return sorted((tuple(place) for place in self.tensors[name]["slices"]), key=lambda place: place[1])

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]

    def merge(self, path: Path, names: Mapping[str, str]) -> None:
        """Write tensors as one safetensors file, `names` giving for each its name there."""
        heads = {file: _header(self.folder / file) for file in self.files}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, merged in names.items():
            places = self._places(name)
            size = sum(_span(heads[file][name])[1] for file, _, _ in places)
            kind = heads[places[0][0]][name]["dtype"]
            shape = self.tensors[name]["shape"]
            header[merged] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        words = json.dumps(header).encode()
        words += b" " * (-len(words) % 8)  # what follows is aligned, as safetensors wants it
        with path.open("wb") as out:
            out.write(len(words).to_bytes(8, "little") + words)
            for name in names:
                for file, _, _ in self._places(name):
                    _copy(self.folder / file, *_span(heads[file][name]), out)


def _header(path: Path) -> dict[str, Any]:
    """What a safetensors file holds; places are counted from the beginning of the file."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        found: dict[str, Any] = json.loads(stream.read(length))
    found.pop("__metadata__", None)
    for entry in found.values():
        entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
    return found


def _span(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Where a tensor begins in its file, and how many bytes it has."""
    begin, end = entry["data_offsets"]
    return begin, end - begin


def _copy(path: Path, begin: int, size: int, out: Any) -> None:
    with path.open("rb") as stream:
        stream.seek(begin)
        left = size
        while left:
            block = stream.read(min(left, BLOCK))
            out.write(block)
            left -= len(block)
