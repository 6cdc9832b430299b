"""Runs the demo and records its figures: `python bench/phrasebook.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from provenance import ROOT, record


def main() -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    began = time.perf_counter()
    subprocess.run(["sh", "data/demo.sh"], cwd=ROOT, check=True, env=os.environ | {"PATH": path})
    seconds = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        report = [sys.executable, "data/demo_report.py", "models/demo", "--json", str(out)]
        subprocess.run(report, cwd=ROOT, check=True)
        figures = json.loads(out.read_bytes())
    figures["demo_seconds"] = round(seconds, 1)
    print(record("phrasebook", figures, command="python bench/phrasebook.py"))


if __name__ == "__main__":
    main()
