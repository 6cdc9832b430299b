"""Result files: figures beside the machine, the versions, the commit and the command they come from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "sentencepiece", "sacrebleu", "numpy")


def record(name: str, figures: dict, *, command: str) -> Path:
    """Write bench/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    result = {"figures": figures, "command": command, **provenance()}
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def provenance() -> dict:
    """Where and with what this is measured."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, cwd=ROOT, check=False
    )
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit.stdout.decode().strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_model() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
