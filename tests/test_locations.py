"""Files at paths and at URLs: they appear complete, are listed and read, and errors are one sentence."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from trmt.errors import ConfigError, DataError, TrmtError
from trmt.storage import files
from trmt.storage.files import PARTIAL


@pytest.fixture(params=["disk", "file://", "memory://"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "memory://":
        return f"memory://{uuid.uuid4().hex}"
    return str(tmp_path) if request.param == "disk" else f"file://{tmp_path}"


def test_a_file_is_listed_once_it_is_complete(folder: str) -> None:
    assert files.list_files(folder) == []
    for name in ("b/part-00000", "a"):
        with files.atomic_file(files.join(folder, name)) as stream:
            stream.write(name.encode())
            assert name not in files.list_files(folder), "it is not complete yet"
    assert files.list_files(folder) == ["a", "b/part-00000"]
    with files.open_file(files.join(folder, "b/part-00000")) as stream:
        stream.seek(2)
        assert stream.read() == b"part-00000"
    assert files.is_file(files.join(folder, "a")) and not files.is_file(files.join(folder, "b"))


def test_a_file_is_replaced(folder: str) -> None:
    name = files.join(folder, "a")
    for text in (b"first", b"second one"):
        with files.atomic_file(name) as stream:
            stream.write(text)
    with files.open_file(name) as stream:
        assert stream.read() == b"second one"
    assert files.list_files(folder) == ["a"] and files.size_and_version(name)[0] == 10


def test_an_error_while_writing_leaves_no_file(folder: str) -> None:
    with pytest.raises(KeyError), files.atomic_file(files.join(folder, "a")) as stream:
        stream.write(b"half")
        raise KeyError
    assert files.list_files(folder) == []


def test_partial_files_of_killed_writers_are_removed(folder: str) -> None:
    for name in ("a", "b/c", f"b/{PARTIAL}c-17-0123abcd", f"{PARTIAL}a-17-0123abcd"):
        with files.atomic_file(files.join(folder, name)) as stream:
            stream.write(b"x")
    files.remove_partials(folder)
    assert files.list_files(folder) == ["a", f"b/{PARTIAL}c-17-0123abcd", "b/c"]
    files.remove_partials(folder, recursive=True)
    assert files.list_files(folder) == ["a", "b/c"]
    files.remove(files.join(folder, "b"))
    assert files.list_files(folder) == ["a"]


def test_the_version_changes_when_a_file_is_written(folder: str) -> None:
    name = files.join(folder, "a")
    versions = set()
    for _ in range(2):
        with files.atomic_file(name) as stream:
            stream.write(b"same")
        versions.add(files.size_and_version(name))
        assert files.size_and_version(name) in versions
    assert len(versions) == 2


def test_a_missing_file_is_one_sentence(folder: str) -> None:
    name = files.join(folder, "nothing")
    for ask in (files.open_file, files.size_and_version):
        with pytest.raises(DataError, match=r"there is no file .*nothing; check the path"):
            ask(name)


def test_an_error_of_a_store_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    with (
        pytest.raises(TrmtError, match="cannot write memory://x/y: no room"),
        files.atomic_file("memory://x/y"),
    ):
        pass


def test_an_unknown_protocol_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"cannot reach nonsense://x: .*nonsense"):
        files.open_file("nonsense://x")


def test_the_checksum_of_an_open_file_is_that_of_its_bytes(folder: str) -> None:
    import hashlib

    name = files.join(folder, "a")
    with files.atomic_file(name) as stream:
        stream.write(b"bytes" * 1000)
    with files.open_file(name) as stream:
        assert files.checksum(stream) == hashlib.sha256(b"bytes" * 1000).hexdigest()
