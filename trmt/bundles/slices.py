"""Tensors saved in row slices: each process writes the rows it has, and reads the rows it needs.

    slices-00000-of-00002.safetensors    the rows of one process, under the names of the whole tensors
    slices.json                          which rows of which tensor each file has, and the file's checksum

A slice is a range of rows, so the bytes of a tensor are those of its slices one after another. Merging them
into one file, or reading them on another number of processes, needs no more memory than one slice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trmt.config import Count, build_stored
from trmt.errors import BundleError
from trmt.storage.files import checksum, write_verified_json
from trmt.trees import TreeError, read_json, shown, verified

INDEX = "slices.json"
FORMAT = 1
COPY_BYTES = 2**20  # copied at a time


@dataclass(frozen=True)
class TensorSlice:
    """Some rows of a tensor."""

    rows: Tensor
    first_row: int  # the index of rows[0] in the whole tensor
    shape: tuple[int, ...]  # of the whole tensor


def row_range(length: int, rank: int, world_size: int) -> tuple[int, int]:
    """The first row of a rank and the row after its last, as torch splits tensors; some ranks have none."""
    size = -(-length // world_size)
    return min(rank * size, length), min((rank + 1) * size, length)


def write_slices(
    folder: Path, slices: Mapping[str, TensorSlice], *, rank: int, world_size: int
) -> dict[str, Any]:
    """Write the slices of one process; returns what the index has to know of them."""
    path = folder / f"slices-{rank:05d}-of-{world_size:05d}.safetensors"
    stored = {name: each.rows.detach().cpu().contiguous() for name, each in slices.items()}
    try:
        save_file(stored, path)
    except SafetensorError as error:  # raised even where the operating system refused to write
        raise OSError(str(error)) from error
    return {
        "file": path.name,
        "sha256": checksum(path),
        "tensors": {
            name: {"shape": list(each.shape), "begin": each.first_row, "rows": _row_count(each.rows)}
            for name, each in slices.items()
        },
    }


def _row_count(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 1


def write_index(folder: Path, written: Sequence[Mapping[str, Any]]) -> None:
    """Write the index from what `write_slices` returned on each process; it makes the slices complete."""
    tensors: dict[str, Any] = {}
    for file in written:
        for name, entry in file["tensors"].items():
            tensor = tensors.setdefault(name, {"shape": entry["shape"], "slices": []})
            if entry["rows"]:
                tensor["slices"].append([file["file"], entry["begin"], entry["begin"] + entry["rows"]])
    files = {file["file"]: file["sha256"] for file in written}
    write_verified_json(folder / INDEX, {"format": FORMAT, "files": files, "tensors": tensors})


class SlicedTensor(TypedDict):
    """What the index has of a tensor."""

    shape: list[Count]
    slices: list[tuple[str, int, int]]  # file, first row, row after the last


@dataclass(frozen=True)
class SlicesIndex:
    """What INDEX holds."""

    format: Count
    files: dict[str, str]  # name -> SHA-256
    tensors: dict[str, SlicedTensor]


def _is_slice(name: str) -> bool:
    return re.fullmatch(r"slices-\d+-of-\d+\.safetensors", name) is not None


class SlicedTensors(Mapping[str, Tensor]):
    """The tensors of a folder with an index, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tree = verified(read_json(folder / INDEX))
        index = build_stored(SlicesIndex, tree, where=str(folder / INDEX), advice="use another checkpoint")
        if index.format != FORMAT:
            raise BundleError(f"{folder} is of format {index.format}, not {FORMAT}; use a newer trmt")
        self.files, self.tensors = index.files, index.tensors
        used = {file for entry in self.tensors.values() for file, _, _ in entry["slices"]}
        for name in {*self.files, *used}:
            if not _is_slice(name):
                raise TreeError(f"names {shown(name)}, which is not a file of slices")
        if not used <= self.files.keys():
            raise TreeError("names files of which it has no checksum")
        self._open: dict[str, Any] = {}

    def shape(self, name: str) -> list[int]:
        """The shape of a whole tensor."""
        return self.tensors[name]["shape"]

    def altered_file(self) -> Path | None:
        """A file that is missing or whose checksum differs, if there is one."""
        paths = [self.folder / name for name in self.files]
        return next((p for p in paths if not p.is_file() or checksum(p) != self.files[p.name]), None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.tensors[name]["shape"]
        if shape:
            return self.rows(name, 0, shape[0])
        return self._file(self._ranges(name)[0][0]).get_tensor(name)

    def rows(self, name: str, begin: int, end: int) -> Tensor:
        """The rows of a tensor from `begin` up to `end`, from the files that have them."""
        ranges = self._ranges(name)
        pieces = [
            self._file(file).get_slice(name)[max(begin - first, 0) : min(end, last) - first]
            for file, first, last in ranges
            if first < end and last > begin
        ]
        if pieces:
            return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return self._file(ranges[0][0]).get_slice(name)[0:0]

    def _ranges(self, name: str) -> list[tuple[str, int, int]]:
        """The slices of a tensor in order: file, first row, row after the last."""
        return sorted(self.tensors[name]["slices"], key=lambda entry: entry[1])

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]

    def merge(self, path: Path, names: Mapping[str, str]) -> None:
        """Write whole tensors to one safetensors file; `names` maps the saved names to those in the file."""
        headers = {file: _read_header(self.folder / file) for file in self.files}
        merged_header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, merged_name in names.items():
            ranges = self._ranges(name)
            size = sum(_byte_range(headers[file][name])[1] for file, _, _ in ranges)
            merged_header[merged_name] = {
                "dtype": headers[ranges[0][0]][name]["dtype"],
                "shape": self.tensors[name]["shape"],
                "data_offsets": [offset, offset + size],
            }
            offset += size
        encoded = json.dumps(merged_header).encode()
        encoded += b" " * (-len(encoded) % 8)  # safetensors wants the data aligned to 8 bytes
        with path.open("wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            for name in names:
                for file, _, _ in self._ranges(name):
                    _copy_bytes(self.folder / file, *_byte_range(headers[file][name]), out)


def _read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, with offsets counted from the beginning of the file."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > path.stat().st_size:
            raise BundleError(f"{path} declares a header longer than the file; save the checkpoint again")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    for entry in header.values():
        entry["data_offsets"] = [8 + length + offset for offset in entry["data_offsets"]]
    return header


def _byte_range(entry: Mapping[str, Any]) -> tuple[int, int]:
    """The offset of a tensor in its file, and its size in bytes."""
    begin, end = entry["data_offsets"]
    return begin, end - begin


def _copy_bytes(path: Path, begin: int, size: int, out: Any) -> None:
    with path.open("rb") as stream:
        stream.seek(begin)
        left = size
        while left:
            block = stream.read(min(left, COPY_BYTES))
            out.write(block)
            left -= len(block)
