"""Reports in pipes: data on standard output, messages on standard error, and one exit code after `| head`."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import toy
from tests.commands import Command
from trmt.cli import main
from trmt.training.run import train
from trmt.validating import validate

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, toy_set: Path) -> Path:
    """A folder with two runs and some text, in which the commands below run."""
    folder = tmp_path_factory.mktemp("work")
    recipe = toy.recipe(folder, {"training": {"steps": 2, "log_every": 1}, "validation": {"every": 1}})
    for name in ("one", "two"):
        train(
            toy.options(folder / name, toy_set, recipe, f"training.seed={len(name) + ord(name[0])}"), validate
        )
    (folder / "models").mkdir()
    (folder / "models/one").symlink_to(folder / "one")
    (folder / "text").write_text("ka lomo\n" * 3)
    (folder / "pairs.tsv").write_text("ka lomo\tolomo oka\n" * 3)
    return folder


REPORTS = [
    "--help",
    "--version",
    "translate -h",
    "train -h",
    "recipes",
    "recipes transformer-tiny",
    "models",
    "models --json",
    "env",
    "inspect one",
    "inspect one --json",
    "score text --ref text",
    "score text --ref text --json",
    "compare one two --log-only",
    "compare one two --log-only --json",
    "plot one two",
    "translate one -i text",
    "translate one -i text --json",
    "align one --pairs pairs.tsv",
    "attend one --source ka",
]


@pytest.fixture
def piped(work: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """Runs a command whose standard output nobody reads; returns the exit code."""

    def run(line: str) -> int:
        reader, writer = os.pipe()
        os.close(reader)
        out = io.TextIOWrapper(os.fdopen(writer, "wb"), encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.chdir(work)
            patch.setattr(sys, "argv", ["trmt", *line.split()])
            patch.setattr(sys, "stdout", out)
            with pytest.raises(SystemExit) as ended:
                main()
        with suppress(OSError):
            out.close()
        return int(ended.value.code or 0)

    return run


@pytest.mark.parametrize("line", REPORTS)
def test_after_a_closed_pipe_every_command_ends_with_141(
    piped: Callable[[str], int], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert piped(line) == 141
    err = capfd.readouterr().err
    assert "error" not in err and "Traceback" not in err


@pytest.mark.parametrize("line", REPORTS)
def test_the_report_is_on_standard_output(
    trmt: Command, work: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(work)
    code, out, err = trmt(*line.split())
    assert code == 0 and out.strip()
    assert not err or all(len(row) < 200 for row in err.splitlines())
    assert b"\x1b" not in out, "no colours in a pipe"
    quiet_code, quiet_out, quiet_err = trmt("-q", *line.split())
    assert (quiet_code, quiet_err) == (0, "")
    if not line.startswith("-"):
        assert quiet_out == out, "no part of the report is a message"


@pytest.fixture
def full() -> Iterator[io.TextIOWrapper]:
    with open("/dev/full", "wb", buffering=0) as stream:
        yield io.TextIOWrapper(io.BufferedWriter(stream), encoding="utf-8")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full")
@pytest.mark.parametrize("line", REPORTS)
def test_a_report_that_finds_no_space_is_one_sentence(
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    full: io.TextIOWrapper,
    line: str,
) -> None:
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["trmt", *line.replace(" --log-only", " --log-only --json").split()])
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(SystemExit) as ended:
        main()
    monkeypatch.undo()
    errors = [row for row in capfd.readouterr().err.splitlines() if row.startswith("error: ")]
    assert ended.value.code == 1
    (error,) = errors
    reason = "No space left on device; free some space or choose another path"
    assert re.fullmatch(f"error: cannot write the (report|output|translations|links): {reason}", error)
