"""Ranges hold every line once, wherever they end; what they are read from must be what was cut."""

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
from trmt.text.corpus import lines
from trmt.text.ranges import Range, Slice, cut, cut_after, reading, whole

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


def check(data: bytes, found: Sequence[Range]) -> None:
    """Against the bytes themselves: all are there, in order, in whole lines, counted and digested."""
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
def test_any_cut_holds_every_line_once(chunk: int, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "CHUNK", chunk)
    for data in [*HOSTILE, *map(some_bytes, range(3 if chunk == 1 else 12))]:
        for size in (1, 2, 10, 100, 5000):
            found = cut(io.BytesIO(data), size=size, every=every)
            check(data, found)
            for one in found[:-1]:
                assert one.end - one.begin >= size and (one.first + one.lines) % every == 0
                # And no longer than it has to be.
                fewer = data[one.begin : one.end].split(b"\n")[: -1 - every]
                assert len(b"\n".join([*fewer, b""])) < size or not fewer


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_second_file_is_cut_after_the_same_lines(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "CHUNK", chunk)
    for seed in range(12):
        data = some_bytes(seed) + b"a\nb\nlast"
        count = data.count(b"\n")
        numbers = sorted(random.Random(seed).sample(range(1, count + 1), min(count, 5)))
        found = cut_after(io.BytesIO(data), numbers)
        check(data, found)
        assert [one.first for one in found] == [0, *numbers]


def test_a_second_file_that_is_shorter_has_fewer_ranges() -> None:
    assert len(cut_after(io.BytesIO(b"a\nb\n"), [1, 5, 9])) == 2
    assert len(cut_after(io.BytesIO(b""), [1])) == 1


@pytest.mark.parametrize("size", [1, 3, 30])
def test_the_lines_of_all_slices_are_those_of_the_file(tmp_path: Path, size: int) -> None:
    for number, data in enumerate([*HOSTILE, *map(some_bytes, range(6))]):
        path = tmp_path / f"{size}-{number}"
        path.write_bytes(data)
        found = cut(io.BytesIO(data), size=size)
        # A byte order mark is one at the beginning of the file, and text at that of any other slice.
        assert [line for one in found for line in lines(Slice(str(path), one))] == list(lines(path))


def test_errors_name_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"good\n" * 10 + b"bad \xff\n" + b"good\n" * 10)
    *found, last = cut(io.BytesIO(path.read_bytes()), size=20)
    [bad] = (one for one in found if one.first <= 10 < one.first + one.lines)
    with pytest.raises(DataError, match="line 11: not valid UTF-8"):
        list(lines(Slice(str(path), bad)))
    assert list(lines(Slice(str(path), last)))[-1] == "good"


@pytest.mark.parametrize("changed", [b"one\nTWO\n", b"one\n", b""])
def test_what_has_changed_since_is_not_read(changed: bytes) -> None:
    [first, second] = cut(io.BytesIO(b"one\ntwo\n"), size=4)
    with pytest.raises(DataError, match="the file has changed"):
        reading(io.BytesIO(changed), Slice("the file", second)).read()
    if changed:
        assert reading(io.BytesIO(changed), Slice("the file", first)).read() == b"one\n"


def test_a_packed_file_is_one_range(tmp_path: Path) -> None:
    path = tmp_path / "text.gz"
    path.write_bytes(gzip.compress(b"one\r\ntwo"))
    with path.open("rb") as stream:
        one = whole(stream)
    assert list(lines(Slice(str(path), one, packed=True))) == ["one", "two"]
    path.write_bytes(gzip.compress(b"one\r\nTWO"))
    with pytest.raises(DataError, match="has changed"):
        list(lines(Slice(str(path), one, packed=True)))
