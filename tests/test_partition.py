"""A second start continues the same work only, and names the differences otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from trmt.errors import ConfigError, DataError
from trmt.scale.partition import (
    MANIFEST,
    InputFile,
    Partition,
    cut_input,
    missing_parts,
    open_partition,
    part_name,
)
from trmt.storage import files
from trmt.text.ranges import LineRange, split_by_size

OPTIONS: dict[str, Any] = {"search": {"beam": 4, "penalty": 0.6}, "model": "abc", "languages": ["en", "de"]}


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "in" / name for name in ("a", "b")]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_text("one\ntwo\nthree\n" * 5)
    return [str(path) for path in paths]


def ranges_of(name: str) -> Sequence[LineRange]:
    with files.open_file(name) as stream:
        return split_by_size(stream, size=20)


def cutting(names: Sequence[str]) -> Callable[[], list[InputFile]]:
    return lambda: [cut_input(name, ranges_of) for name in names]


def start(folder: Path, names: Sequence[str], **changes: Any) -> Partition:
    return open_partition(str(folder), "test", {**OPTIONS, **changes}, names=names, cut=cutting(names))


def never() -> list[InputFile]:
    raise AssertionError("nothing has changed, so no input should be read again")


def test_a_second_start_finds_what_the_first_wrote(tmp_path: Path, names: list[str]) -> None:
    first = start(tmp_path / "out", names)
    assert [each.name for each in first.inputs] == names
    written = (tmp_path / "out" / MANIFEST).read_bytes()
    assert open_partition(str(tmp_path / "out"), "test", OPTIONS, names=names, cut=never) == first
    assert (tmp_path / "out" / MANIFEST).read_bytes() == written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "abd"}, 'model was "abc" and is "abd"'),
        ({"search": {"beam": 5, "penalty": 0.6}}, "search.beam was 4 and is 5"),
        ({"languages": ["en", "fr"]}, 'languages.1 was "de" and is "fr"'),
        ({"more": None}, "more was missing and is null"),
    ],
)
def test_other_options_are_refused_by_name(
    tmp_path: Path, names: list[str], changes: dict[str, Any], message: str
) -> None:
    start(tmp_path / "out", names)
    with pytest.raises(ConfigError) as caught:
        start(tmp_path / "out", names, **changes)
    assert f"was started with other options or inputs: {message}; use" in str(caught.value)


def test_many_differences_are_counted(tmp_path: Path, names: list[str]) -> None:
    start(tmp_path / "out", names)
    with pytest.raises(ConfigError, match=r"a was missing .*; c was missing .*, and 2 more; use"):
        start(tmp_path / "out", names, a=1, b=2, c=3, d=4, e=5)


def test_another_job_is_refused(tmp_path: Path, names: list[str]) -> None:
    start(tmp_path / "out", names)
    with pytest.raises(ConfigError, match='job was "test" and is "other"'):
        open_partition(str(tmp_path / "out"), "other", OPTIONS, names=names, cut=never)


def test_inputs_that_have_changed_are_refused_by_name(tmp_path: Path, names: list[str]) -> None:
    start(tmp_path / "out", names)
    known = Path(names[1]).stat()
    Path(names[1]).write_text("one\ntwo\nthrew\n" * 5)  # as long as it was
    os.utime(names[1], ns=(known.st_atime_ns, known.st_mtime_ns + 1))
    with pytest.raises(ConfigError, match=f"the contents of {names[1]} have changed"):
        start(tmp_path / "out", names)


def test_inputs_that_were_only_copied_are_accepted(
    tmp_path: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(tmp_path / "out", names)
    os.utime(names[1])
    assert start(tmp_path / "out", names) == first
    assert "comparing the contents of all inputs" in capsys.readouterr().err


def test_new_and_missing_inputs_are_refused_by_name(tmp_path: Path, names: list[str]) -> None:
    start(tmp_path / "out", names)
    with pytest.raises(ConfigError, match=f"{names[1]} is missing"):
        start(tmp_path / "out", names[:1])
    third = tmp_path / "in" / "c"
    third.touch()
    with pytest.raises(ConfigError, match=f"{third} is new"):
        start(tmp_path / "out", [*names, str(third)])


def test_a_folder_with_other_files_is_refused(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"contains thesis.tex but no manifest.json"):
        start(tmp_path / "out", names)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"format": 7}', b"\xff"])
def test_a_damaged_manifest_is_one_sentence(tmp_path: Path, names: list[str], damage: bytes) -> None:
    start(tmp_path / "out", names)
    (tmp_path / "out" / MANIFEST).write_bytes(damage)
    with pytest.raises(DataError, match=r"manifest\.json (cannot be read|needs a value|does not hold)"):
        start(tmp_path / "out", names)


def test_an_input_that_grows_while_it_is_cut_is_refused(names: list[str]) -> None:
    def slowly(name: str) -> Sequence[LineRange]:
        with open(name, "ab") as stream:
            stream.write(b"more\n")
        return ranges_of(name)

    with pytest.raises(DataError, match="changes while it is read"):
        cut_input(names[0], slowly)


def test_parts_without_a_file_are_missing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("part-00001", "a/part-00000", ".partial-part-00000-1-00000000"):
        (tmp_path / name).touch()
    wanted = ["part-00000", "part-00001", "a/part-00000", "a/part-00001"]
    assert missing_parts(str(tmp_path), wanted) == ["part-00000", "a/part-00001"]


@pytest.mark.parametrize("count", [1, 9, 100_000, 100_001, 1_234_567])
def test_names_sort_in_the_order_of_parts(count: int) -> None:
    numbers = sorted({0, 1, 9, 10, 99_999, 100_000, count - 1})
    some = [part_name(number, count) for number in numbers if number < count]
    assert some == sorted(some) and len({len(name) for name in some}) == 1
