"""What many tests share: commands to call, and prepared sets of the toy language, made once."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests import toy
from tests.commands import Command, in_this_process
from trmt import console


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The tensors here are so small that threads would only wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    # Shells start what runs in the background deaf to interrupts, and processes under test inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
