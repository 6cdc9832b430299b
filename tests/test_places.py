"""Files on disks and in stores are alike: whole or not there, found again, and errors are one sentence."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from trmt.errors import ConfigError, DataError, TrmtError
from trmt.storage import remote
from trmt.storage.files import PARTIAL


@pytest.fixture(params=["disk", "file://", "memory://"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory://":
        return f"memory://{uuid.uuid4().hex}"
    return str(tmp_path) if request.param == "disk" else f"file://{tmp_path}"


def test_what_is_published_is_found(folder: str) -> None:
    assert remote.files_below(folder) == []
    for name in ("b/part-00000", "a"):
        with remote.published(remote.join(folder, name)) as stream:
            stream.write(name.encode())
            assert name not in remote.files_below(folder), "it is not complete yet"
    assert remote.files_below(folder) == ["a", "b/part-00000"]
    with remote.opened(remote.join(folder, "b/part-00000")) as stream:
        stream.seek(2)
        assert stream.read() == b"part-00000"
    assert remote.is_file(remote.join(folder, "a")) and not remote.is_file(remote.join(folder, "b"))


def test_a_second_one_takes_the_place_of_the_first(folder: str) -> None:
    name = remote.join(folder, "a")
    for text in (b"first", b"second one"):
        with remote.published(name) as stream:
            stream.write(text)
    with remote.opened(name) as stream:
        assert stream.read() == b"second one"
    assert remote.files_below(folder) == ["a"] and remote.size_and_stamp(name)[0] == 10


def test_nothing_appears_where_writing_fails(folder: str) -> None:
    with pytest.raises(KeyError), remote.published(remote.join(folder, "a")) as stream:
        stream.write(b"half")
        raise KeyError
    assert remote.files_below(folder) == []


def test_what_killed_writers_left_goes(folder: str) -> None:
    for name in ("a", "b/c", f"b/{PARTIAL}c-17-0123abcd", f"{PARTIAL}a-17-0123abcd"):
        with remote.published(remote.join(folder, name)) as stream:
            stream.write(b"x")
    remote.sweep(folder)
    assert remote.files_below(folder) == ["a", "b/c"]
    remote.remove(remote.join(folder, "b"))
    assert remote.files_below(folder) == ["a"]


def test_the_stamp_tells_writing(folder: str) -> None:
    name = remote.join(folder, "a")
    stamps = set()
    for _ in range(2):
        with remote.published(name) as stream:
            stream.write(b"same")
        stamps.add(remote.size_and_stamp(name))
        assert remote.size_and_stamp(name) in stamps
    assert len(stamps) == 2


def test_what_is_not_there_is_one_sentence(folder: str) -> None:
    name = remote.join(folder, "nothing")
    for ask in (remote.opened, remote.size_and_stamp, remote.checksum):
        with pytest.raises(DataError, match=r"there is no file .*nothing; check the path"):
            ask(name)


def test_a_store_that_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    with (
        pytest.raises(TrmtError, match="cannot write memory://x/y: no room"),
        remote.published("memory://x/y"),
    ):
        pass


def test_a_store_nobody_knows_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"cannot reach nonsense://x: .*nonsense"):
        remote.opened("nonsense://x")


def test_a_checksum_is_that_of_the_bytes(folder: str) -> None:
    import hashlib

    name = remote.join(folder, "a")
    with remote.published(name) as stream:
        stream.write(b"bytes" * 1000)
    assert remote.checksum(name) == hashlib.sha256(b"bytes" * 1000).hexdigest()
