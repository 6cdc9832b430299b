"""Teams of real processes, as torchrun would start them, that do the work of tests/crew_work.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start(size: int, work: str, folder: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    """One process for each rank, doing `work` of crew_work with the folder and the arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.crew_work", work, str(folder), *arguments],
            env={
                **os.environ,
                **place,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ended(crew: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """How each process ended, and what it said."""
    said = [process.communicate(timeout=120)[1] for process in crew]
    return [(process.returncode, words) for process, words in zip(crew, said, strict=True)]
