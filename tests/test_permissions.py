"""Files and folders get the permissions that the umask gives, and errors of writing say what helps."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import toy
from tests.commands import Command
from trmt.storage.files import atomic_file, atomic_folder, write_error

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder: Path, umask: int) -> list[tuple[str, str]]:
    """The files and folders whose permissions the umask does not explain."""
    found = []
    for path in [folder, *folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask:
            found.append((str(path.relative_to(folder)), oct(mode)))
    return found


def test_sets_runs_and_bundles_have_the_permissions_of_the_umask(
    umask: int, tmp_path: Path, trmt: Command
) -> None:
    folder = tmp_path / "all"
    data = toy.make_set(folder)
    recipe = toy.recipe(tmp_path, {"training": {"steps": 2}, "validation": {"every": 1}})
    run = folder / "run"
    code, _, err = trmt("train", run, "--data", data, "--recipe", recipe, "--threads", "1")
    assert code == 0, err
    assert trmt("average", run)[0] == 0
    assert trmt("quantize", run, "--out", folder / "int8")[0] == 0
    names = {path.name for path in folder.rglob("*")}
    assert {"weights.safetensors", "state.safetensors", "log.jsonl", "config.toml", "tokenizer"} <= names
    assert wrong_modes(folder, umask) == []


def test_a_file_that_a_library_made_private_gets_the_usual_permissions(umask: int, tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "made" / "folder") as folder:
        (folder / "inside").mkdir()
        for path in (folder / "model.bin", folder / "inside" / "more.bin"):
            path.write_bytes(b"x")
            path.chmod(0o600)
    with atomic_file(f"file://{tmp_path}/made/url/file") as stream:
        stream.write(b"x")
    assert wrong_modes(tmp_path / "made", umask) == []


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "choose a folder that you may write to"),
        (errno.EROFS, "choose a folder that you may write to"),
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.ENOENT, "No such file or directory; choose another path"),
        (errno.ENOTDIR, "there is a file where a folder is needed"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
    ],
)
def test_the_advice_fits_the_error(number: int, advice: str) -> None:
    assert advice in str(write_error(Path("x"), OSError(number, os.strerror(number))))
    same = write_error(Path("x"), OSError(f"{os.strerror(number)}(os error {number})"))
    assert advice.rpartition("; ")[2] in str(same)
    assert ("free some space" in str(same)) == (number in (errno.ENOSPC, errno.EDQUOT))
