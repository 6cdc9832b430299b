"""README tells the truth: its tables come from the result files, its paths exist, its commands run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MAKE = ("make demo", "make test")  # .ci/run runs these


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    return [body for name, body in fenced if name == language]


def test_the_tables_are_those_of_the_result_files() -> None:
    specification = importlib.util.spec_from_file_location("readme", ROOT / "bench" / "readme.py")
    assert specification and specification.loader
    readme = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(readme)
    for page in readme.PAGES:
        text = page.read_text(encoding="utf-8")
        assert readme.generated(text) == text, "run: python bench/readme.py"


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT)
    assert links and all((ROOT / link).exists() for link in links)


def test_every_file_of_the_tree_exists() -> None:
    [tree] = [block for block in blocks("") if block.startswith("trmt/\n")]
    places = re.findall(r"^  ([\w/]+/|(?:\w+\.py ?)+)", tree, re.MULTILINE)
    names = [name for place in places for name in place.split()]
    assert len(names) > 20
    assert not [name for name in names if not (ROOT / "trmt" / name).exists()]
    described = {name for name in names if name.endswith(".py")}
    modules = {path.name for path in (ROOT / "trmt").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert modules == described, "a module is missing from the tree in README.md, or is gone"


def shorter(command: str) -> str:
    """The same command with a tenth of the training steps: what changes is how long it takes."""
    command = re.sub(r"training\.steps=(\d+)0\b", r"training.steps=\1", command)
    if command.startswith("trmt train") and "training.steps" not in command:
        command += " --set training.steps=40 --set validation.every=20"
    return command


@pytest.mark.slow
def test_every_command_runs(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for script in (ROOT / "data").glob("phrasebook*.py"):
        shutil.copy(script, tmp_path / "data")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "trmt").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m trmt "$@"\n')
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    commands = [line for block in blocks("sh") for line in block.splitlines() if line not in MAKE]
    # The first one needs a model, which the six commands make.
    first = commands.pop(0)
    assert first.endswith("trmt translate")
    for command in [*map(shorter, commands), first]:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    for number, code in enumerate(blocks("python")):
        script = tmp_path / f"example{number}.py"
        script.write_text(code, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
