"""The command line as a whole: its commands, its errors, and copies of trmt without optional packages."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import trmt
from tests import toy
from trmt import cli, console
from trmt.bundles import checkpoints
from trmt.cli import app

ROOT = Path(trmt.__file__).parent
COMMANDS = [
    "new",
    "tokenizer",
    "prepare",
    "vectors",
    "train",
    "recipes",
    "pretrain",
    "check-resume",
    "average",
    "translate",
    "quantize",
    "inspect",
    "models",
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
    """Run the command line in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["trmt", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    code = caught.value.code
    return code if isinstance(code, int) else 0


def python(code: str, *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd)


SLOW_IMPORTS = ("torch", "numpy", "sentencepiece", "sacrebleu", "datasets", "pyarrow", "safetensors")


def test_importing_and_help_load_no_slow_packages() -> None:
    code = f"""
import sys, trmt
from trmt.cli import main
sys.argv = ["trmt", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
loaded = [name for name in {SLOW_IMPORTS} if name in sys.modules]
assert not loaded, loaded
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert listed(done.stdout) == {*COMMANDS, "bert"}


def listed(help_text: str) -> set[str]:
    """The commands that `trmt --help` lists."""
    _, _, commands = help_text.partition("Commands:")
    return set(re.findall(r"^  ([a-z-]+)\s", commands, re.MULTILINE))


def test_help_is_fast() -> None:
    def cpu_seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(5):
        before = cpu_seconds()  # and not the clock, because other tests may be running
        subprocess.run([sys.executable, "-m", "trmt", "--help"], check=True, capture_output=True)
        times.append(cpu_seconds() - before)
    assert min(times) < 0.25, times


def test_every_public_name_exists() -> None:
    for name in trmt.__all__:
        assert getattr(trmt, name) is not None
    assert set(dir(trmt)) >= set(trmt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        trmt.nonsense  # noqa: B018


def test_the_commands_are_these() -> None:
    assert [command.name for command in app.registered_commands] == COMMANDS
    assert [group.name for group in app.registered_groups] == ["bert"]
    assert [*cli.COMMANDS] == [*COMMANDS, "bert"]


# Copies of trmt without one of the optional packages


WITHOUT = {
    "native": set(),
    "lab": {"pretrain"},
    "interop": {"export", "import", "bert"},
    "insight": {"align", "attend", "plot", "compare", "inspect"},
    "scale": set(),
}


@pytest.fixture(params=WITHOUT)
def missing(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The package that the copy of trmt in the current folder lacks."""
    ignored = shutil.ignore_patterns("__pycache__", request.param)
    shutil.copytree(ROOT, tmp_path / "trmt", ignore=ignored)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return str(request.param)


# An editable installation would find the packages that the copy lacks.
RUN_COPY = """
import sys
sys.meta_path[:] = [each for each in sys.meta_path if "__editable__" not in getattr(each, "__module__", "")]
from trmt.cli import main
main()
"""


def run_copy(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line of the copy of trmt in the current folder."""
    line = [sys.executable, "-c", RUN_COPY, *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_help_lists_the_commands_of_the_packages_that_are_there(missing: str) -> None:
    done = run_copy("--help")
    assert done.returncode == 0, done.stderr
    assert listed(done.stdout) == {*cli.COMMANDS} - WITHOUT[missing]
    for name in WITHOUT[missing]:
        done = run_copy(name, "--help")
        assert done.returncode == 2 and f"No such command '{name}'" in done.stderr


def test_commands_of_the_core_run_without_the_package(missing: str) -> None:
    done = run_copy("env")
    assert done.returncode == 0 and "torch" in done.stdout, done.stderr
    done = run_copy("score", "here", "--ref", "there")
    assert done.returncode == 1 and "there is no file there" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["translate", "--workers", "2"],
        ["translate", "--device", "all"],
        ["translate", "--device", "cpu,cpu"],
        ["translate", "--input", "text/", "--output", "out"],
        ["prepare", "--train", "text", "--ray", "auto"],
    ],
    ids=" ".join,
)
def test_options_of_a_missing_package_are_one_sentence(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trmt.scale", None)
    assert call(monkeypatch, *arguments) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: --\S+( \S+)? needs trmt\.scale, which this copy .*\n", err)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_has_help(
    name: str, flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, name, flag) == 0
    output = capsys.readouterr()
    assert f"trmt {name}" in output.out
    assert output.err == ""


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"trmt {trmt.__version__}\n"


def test_env_prints_versions_and_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRMT_MODEL", "here")
    assert call(monkeypatch, "env") == 0
    output = capsys.readouterr()
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
        assert word in output.out
    assert output.err == ""


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
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    assert "rror" in output.err


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
    monkeypatch.setattr(checkpoints, "SHIPPED", ())
    assert call(monkeypatch, *arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_mistakes_in_training_are_one_sentence(
    toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["train", str(tmp_path / "run"), "--data", str(toy_set), "--recipe", "transformer-tiny"]
    for more, expected in (
        (["--set", "optim.lr"], "--set takes key=value"),
        (["--set", "optim.larning=1"], "unknown key 'larning'; known after 'optim.' are beta1, beta2, "),
        (["--set", "training.stps=1"], "unknown key 'stps'; did you mean 'training.steps'?"),
        (["--set", "network.hads=1"], "unknown key 'hads'; did you mean 'network.heads'?"),
        (["--set", "traning.steps=1"], "unknown key 'traning'; did you mean 'training'?"),
        (["--set", "training.steps=many"], "recipe.training.steps = 'many': expected a whole number"),
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
    assert not run.exists() and "time per epoch" in capsys.readouterr().out
    assert call(monkeypatch, "--quiet", *base, "--dry-run") == 0
    assert "time per epoch" in capsys.readouterr().out
    console.set_quiet(False)
    assert call(monkeypatch, *base) == 0
    assert call(monkeypatch, "average", str(run), "--best", "2") == 0
    output = capsys.readouterr()
    assert output.out == "", "data alone belongs on standard output"
    assert "done: 6 steps" in output.err
    manifest = json.loads((run / "step-00000006/manifest.json").read_bytes())
    assert [score["metric"] for score in manifest["scores"]] == ["chrf", "loss", "bleu"]
    assert all(score["signature"] for score in manifest["scores"])
    assert len(manifest["golden"]) == 3
    assert (run / "average/manifest.json").is_file()
    assert call(monkeypatch, "--quiet", *base, "--set", "training.steps=7") == 0
    assert capsys.readouterr().err == ""


def test_an_existing_run_folder_is_resumed(
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
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err


@pytest.mark.skipif(os.name == "nt", reason="there are no such pipes")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_pipe_ends_the_command_with_141_and_no_message(stream: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ["env"] if stream == "stdout" else ["score", "nowhere", "--ref", "nowhere"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    done = subprocess.run([sys.executable, "-m", "trmt", *arguments], check=False, **streams)  # type: ignore[call-overload]
    os.close(writer)
    assert done.returncode == 141
    assert not done.stdout and not done.stderr


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("trmt.training.run.train", broken)
    monkeypatch.setattr(sys, "argv", ["trmt", "train"])
    with pytest.raises(ZeroDivisionError):
        cli.main()
