"""Packed weights in the user's cache, written once and mapped by every process that wants them.

A file is named by the checksum of the weights it was packed from, their precision and the layout. Only the
weights that products read are in it, and they are pages of the file: workers share one copy. A file that is
damaged, holds something else, or can be written by another user, is written again. When the files together
grow beyond LIMIT, those that were not used for longest go.

Axes: N outputs, K inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trmt.errors import TrmtError
from trmt.native import build
from trmt.storage.files import atomic_file

LAYOUT = 1  # to be raised with whatever changes how weights are packed
LIMIT = 4 << 30  # bytes of all files
WORTH = 4 << 20  # bytes below which packing again costs less than looking
ALIGNED = 64
SAMPLE = 4096  # numbers of a matrix by which it is known again
HEADER = 64  # digits of the checksum of all that follows

Packed = tuple[Tensor, Tensor | None, Tensor | None]  # packed weights, scales, shifts
# What each of them has to be: its dtype and how many numbers it has
Layout = tuple[tuple[torch.dtype, int] | None, ...]
_KINDS = {"int8": torch.int8, "int32": torch.int32, "float32": torch.float32}


class PackedWeightCache:
    """The packed weights of one network, in the order in which it asks for them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found = _read(path)
        self._used: list[tuple[str, Packed]] = []
        self._complete = True  # whether all that was asked for was there

    @classmethod
    def of(cls, weights: str, precision: str) -> PackedWeightCache:
        """The cache of the weights with this checksum."""
        name = hashlib.sha256(f"{weights} {precision} {LAYOUT}".encode()).hexdigest()[:32]
        return cls(build.cache_folder() / "packed" / name)

    def take(self, weight_NK: Tensor, pack: Callable[[], Packed], layout: Layout) -> Packed:
        """The parts of the next matrix; packed by `pack` unless they are there in this layout."""
        known = _known_by(weight_NK)
        place = len(self._used)
        found, parts = self._found[place] if place < len(self._found) else ("", None)
        if parts is None or found != known or _layout(parts) != layout:
            parts, self._complete = pack(), False
        self._used.append((known, parts))
        return parts

    def save(self) -> None:
        """Write what was not there; a cache that cannot be written is left out."""
        size = sum(part.nbytes for _, parts in self._used for part in parts if part is not None)
        if size < WORTH:
            return
        with suppress(OSError, TrmtError):
            if self._complete and len(self._used) == len(self._found):
                os.utime(self.path)  # for the order in which files go
                return
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not build.is_private(self.path.parent):  # nothing is read from there either
                return
            _write(self.path, self._used)
            self.path.chmod(0o600)  # whatever the umask is
            _evict(self.path.parent, keep=self.path)


def _layout(parts: Packed) -> Layout:
    return tuple(part if part is None else (part.dtype, part.numel()) for part in parts)


def _known_by(weight_NK: Tensor) -> str:
    flat = weight_NK.detach().flatten()
    some = flat[:: -(-flat.numel() // SAMPLE)].contiguous()
    made = hashlib.sha256(str(tuple(weight_NK.shape)).encode())
    made.update(some.view(torch.uint8).numpy().tobytes())
    return made.hexdigest()[:32]


def _write(path: Path, taken: Sequence[tuple[str, Packed]]) -> None:
    """A checksum, the length of a table, the table, and the parts on whole cache lines."""
    entries: list[dict[str, Any]] = []
    at = 0
    for known, parts in taken:
        described = []
        for part in parts:
            if part is not None:
                kind = str(part.dtype).removeprefix("torch.")
                described.append({"kind": kind, "at": at, "count": part.numel()})
                at += -(-part.nbytes // ALIGNED) * ALIGNED
        entries.append({"known": known, "parts": described})
    table = json.dumps(entries).encode()
    length = f"{len(table):>{ALIGNED}}".encode()
    pieces: list[Any] = [length, table.ljust(-(-len(table) // ALIGNED) * ALIGNED)]
    for _, parts in taken:
        for part in parts:
            if part is not None:
                raw = part.view(torch.uint8).numpy().data
                pieces += [raw, bytes(-part.nbytes % ALIGNED)]
    made = hashlib.sha256()
    for piece in pieces:
        made.update(piece)
    with atomic_file(path) as stream:
        stream.write(made.hexdigest().encode())
        for piece in pieces:
            stream.write(piece)


def _read(path: Path) -> list[tuple[str, Packed]]:
    """What is in a file, mapped; nothing if it is not there, damaged or not one of ours."""
    try:
        if not (build.is_private(path.parent) and build.is_private(path)):
            return []
        # Copied on write, which never happens, since torch does not want memory that cannot be written.
        whole = np.memmap(path, np.uint8, mode="c")
        if hashlib.sha256(whole[HEADER:].data).hexdigest().encode() != whole[:HEADER].tobytes():
            return []
        length = int(whole[HEADER : HEADER + ALIGNED].tobytes())
        begin = HEADER + ALIGNED
        entries = json.loads(whole[begin : begin + length].tobytes())
        begin += -(-length // ALIGNED) * ALIGNED
        return [(entry["known"], _tensors(whole, begin, entry["parts"])) for entry in entries]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError):
        return []


def _tensors(whole: Any, begin: int, described: list[dict[str, Any]]) -> Packed:
    tensors: list[Tensor | None] = []
    for part in described:
        kind = _KINDS[part["kind"]]
        first = begin + part["at"]
        raw = whole[first : first + part["count"] * kind.itemsize]
        tensors.append(torch.from_numpy(raw).view(kind))
    packed, scale, shift = [*tensors, None, None][:3]
    if packed is None:
        raise ValueError("a matrix has no parts")
    return packed, scale, shift


def _evict(folder: Path, *, keep: Path) -> None:
    files = [(file.stat(), file) for file in folder.iterdir() if file != keep]
    total = keep.stat().st_size
    for facts, file in sorted(files, key=lambda pair: -pair[0].st_mtime):
        total += facts.st_size
        if total > LIMIT:
            file.unlink(missing_ok=True)
