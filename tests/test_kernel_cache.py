"""Compiled kernels are code: they are loaded from nowhere that another user could have written to."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from trmt.native import build

pytestmark = pytest.mark.skipif(
    not hasattr(os, "geteuid") or build._compiler() is None, reason="needs users and a C compiler"
)

SOURCE = "int answer(void) { return 42; }\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a user who has built one kernel."""
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources/answer.c").write_text(SOURCE)
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (build._temporary_folder, build._warn_of):
        cached.cache_clear()
    assert built().parent == tmp_path / "trmt"
    return tmp_path / "trmt"


def built() -> Path:
    compiler = build._compiler()
    assert compiler
    return build._built("answer", compiler, ())


def test_what_is_built_can_be_written_by_its_user_only(cache: Path) -> None:
    before = os.umask(0)
    try:
        shutil.rmtree(cache)
        built()
    finally:
        os.umask(before)
    for path in [cache, *cache.iterdir()]:
        assert not path.stat().st_mode & 0o077, path
    assert all(build.is_private(path) for path in [cache, *cache.iterdir()])


def test_a_kernel_that_is_ours_is_not_built_again(cache: Path) -> None:
    library = built()
    before = library.stat().st_mtime_ns
    assert built() == library and library.stat().st_mtime_ns == before


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_a_cache_that_others_may_write_to_is_not_used(
    cache: Path, mode: int, capsys: pytest.CaptureFixture[str]
) -> None:
    built().write_bytes(b"not ours")
    cache.chmod(mode)
    libraries = {built(), built()}
    (library,) = libraries
    assert library.parent != cache and build.is_private(library.parent)
    assert capsys.readouterr().err.count("chmod 700") == 1


def test_a_cache_of_another_user_is_not_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: cache.stat().st_uid + 1)
    assert not build.is_private(cache)
    assert build.cache_folder() != cache
    assert "belongs to another user" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".so", ".sha256"])
def test_a_kernel_that_others_may_write_to_is_built_again(cache: Path, suffix: str) -> None:
    library = built()
    path = library.with_suffix(suffix)
    path.chmod(0o772)
    before = library.stat().st_ino
    assert built() == library and library.stat().st_ino != before
    assert not stat.S_IMODE(path.stat().st_mode) & 0o022


def test_a_link_in_place_of_a_kernel_is_not_followed(cache: Path, tmp_path: Path) -> None:
    library = built()
    library.rename(tmp_path / "elsewhere.so")
    library.symlink_to(tmp_path / "elsewhere.so")
    assert not built().is_symlink()


def test_an_altered_kernel_is_built_again(cache: Path) -> None:
    library = built()
    intact = library.read_bytes()
    for position in (0, len(intact) // 2, len(intact) - 1):
        damaged = bytearray(library.read_bytes())
        damaged[position] ^= 1
        library.write_bytes(damaged)
        assert build._digest(built()) == library.with_suffix(".sha256").read_text()
