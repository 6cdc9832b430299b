from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from trmt.errors import TrmtError
from trmt.files import PARTIAL, atomic_file, atomic_folder, checksum, recover, sweep, write_json


class Killed(BaseException):
    """Stands for the end of the process."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with atomic_file(path) as stream:
        stream.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, Killed, KeyboardInterrupt])
def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_file(path) as stream:
        stream.write(b"new")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_disk_that_is_full_is_one_sentence(tmp_path: Path) -> None:
    for writer in (atomic_file, atomic_folder):
        with (
            pytest.raises(TrmtError, match=r"cannot write .*thing: No space left on device; free some space"),
            writer(tmp_path / "thing"),
        ):
            raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TrmtError, match="cannot write"), atomic_file(tmp_path / "file" / "below"):
        pass
    with pytest.raises(TrmtError, match="cannot write"), atomic_folder(tmp_path / "file" / "below"):
        pass


def fill(folder: Path, text: str) -> None:
    with atomic_folder(folder) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text(text)


def test_a_folder_appears_whole_and_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    fill(folder, "one")
    (folder / "stale").write_text("")
    fill(folder, "two")
    assert (folder / "sub" / "file").read_text() == "two"
    assert names(folder) == ["sub"]
    assert names(folder.parent) == ["folder"]


@pytest.mark.parametrize("error", [ValueError, Killed])
def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    fill(tmp_path / "folder", "old")
    with pytest.raises(error), atomic_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("new")
        raise error
    assert (tmp_path / "folder/sub/file").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_a_folder_may_be_kept_from_being_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "old")
    with pytest.raises(TrmtError, match="exists already"), atomic_folder(tmp_path / "folder", replace=False):
        pass
    assert (tmp_path / "folder/sub/file").read_text() == "old"


@pytest.mark.parametrize("death", range(1, 3))
def test_whenever_a_writer_dies_one_of_the_two_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: int
) -> None:
    """Killed before its first or its second rename, or before it has removed the old folder."""
    fill(tmp_path / "folder", "old")
    replace, left = Path.replace, [death]

    def dying(self: Path, target: Path) -> Path:
        left[0] -= 1
        if not left[0]:
            raise Killed
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            fill(tmp_path / "folder", "new")
    recover(tmp_path / "folder")
    assert (tmp_path / "folder/sub/file").read_text() == "old"
    sweep(tmp_path)
    assert names(tmp_path) == ["folder"]


def test_an_old_folder_that_was_not_removed_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "folder", "old")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        fill(tmp_path / "folder", "new")
    assert len(names(tmp_path)) == 2
    recover(tmp_path / "folder")
    assert (tmp_path / "folder/sub/file").read_text() == "new"
    assert names(tmp_path) == ["folder"]


def test_sweeping_brings_back_and_removes(tmp_path: Path) -> None:
    (tmp_path / f"{PARTIAL}file-1-2").write_text("")
    (tmp_path / f"{PARTIAL}folder-1-2").mkdir()
    (tmp_path / f"{PARTIAL}old-kept").mkdir()
    (tmp_path / "other").write_text("")
    sweep(tmp_path)
    assert names(tmp_path) == ["kept", "other"]


@pytest.mark.parametrize("value", [{"a": [1, "ü", None]}, [], "x\n", 1.5])
def test_json_makes_the_round_trip(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_bytes()) == value


def test_the_checksum_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert checksum(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()
