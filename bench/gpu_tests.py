"""The tests that need a GPU, as a result file: how many passed, and what those that did not had to say.

python bench/gpu_tests.py [PYTEST OPTIONS, by default -m gpu]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from provenance import RESULTS, ROOT, record

SHOWN = 2000  # characters of each failure


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the tests that need a GPU.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given, options = parser.parse_known_args()
    options = options or ["-m", "gpu"]
    figures = run(options)
    command = " ".join(["python -m pytest", *options])
    print(record("gpu-tests", figures, command=command, folder=given.out))


def run(options: list[str]) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        subprocess.run([*command, *options], cwd=ROOT, check=False)
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    unhappy = {
        f"{case.get('classname')}::{case.get('name')}": (problem.text or problem.get("message") or "")[
            -SHOWN:
        ]
        for case in suite.iter("testcase")
        for problem in (*case.findall("failure"), *case.findall("error"))
    }
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {**counts, "passed": passed, "seconds": float(suite.get("time", 0)), "failed": unhappy}


if __name__ == "__main__":
    main()
