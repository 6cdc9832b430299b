"""The tests that need a GPU, as a result file: the outcome of each, written as soon as it is known.

python bench/gpu_tests.py [--budget 5m] [PYTEST OPTIONS, by default -m gpu]

Run again, it runs what has not passed; with --budget it stops in good time and goes on when it is run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from budget import AGAIN, Budget, OutOfTime, die_together, seconds, stop_together
from provenance import RESULTS, ROOT, read_json, record

SHOWN = 2000  # characters of each failure
GRACE = 5.0
NAME = "gpu-tests"
EACH_TEST = "each_test"  # the plugin of pytest that reports each test, and the option that names its file


def main() -> None:
    die_together()
    stop_together()  # what SIGTERM does from now on
    parser = argparse.ArgumentParser(description="Run the tests that need a GPU.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--budget", help="stop in good time before this has passed, such as 4m")
    given, options = parser.parse_known_args()
    options = options or ["-m", "gpu"]
    budget = Budget(seconds(given.budget), grace=GRACE) if given.budget else Budget()
    command = " ".join(["python -m pytest", *options])

    def keep(tests: dict[str, Any]) -> None:
        record(NAME, summed_up(tests), command=command, folder=given.out)

    try:
        run(options, earlier(given.out / f"{NAME}.json"), budget, keep)
    except OutOfTime:
        raise SystemExit(AGAIN) from None


def earlier(path: Path) -> dict[str, Any]:
    """The tests that have passed in an earlier call."""
    found = read_json(path) or {}
    tests: dict[str, Any] = found.get("figures", {}).get("each", {})
    return {name: test for name, test in tests.items() if test["outcome"] in ("passed", "skipped")}


def run(
    options: list[str], tests: dict[str, Any], budget: Budget, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Run the tests that are not among `tests`, and keep what is known after each."""
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.jsonl", Path(folder) / "log"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", EACH_TEST, f"--each-test={report}", *options]
        command += [f"--deselect={name}" for name in tests]
        read = 0

        def look() -> None:
            nonlocal read
            lines = report.read_bytes().splitlines(keepends=True) if report.exists() else []
            whole = [line for line in lines if line.endswith(b"\n")]
            for line in whole[read:]:
                test = json.loads(line)
                tests[test.pop("name")] = {**test, "text": test["text"][-SHOWN:]}
            if len(whole) > read or not read:
                keep(tests)
            read = len(whole)

        try:
            budget.run(command, log=log, cwd=ROOT, env=environment(), look=look)
        except SystemExit as error:
            look()
            if not tests:
                raise SystemExit(f"no test was run: {error}") from None
        finally:
            look()


def environment() -> dict[str, str]:
    """That of this process, in which pytest finds the plugin."""
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "bench"), *([before] if before else [])])}


def summed_up(tests: dict[str, Any]) -> dict[str, Any]:
    """Counts, what those that failed had to say, and the outcome of each test."""
    counts = {
        outcome: sum(test["outcome"] == outcome for test in tests.values())
        for outcome in ("passed", "failed", "skipped")
    }
    return {
        "tests": len(tests),
        **{name: count for name, count in counts.items() if name != "failed"},
        "failures": counts["failed"],
        "seconds": round(sum(test["seconds"] for test in tests.values()), 2),
        "failed": {name: test["text"] for name, test in tests.items() if test["outcome"] == "failed"},
        "each": tests,
    }


if __name__ == "__main__":
    main()
