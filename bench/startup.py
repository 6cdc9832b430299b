"""Measures how soon the first translation is there: `python bench/startup.py BUNDLE`.

Each round is a process of its own that imports torch, and from then on is timed until one sentence is
translated as `trmt translate` does it and printed. The first round of a network in 8 bits also packs the
weights into the cache, which later ones find there; it is told apart. `--help` is timed as a whole.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from provenance import RESULTS, ROOT, record

FIRST = """
import json, sys, time
import torch
torch.set_num_threads(1)
began, worked = time.perf_counter(), time.process_time()
from trmt.cli import main
sys.argv = ["trmt", "translate", *sys.argv[1:]]
try:
    main()
finally:
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
    print(json.dumps({name: round(value, 3) for name, value in spent.items()}), file=sys.stderr)
"""
HELP = """
import subprocess, sys, time
began = time.perf_counter()
subprocess.run([sys.executable, "-m", "trmt", "--help"], check=True, capture_output=True)
print('{"seconds": %.3f}' % (time.perf_counter() - began), file=sys.stderr)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how soon the first translation is there.")
    parser.add_argument("bundle", type=Path, help="a trained network")
    parser.add_argument("--sentence", default="Ein Mann fährt Rad.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result")
    given = parser.parse_args()
    line = f"{given.sentence}\n"
    rounds: dict[str, list[dict]] = {"fp32": [], "int8": [], "help": []}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(given.rounds):
            for precision in ("fp32", "int8"):
                words = [str(given.bundle.resolve()), "--precision", precision]
                rounds[precision].append(timed(FIRST, words, line, cache))
            rounds["help"].append(timed(HELP, [], line, cache))
    packing = rounds["int8"].pop(0)
    figures = {name: summed_up(found) for name, found in rounds.items()} | {"int8_packing": packing}
    size = sum(path.stat().st_size for path in given.bundle.iterdir() if path.suffix == ".safetensors")
    figures["bundle_mib"] = round(size / 2**20, 1)
    print(record("startup", figures, command="python bench/startup.py BUNDLE", folder=given.out))


def timed(program: str, words: list[str], line: str, cache: str) -> dict:
    """What a process says of its time on its last line."""
    environment = {**os.environ, "XDG_CACHE_HOME": cache, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        input=line,
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    found: dict = json.loads(done.stderr.splitlines()[-1])
    return found


def summed_up(found: list[dict]) -> dict:
    """Medians and extremes."""
    seconds = sorted(each["seconds"] for each in found)
    return {"median": median(seconds), "least": seconds[0], "most": seconds[-1], "rounds": len(seconds)}


if __name__ == "__main__":
    main()
