"""Shows that the cost of training grows with the data and no faster: time per token and memory are flat.

    python bench/scale.py 10000 100000 1000000 10000000

For each size, the corpus of `bench/prepare.py` is generated and prepared, and a small Transformer is trained
on it for as long as a window lasts, by `trmt train`, in a process of its own. Reported are time and
processor time per target token, the time until the first step, the time steps waited for the loader, and
resident memory: all of it, and what of it is the process's own. The rest are pages of the mapped shards,
which the system takes back when it wants to. A second process only reads batches: the loader alone.

Ten million pairs take 5 GB of disk while they are prepared; `--folder` says where.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers.job import Job, Shape
from provenance import ROOT, record

SHAPE = Shape(width=64, feed_forward=128, heads=2, encoder_layers=1, decoder_layers=1)
BATCHES = 300  # that the loader alone reads


def main() -> None:
    parser = argparse.ArgumentParser(description="Training cost against the size of the data.")
    parser.add_argument("pairs", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of training measured for each size")
    parser.add_argument(
        "--folder", type=Path, help="where prepared sets are put and found again (a temporary folder)"
    )
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        print(json.dumps(load(given.load)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for pairs in given.pairs:
            folder = prepared((given.folder or Path(scratch)) / str(pairs), pairs)
            rows.append(measure(folder, pairs, threads=given.threads, seconds=given.seconds))
            print(json.dumps(rows[-1]), file=sys.stderr)
    words = [word for word in sys.argv[1:] if word != str(given.folder)]
    command = f"python bench/scale.py {shlex.join(word for word in words if word != '--folder')}"
    print(record("scale", {"threads": given.threads, "rows": rows}, command=command))


def prepared(folder: Path, pairs: int) -> Path:
    """The folder with a prepared set of so many pairs in it, unless it was there before."""
    if (folder / "set" / "index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for stage in ("write", "tokenizer", "prepare"):
        command = [sys.executable, str(ROOT / "bench" / "prepare.py"), str(pairs)]
        command += ["--folder", str(folder), "--stage", stage]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    for text in folder.glob("train.*"):
        text.unlink()
    return folder


def measure(folder: Path, pairs: int, *, threads: int, seconds: float) -> dict[str, Any]:
    """One size: train, load."""
    trained = train(folder, threads=threads, seconds=seconds)
    command = [sys.executable, __file__, "0", "--load", str(folder / "set")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=_environment(threads), cwd=ROOT)
    return {"pairs": pairs, **trained, "loader": json.loads(done.stdout)}


def _environment(threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "bench"), str(ROOT)]),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }


def train(folder: Path, *, threads: int, seconds: float) -> dict[str, Any]:
    """What the probe says of training on the set in `folder`."""
    work, report = folder / "work", folder / "report.json"
    shutil.rmtree(work, ignore_errors=True)
    report.unlink(missing_ok=True)
    work.mkdir()
    job = Job(
        corpus="",
        work=str(work),
        report=str(report),
        shape=SHAPE,
        data_set=str(folder / "set"),
        threads=threads,
        seconds=seconds,
    )
    job.write(work / "job.json")
    command = [sys.executable, "-m", "peers.trmt", "train", str(work / "job.json")]
    with (work / "log").open("wb") as log:
        subprocess.run(command, env=_environment(threads), cwd=work, stdout=log, stderr=log, check=False)
    if not report.is_file():
        sys.exit(f"training failed:\n{(work / 'log').read_text(errors='replace')[-2000:]}")
    found = json.loads(report.read_bytes())
    tokens = found["target_tokens"]
    return {
        "microseconds_per_token": round(found["seconds"] / tokens * 1e6, 2),
        "cpu_microseconds_per_token": round(found["cpu_seconds"] / tokens * 1e6, 2),
        "seconds_to_first_step": round(found["first_update_seconds"], 2),
        "share_waiting": round(found["loader_wait_seconds"] / found["seconds"], 5),
        "padding": round(
            1 - (found["source_tokens"] + tokens) / (found["source_cells"] + found["target_cells"]),
            4,
        ),
        "peak_mib": round(found["peak_mib"]),
        "own_mib": round(found["own_mib"]),
    }


def load(data_set: Path) -> dict[str, Any]:
    """Read batches without training on them."""
    from peers.probe import own_mib
    from trmt.nets.transformer import Transformer
    from trmt.sets.batches import BatchConfig, Batches, DataPosition
    from trmt.sets.shards import PreparedSet

    before = own_mib()
    began = time.perf_counter()
    batches = Batches(
        PreparedSet.open(data_set), BatchConfig(), seed=1, padding_free=Transformer.packs_tokens
    )
    stream = batches.steps(DataPosition(0, 0))
    next(stream)
    planned = time.perf_counter() - began
    tokens, began, busy = 0, time.perf_counter(), time.process_time()
    for _ in range(BATCHES):
        _, examples = next(stream)
        tokens += sum(int(one.columns["target.ids"].lengths.sum()) + len(one) for one in examples)
    found = {
        "seconds_to_first_batch": round(planned, 2),
        "nanoseconds_per_token": round((time.perf_counter() - began) / tokens * 1e9, 1),
        "cpu_nanoseconds_per_token": round((time.process_time() - busy) / tokens * 1e9, 1),
        "own_mib_more": round(own_mib() - before),
    }
    stream.close()
    return found


if __name__ == "__main__":
    main()
