"""Ranges have every line once, wherever they end; a file that has changed since is an error."""

from __future__ import annotations

import gzip
import io
import random
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import pytest

from trmt.errors import DataError
from trmt.text import ranges
from trmt.text.lines import read_lines
from trmt.text.ranges import FileSlice, LineRange, open_slice, split_after_lines, split_by_size, whole_file

HOSTILE = [
    b"",
    b"\n",
    b"\n\n\n",
    b"one",
    b"one\n",
    b"\xef\xbb\xbf",
    b"\xef\xbb\xbfone\r\n\xef\xbb\xbftwo\r\n",
    b"a\rb\r\rc\n\r\n\r",
    "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\n\u2028\n".encode(),
    b"long " * 50 + b"\n" + b"x\n" * 7 + b"longer " * 60,
]


def some_bytes(seed: int) -> bytes:
    chooser = random.Random(seed)
    pieces = [b"\n", b"\r\n", b"\r", b"\xe2\x80\xa8", b"word ", "ß".encode(), b"\0", b"y" * 40]
    return b"".join(chooser.choices(pieces, k=chooser.randrange(300)))


def check(data: bytes, found: Sequence[LineRange]) -> None:
    """Compare ranges with the bytes: all are there, in order, in whole lines, with counts and digests."""
    ends = [one.end for one in found]
    assert [one.begin for one in found] == [0, *ends[:-1]] and ends[-1] == len(data)
    for one in found:
        mine = data[one.begin : one.end]
        assert mine.endswith(b"\n") or one is found[-1]
        assert one.first == data[: one.begin].count(b"\n")
        assert one.lines == len(mine.split(b"\n")) - (mine.endswith(b"\n") or not mine)
        assert one.digest == blake2b(mine, digest_size=8).hexdigest()
    if data:
        assert all(one.begin < one.end for one in found)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("every", [1, 3])
def test_ranges_of_any_size_have_every_line_once(
    chunk: int, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "CHUNK", chunk)
    for data in [*HOSTILE, *map(some_bytes, range(3 if chunk == 1 else 12))]:
        for size in (1, 2, 10, 100, 5000):
            found = split_by_size(io.BytesIO(data), size=size, every=every)
            check(data, found)
            for one in found[:-1]:
                assert one.end - one.begin >= size and (one.first + one.lines) % every == 0
                # No longer than necessary.
                fewer = data[one.begin : one.end].split(b"\n")[: -1 - every]
                assert len(b"\n".join([*fewer, b""])) < size or not fewer


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_second_file_is_split_after_the_same_lines(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "CHUNK", chunk)
    for seed in range(12):
        data = some_bytes(seed) + b"a\nb\nlast"
        count = data.count(b"\n")
        numbers = sorted(random.Random(seed).sample(range(1, count + 1), min(count, 5)))
        found = split_after_lines(io.BytesIO(data), numbers)
        check(data, found)
        assert [one.first for one in found] == [0, *numbers]


def test_a_second_file_that_is_shorter_has_fewer_ranges() -> None:
    assert len(split_after_lines(io.BytesIO(b"a\nb\n"), [1, 5, 9])) == 2
    assert len(split_after_lines(io.BytesIO(b""), [1])) == 1


@pytest.mark.parametrize("size", [1, 3, 30])
def test_the_slices_of_a_file_have_its_lines(tmp_path: Path, size: int) -> None:
    for number, data in enumerate([*HOSTILE, *map(some_bytes, range(6))]):
        path = tmp_path / f"{size}-{number}"
        path.write_bytes(data)
        found = split_by_size(io.BytesIO(data), size=size)
        # A byte order mark is removed at the beginning of the file, and text at that of another slice.
        lines = [line for one in found for line in read_lines(FileSlice(str(path), one))]
        assert lines == list(read_lines(path))


def test_errors_name_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"good\n" * 10 + b"bad \xff\n" + b"good\n" * 10)
    *found, last = split_by_size(io.BytesIO(path.read_bytes()), size=20)
    [bad] = (one for one in found if one.first <= 10 < one.first + one.lines)
    with pytest.raises(DataError, match="line 11: not valid UTF-8"):
        list(read_lines(FileSlice(str(path), bad)))
    assert list(read_lines(FileSlice(str(path), last)))[-1] == "good"


@pytest.mark.parametrize("changed", [b"one\nTWO\n", b"one\n", b""])
def test_a_file_that_has_changed_since_is_an_error(changed: bytes) -> None:
    [first, second] = split_by_size(io.BytesIO(b"one\ntwo\n"), size=4)
    with pytest.raises(DataError, match="the file has changed"):
        open_slice(io.BytesIO(changed), FileSlice("the file", second)).read()
    if changed:
        assert open_slice(io.BytesIO(changed), FileSlice("the file", first)).read() == b"one\n"


def test_a_compressed_file_is_one_range(tmp_path: Path) -> None:
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(b"one\r\ntwo"))
    with path.open("rb") as stream:
        one = whole_file(stream)
    assert list(read_lines(FileSlice(str(path), one, compressed=True))) == ["one", "two"]
    path.write_bytes(gzip.compress(b"one\r\nTWO"))
    with pytest.raises(DataError, match="has changed"):
        list(read_lines(FileSlice(str(path), one, compressed=True)))
