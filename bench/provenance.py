"""Result files: figures beside the machine, the versions, the commit and the command they come from."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "sentencepiece", "sacrebleu", "numpy")


def record(name: str, figures: dict, *, command: str, folder: Path = RESULTS) -> Path:
    """Write <folder>/<name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    result = {"figures": figures, "command": command, **provenance()}
    write_json(path, result)
    return path


def write_json(path: Path, tree: Any, *, indent: int = 2) -> None:
    """Write a file that is there whole or not at all, whenever the process is killed."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(tree, indent=indent, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path) -> Any | None:
    """What a file holds; None if there is none, or if it was cut off."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def without_places(value: Any, names: Mapping[str, str]) -> Any:
    """The same figures or words with folders of this machine called by names."""
    if isinstance(value, str):
        for place, name in names.items():
            value = re.sub(rf"{re.escape(place)}(?=/|$)", name, value)
        return value
    if isinstance(value, Mapping):
        return {key: without_places(each, names) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(each, names) for each in value]
    return value


def provenance() -> dict:
    """Where and with what this is measured."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, cwd=ROOT, check=False
    )
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "gpu": gpu_model(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        # A copy without its repository is told what it is a copy of.
        "commit": commit.stdout.decode().strip() or os.environ.get("TRMT_COMMIT"),
        "date": time.strftime("%Y-%m-%d"),
    }


def gpu_model() -> str | None:
    """What the first GPU and its driver are called; None without one."""
    ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    name, _, driver = answer.splitlines()[0].partition(", ")
    return f"{name}, driver {driver}"


def cpu_model() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
