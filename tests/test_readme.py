"""README is true: its results come from the result files, its files exist, its commands run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
MAX_LINES = 160
MAKE = ("make demo", "make test")  # .ci/run runs these
# Pages whose shell commands are run, in this order: each page uses files of those before it.
COMMANDS = ("README.md", "docs/training.md", "docs/commands.md", "docs/cpu.md", "docs/attention.md")
PROGRAMS = ("README.md", "docs/python.md", "docs/attention.md")  # pages whose Python code is run
SENTENCES = 60  # of the dev and test sets


def load(path: str) -> Any:
    """A program as a module."""
    specification = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [body for name, body in fenced if name == language]


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= MAX_LINES


def test_nothing_in_it_is_pending() -> None:
    assert "pending" not in TEXT.lower() and "waits for" not in TEXT


def test_results_in_readme_and_docs_are_those_of_the_result_files() -> None:
    readme = load("bench/readme.py")
    for page in readme.PAGES:
        text = page.read_text(encoding="utf-8")
        assert readme.generated(text) == text, f"{page.name} is out of date; run: python bench/readme.py"


def test_the_tree_lists_every_package_and_module() -> None:
    [tree] = [block for block in blocks("README.md", "") if block.startswith("trmt/\n")]
    names = {name for line in tree.splitlines()[1:] for name in re.findall(r"[\w]+(?:/|\.py)", line[:110])}
    # Some files are named in the descriptions of packages.
    listed = {name.rstrip("/") for name in names}
    package = ROOT / "trmt"
    packages = {path.parent.name for path in package.glob("*/__init__.py")}
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert not (packages | modules) - listed, "missing from the tree in README.md"
    known = {path.name for path in package.rglob("*") if path.suffix == ".py" or path.is_dir()}
    assert not listed - known, "in the tree in README.md, but not in trmt/"


# ------------------------------------------------------------------------------ commands and programs


def shorter(command: str) -> str:
    """The same command with a tenth of the training steps."""
    command = re.sub(r"training\.steps=(\d+)0\b", r"training.steps=\1", command)
    if command.startswith(("trmt train", "trmt new")) and "training.steps" not in command:
        command += " --set training.steps=40 --set validation.every=20"
    return command


def shell_commands() -> Iterator[str]:
    """The commands to run; the first of README translates with the model of `make demo`, and comes last."""
    lines = [line for page in COMMANDS for block in blocks(page, "sh") for line in block.splitlines() if line]
    first, *others = [line for line in lines if line not in MAKE]
    assert first.endswith("trmt translate")
    yield from map(shorter, others)
    yield first


def prepare_workspace(folder: Path) -> dict[str, str]:
    """Text in `data`, and the programs `trmt` and `python`; returns the environment."""
    (folder / "data").mkdir()
    subprocess.run([sys.executable, ROOT / "data" / "phrasebook.py", folder / "phrasebook"], check=True)
    for path in (folder / "phrasebook").iterdir():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        some = lines if path.stem == "train" else lines[:SENTENCES]
        (folder / "data" / path.name).write_text("".join(some), encoding="utf-8")
    shutil.rmtree(folder / "phrasebook")
    programs = folder / "bin"
    programs.mkdir()
    for name, words in (("trmt", " -m trmt"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_commands_and_programs_run(tmp_path: Path) -> None:
    environment = prepare_workspace(tmp_path)

    def run(command: str) -> None:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"

    for command in shell_commands():
        run(command)
    for page in PROGRAMS:
        for number, code in enumerate(blocks(page, "python")):
            script = tmp_path / f"{Path(page).stem}{number}.py"
            script.write_text(shorter(code), encoding="utf-8")
            run(f"python {script.name}")
