"""A plugin of pytest that writes the outcome of each test to a file as soon as it is known, as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_file: list[Path] = []
_spent: dict[str, float] = {}


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--each-test", type=Path)


def pytest_configure(config: Any) -> None:
    _file[:] = [config.getoption("--each-test")]


def pytest_runtest_logreport(report: Any) -> None:
    name = report.nodeid
    _spent[name] = _spent.get(name, 0.0) + report.duration
    ended = report.when == "call" or not report.passed  # a test that is set up badly is not called
    if not ended or _file[0] is None:
        return
    line = {
        "name": name,
        "outcome": report.outcome,
        "seconds": round(_spent[name], 2),
        "text": report.longreprtext,
    }
    with _file[0].open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
