from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trmt.errors import TrmtError
from trmt.storage.files import (
    PARTIAL,
    atomic_file,
    atomic_folder,
    checksum,
    recover_folder,
    remove_partials,
    write_json,
)
from trmt.storage.locks import LOCK, exclusive


class Killed(BaseException):
    """Simulates the end of the process."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with atomic_file(path) as stream:
        stream.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    assert names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, Killed, KeyboardInterrupt])
def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_file(path) as stream:
        stream.write(b"new")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    for writer in (atomic_file, atomic_folder):
        with (
            pytest.raises(TrmtError, match=r"cannot write .*thing: No space left on device; free some space"),
            writer(tmp_path / "thing"),
        ):
            raise OSError(28, "No space left on device")
    assert names(tmp_path) == []


def test_a_path_below_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TrmtError, match="cannot write"), atomic_file(tmp_path / "file" / "below"):
        pass
    with pytest.raises(TrmtError, match="cannot write"), atomic_folder(tmp_path / "file" / "below"):
        pass


def fill(folder: Path, text: str) -> None:
    with atomic_folder(folder) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text(text)


def test_a_folder_appears_complete_and_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    fill(folder, "one")
    (folder / "stale").write_text("")
    fill(folder, "two")
    assert (folder / "sub" / "file").read_text() == "two"
    assert names(folder) == ["sub"]
    assert names(folder.parent) == ["folder"]


@pytest.mark.parametrize("error", [ValueError, Killed])
def test_an_error_while_writing_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    fill(tmp_path / "folder", "old")
    with pytest.raises(error), atomic_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("new")
        raise error
    assert (tmp_path / "folder/sub/file").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_with_replace_false_a_folder_is_not_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "old")
    with pytest.raises(TrmtError, match="exists already"), atomic_folder(tmp_path / "folder", replace=False):
        pass
    assert (tmp_path / "folder/sub/file").read_text() == "old"


@pytest.mark.parametrize("death", range(1, 3))
def test_a_writer_killed_at_any_time_leaves_the_old_or_the_new_folder(
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
    recover_folder(tmp_path / "folder")
    assert (tmp_path / "folder/sub/file").read_text() == "old"
    remove_partials(tmp_path)
    assert names(tmp_path) == ["folder"]


def test_an_old_folder_that_was_not_removed_is_removed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "folder", "old")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        fill(tmp_path / "folder", "new")
    assert len(names(tmp_path)) == 2
    recover_folder(tmp_path / "folder")
    assert (tmp_path / "folder/sub/file").read_text() == "new"
    assert names(tmp_path) == ["folder"]


def test_remove_partials_restores_replaced_folders_and_removes_the_rest(tmp_path: Path) -> None:
    (tmp_path / f"{PARTIAL}file-1-2").write_text("")
    (tmp_path / f"{PARTIAL}folder-1-2").mkdir()
    (tmp_path / f"{PARTIAL}old-kept").mkdir()
    (tmp_path / "other").write_text("")
    remove_partials(tmp_path)
    assert names(tmp_path) == ["kept", "other"]


@pytest.mark.parametrize("value", [{"a": [1, "ü", None]}, [], "x\n", 1.5])
def test_json_makes_the_round_trip(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_bytes()) == value


def test_the_checksum_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert checksum(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


# Locks

HOLDER = "import sys\nfrom pathlib import Path\nfrom trmt.storage.locks import exclusive\n"
HOLDER += "with exclusive(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")


def holder(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of `folder` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


@posix
def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    process = holder(tmp_path)
    with pytest.raises(TrmtError, match=rf"process {process.pid} on .* is at work in"), exclusive(tmp_path):
        pass
    process.kill()
    process.communicate()
    assert names(tmp_path) == [LOCK], "a killed process leaves its lock file"
    with exclusive(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()} {platform.node()}"
        with pytest.raises(TrmtError, match="is at work"), exclusive(tmp_path):
            pass
    assert names(tmp_path) == []


@posix
def test_a_reused_process_id_does_not_count(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (tmp_path / LOCK).write_text(f"{other.pid} {platform.node()}")
        with exclusive(tmp_path):
            pass
    finally:
        other.communicate(b"\n")


def test_the_lock_of_another_host_counts(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("17 elsewhere")
    with (
        pytest.raises(TrmtError, match=r"process 17 on elsewhere is at work in .* remove .*lock"),
        exclusive(tmp_path),
    ):
        pass
    assert (tmp_path / LOCK).read_text() == "17 elsewhere"


@posix
def test_without_system_locks_the_process_id_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", without)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / LOCK).write_text(f"{other.pid} {platform.node()}")
    with pytest.raises(TrmtError, match=f"process {other.pid} on"), exclusive(tmp_path):
        pass
    other.communicate(b"\n")
    with exclusive(tmp_path):
        pass


def test_of_processes_that_start_at_once_one_gets_the_lock(tmp_path: Path) -> None:
    """Two processes must not both get a lock that its holder has just removed."""
    code = "import sys, time\nfrom pathlib import Path\nfrom trmt.errors import TrmtError\n"
    code += "from trmt.storage.locks import exclusive\nfolder = Path(sys.argv[1])\n"
    code += "for _ in range(300):\n    try:\n        with exclusive(folder):\n"
    code += "            (folder / 'mark').open('x').close()\n            (folder / 'mark').unlink()\n"
    code += "    except TrmtError:\n        pass\n"
    several = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait(60) for process in several] == [0, 0, 0], "two had the lock at once"


def test_the_lock_of_another_host_does_not_count_within_a_job(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    for theirs, mine, refused in (
        ("", "", True),
        ("training-7", "", True),
        ("training-7", "training-8", True),
        ("training-7", "training-7", False),
    ):
        lock.write_text(f"1 some.other.machine {theirs}")
        if refused:
            with (
                pytest.raises(TrmtError, match=r"process 1 on .* is at work"),
                exclusive(tmp_path, job=mine),
            ):
                pass
            continue
        with exclusive(tmp_path, job=mine):
            assert lock.read_text().split() == [str(os.getpid()), platform.node(), mine]
        assert not lock.exists()
