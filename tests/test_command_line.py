from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trmt
from tests import toy
from trmt import cli
from trmt.cli import app

COMMANDS = [
    "tokenizer",
    "prepare",
    "vectors",
    "train",
    "pretrain",
    "check-resume",
    "average",
    "translate",
    "quantize",
    "inspect",
    "verify",
    "export",
    "import",
    "align",
    "score",
    "attend",
    "plot",
    "compare",
    "env",
]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["trmt", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    code = caught.value.code
    return code if isinstance(code, int) else 0


def python(code: str, *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd)


HEAVY = ("torch", "numpy", "sentencepiece", "sacrebleu", "datasets", "pyarrow", "safetensors")


def test_importing_and_helping_load_nothing_heavy() -> None:
    code = f"""
import sys, trmt
from trmt.cli import main
heavy = [name for name in {HEAVY} if name in sys.modules]
sys.argv = ["trmt", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
heavy += [name for name in {HEAVY} if name in sys.modules]
assert not heavy, heavy
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert re.search(rf"^\s*{name}\s", done.stdout, re.MULTILINE)


def test_every_public_name_is_there() -> None:
    for name in trmt.__all__:
        assert getattr(trmt, name) is not None
    assert set(dir(trmt)) >= set(trmt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        trmt.nonsense  # noqa: B018


def test_the_commands_are_these() -> None:
    assert [command.name for command in app.registered_commands] == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_helps(
    name: str, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, name, flag) == 0
    said = capsys.readouterr()
    assert f"trmt {name}" in said.out
    assert said.err == ""


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"trmt {trmt.__version__}\n"


def test_env_says_what_a_bug_report_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRMT_MODEL", "here")
    assert call(monkeypatch, "env") == 0
    said = capsys.readouterr()
    for word in (
        "trmt",
        "python",
        "system",
        "torch",
        "sentencepiece",
        "safetensors",
        "cpu",
        "TRMT_MODEL=here",
    ):
        assert word in said.out
    assert said.err == ""


USAGE = [
    ["nonsense"],
    ["train", "--nonsense"],
    ["average", "--best", "many"],
    ["train", "--data"],
]


@pytest.mark.parametrize("arguments", USAGE)
def test_wrong_usage_ends_with_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    assert "rror" in said.err


MISTAKES = [
    (["train"], "there is no prepared set of pairs in data/"),
    (["train", "--data", "nowhere"], "nowhere is not a prepared set"),
    (["average"], "there is no run in models/"),
    (["average", "nowhere"], "there are no checkpoints in nowhere"),
    (["average", "nowhere", "--best", "1", "--last", "1"], "exclude each other"),
    (["plot"], "there is no run in models/"),
    (["plot", "nowhere"], "cannot read nowhere/log.jsonl"),
    (["translate"], "there is no model in models/"),
    (["translate", "nowhere"], "there is no model in nowhere"),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES)
def test_a_mistake_is_one_sentence_and_ends_with_1(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRMT_MODEL", raising=False)
    assert call(monkeypatch, *arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_mistakes_in_training_are_one_sentence(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["train", str(tmp_path / "run"), "--data", str(toy_set), "--recipe", "transformer-tiny"]
    for more, expected in (
        (["--set", "optim.lr"], "--set takes key=value"),
        (["--set", "optim.larning=1"], "unknown key 'larning'"),
        (["--device", "abacus"], "there is no device 'abacus'"),
        (["--init-from", str(tmp_path)], "there is no model in"),
        (["--set", "training.precision=fp16", "--device", "cpu"], "fp16 training needs a CUDA GPU"),
        (["--set", "network.heads=7"], "cannot be divided"),
    ):
        assert call(monkeypatch, *base, *more) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert expected in line
    assert not (tmp_path / "run").exists()


def test_training_and_averaging_from_the_command_line(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy.recipe(tmp_path, {"validation": {"metric": "chrf", "sentences": 4}})
    run = tmp_path / "run"
    base = ["train", str(run), "--data", str(toy_set), "--recipe", recipe, "--threads", "1"]
    assert call(monkeypatch, *base, "--dry-run") == 0
    assert not run.exists()
    assert call(monkeypatch, *base) == 0
    assert call(monkeypatch, "average", str(run), "--best", "2") == 0
    said = capsys.readouterr()
    assert said.out == "", "data alone belongs on standard output"
    assert "done: 6 steps" in said.err
    manifest = json.loads((run / "step-00000006/manifest.json").read_bytes())
    assert [score["metric"] for score in manifest["scores"]] == ["chrf", "loss", "bleu"]
    assert all(score["signature"] for score in manifest["scores"])
    assert len(manifest["golden"]) == 3
    assert (run / "average/manifest.json").is_file()
    assert call(monkeypatch, "--quiet", *base, "--set", "training.steps=7") == 0
    assert capsys.readouterr().err == ""


def test_the_run_folder_alone_goes_on(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = toy.recipe(tmp_path)
    run = str(tmp_path / "run")
    assert call(monkeypatch, "train", run, "--data", str(toy_set), "--recipe", recipe) == 0
    more = ("--data", str(toy_set), "--set", "training.steps=8")
    assert call(monkeypatch, "train", run, *more) == 0
    assert "resuming" in capsys.readouterr().err


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_ctrl_c_ends_with_130_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trmt.training.run.train", interrupted)
    assert call(monkeypatch, "train") == 130
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err


@pytest.mark.skipif(os.name == "nt", reason="there are no such pipes")
def test_a_reader_that_has_gone_ends_it_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "trmt", "env"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() in (1, 141)
    assert b"Traceback" not in said
    assert b"Exception" not in said


def test_a_bug_of_ours_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("trmt.training.run.train", broken)
    monkeypatch.setattr(sys, "argv", ["trmt", "train"])
    with pytest.raises(ZeroDivisionError):
        cli.main()
