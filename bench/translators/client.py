"""The other end of server.py: starts such a process, and asks it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from provenance import ROOT


class Failed(Exception):
    """An engine that cannot do it; the last line of its log."""


class Engine:
    """A process of NAME.py in this folder; `words` are what it is started with."""

    def __init__(self, python: Path, name: str, words: Sequence[str], *, threads: int, log: Path) -> None:
        own = [str(ROOT)] if name.startswith("trmt") else []
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "bench"), *own]),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "GOMP_SPINCOUNT": "10000",  # what trmt sets for itself
            "HF_HUB_OFFLINE": "1",
        }
        self.log = log
        command = [str(python), "-m", f"translators.{name}", *words]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream
            )
        self.told = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.end()
            said = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
            last = [text for text in said if text.strip()][-1:]
            raise Failed(*last or [f"it ended with status {self.process.returncode}"])
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self.process.stdin
        # If it has ended, the answer says why.
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(what).encode() + b"\n")
            self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
