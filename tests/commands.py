"""Commands of `trmt` run in the process of the tests; the fixture `trmt` is one to call."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trmt.cli import main

Command = Callable[..., tuple[int, bytes, str]]


def in_this_process(monkeypatch: pytest.MonkeyPatch, captured: pytest.CaptureFixture[bytes]) -> Command:
    """What runs a command: (exit code, standard output, standard error)."""

    def run(*arguments: str | Path, stdin: bytes = b"") -> tuple[int, bytes, str]:
        monkeypatch.setattr(sys, "argv", ["trmt", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = captured.readouterr()
        return int(ended.value.code or 0), out, err.decode()

    return run
