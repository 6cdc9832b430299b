"""What many tests share: commands to call, and prepared sets of the toy language, made once."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests import toy
from tests.commands import Command, in_this_process
from trmt import console
from trmt.registry import is_installed

AROUND = ("native", "lab", "interop", "insight", "scale")
MISSING = [package for package in AROUND if not is_installed(f"trmt.{package}")]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Where a package around the core was left out, so are the tests that import it."""
    if not MISSING or collection_path.suffix != ".py":
        return None
    imports = rf"^(from|import) trmt( import|\.)({'|'.join(MISSING)})\b"
    return bool(re.search(imports, collection_path.read_text(encoding="utf-8"), re.MULTILINE)) or None


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The tensors here are so small that threads would only wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    # Shells start what runs in the background deaf to interrupts, and processes under test inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    with mock.patch.object(os, "fsync"):
        yield


@pytest.fixture(autouse=True)
def _not_quiet() -> None:
    console.set_quiet(False)


@pytest.fixture
def trmt(monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Command:
    """Runs a command in this process: (exit code, standard output, standard error)."""
    return in_this_process(monkeypatch, capsysbinary)


@pytest.fixture(scope="session")
def toy_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set with a joint tokenizer."""
    return toy.make_set(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def separate_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text with a tokenizer for each side."""
    return toy.make_set(tmp_path_factory.mktemp("separate"), joint=False)
