"""Measures a corpus in parts: what a worker does in a second, and what having several costs.

    python bench/cluster.py translate BUNDLE SOURCE
    python bench/cluster.py prepare --lines 200000

Each row is a process of its own, which does the same work with one and two workers: processes of this
machine, and a Ray cluster that is started for it, which is not counted. A worker's rate is that of its parts,
from the first byte read to the file in its place; what is beside that is starting workers, cutting, waiting
for the last, and, of `prepare`, what one process does for all: checksums, collecting, duplicates. For
`prepare` there are also the ordinary command and sentencepiece by itself, which cuts the same text into the
same pieces and does nothing else. Rates by processor time are the same however busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prepare import train_tokenizer, write_corpus
from provenance import RESULTS, ROOT, record

ROWS = {
    "translate": ("processes/1", "processes/2", "ray/1", "ray/2", "cutting/1", "handing/2"),
    "prepare": ("sentencepiece/1", "alone/1", "alone/2", "processes/1", "processes/2", "ray/1", "ray/2"),
}
BLOCK = 4096  # lines that sentencepiece is given at a time, as trmt does
PARTS = 8  # what there is to do is cut into so many
CUT_BYTES = 200 << 20  # of text, that is only cut
HANDED = 2000  # parts with nothing to do, that are only handed out


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a corpus in parts.")
    parser.add_argument("what", choices=ROWS)
    parser.add_argument("bundle", type=Path, nargs="?", help="of a trained network")
    parser.add_argument("source", type=Path, nargs="?", help="sentences for it")
    parser.add_argument("--lines", type=int, default=2000, help="to translate or to prepare")
    parser.add_argument("--rows", nargs="+", help="only these; those of an earlier call are kept")
    parser.add_argument("--busy", action="store_true", help="others use the machine: the clock says little")
    parser.add_argument("--name", help="of the result; by itself cluster-WHAT")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="where the text is put (a temporary folder)")
    given = parser.parse_args()
    if given.row:
        kind, _, workers = given.row.partition("/")
        print(json.dumps(measure(given, kind, int(workers))))
        return
    places = "BUNDLE SOURCE " if given.what == "translate" else ""
    command = f"python bench/cluster.py {given.what} {places}--lines {given.lines}"
    if given.name:
        command += f" --rows {' '.join(given.rows or ROWS[given.what])} --name {given.name}"
    name = given.name or f"cluster-{given.what}"
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        write(given, Path(folder))
        for row in given.rows or ROWS[given.what]:
            found = {**run(given, row, folder), "busy": given.busy}
            rows = kept(given.out / f"{name}.json", found)
            path = record(name, {"rows": rows}, command=command, folder=given.out)
    print(path)


def kept(path: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row behind those of earlier calls, of which it takes the place of its own."""
    before = json.loads(path.read_bytes())["figures"]["rows"] if path.exists() else []
    return [other for other in before if other["row"] != row["row"]] + [row]


def write(given: argparse.Namespace, folder: Path) -> None:
    if given.what == "translate":
        lines = given.source.read_bytes().splitlines(keepends=True)
        text = b"".join(lines[number % len(lines)] for number in range(given.lines))
        (folder / "text").write_bytes(text)
    else:
        write_corpus(folder, given.lines, 40)
        train_tokenizer(folder)


def run(given: argparse.Namespace, row: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, given.what, *map(str, filter(None, (given.bundle, given.source)))]
    command += ["--lines", str(given.lines), "--row", row, "--folder", folder]
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench")])
    began = time.perf_counter()
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    found = {"row": row, "lines": given.lines, "seconds": round(time.perf_counter() - began, 2), **found}
    print(json.dumps(found), file=sys.stderr)
    return found


def measure(given: argparse.Namespace, kind: str, workers: int) -> dict[str, Any]:
    """What one row says of itself, in a process of its own."""
    if kind == "sentencepiece":
        return sentencepiece_alone(given.folder)
    if kind == "cutting":
        return cutting(given.folder)
    if kind == "handing":
        return handing(workers)
    with ExitStack() as ends:
        results: list[dict[str, Any]] = []
        began = time.perf_counter()
        make_pool = None if kind == "alone" else ends.enter_context(recorded(kind, workers, results))
        connected, began = time.perf_counter() - began, time.perf_counter()
        if given.what == "translate":
            translate(given, make_pool)
        else:
            prepare(given.folder, make_pool, workers)
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        clock = time.perf_counter() - began
    found: dict[str, Any] = {"clock_seconds": round(clock, 2)}
    if kind == "ray":
        found["connecting_seconds"] = round(connected, 2)
    if results:
        lines, seconds, busy = (
            sum(one[key] for one in results) for key in ("lines", "seconds", "cpu_seconds")
        )
        found["parts"] = len(results)
        found["lines_per_second_of_a_worker"] = round(lines / seconds, 1)
        found["lines_per_cpu_second_of_a_worker"] = round(lines / busy, 1)
        found["beside_the_parts_seconds"] = round(clock - seconds / workers, 2)
    # The workers of Ray are no children of this process.
    found["main_cpu_seconds"] = round(usage[0].ru_utime + usage[0].ru_stime, 2)
    if kind != "ray":
        busy = sum(each.ru_utime + each.ru_stime for each in usage)
        found["lines_per_cpu_second"] = round(given.lines / busy, 1)
    return found


@contextmanager
def recorded(kind: str, workers: int, results: list[dict[str, Any]]) -> Iterator[Any]:
    """A function that makes worker pools; the result of each part is appended to `results`."""
    from trmt.scale.pool import ProcessPool
    from trmt.scale.ray_pool import LOCAL, ray_cluster

    with ExitStack() as ends:
        if kind == "ray":
            make = partial(ends.enter_context(ray_cluster(LOCAL, workers=workers)).pool, count=workers)
        else:
            make = partial(ProcessPool, devices=("cpu",) * workers)

        def make_pool(job: Any) -> Any:
            made = make(job)
            replies = made.replies

            def recording() -> Any:
                found = replies()
                results.extend(reply.value for reply in found if reply.status == "done")
                return found

            made.replies = recording
            return made

        yield make_pool


def translate(given: argparse.Namespace, make_pool: Any) -> None:
    from trmt.scale.corpus_translating import CorpusOptions, translate_corpus
    from trmt.translating import TranslateOptions

    size = (given.folder / "text").stat().st_size
    with tempfile.TemporaryDirectory() as out:
        options = CorpusOptions(
            source=str(given.folder / "text"),
            out=out,
            model=given.bundle,
            search=TranslateOptions(device="cpu"),
            part_mib=size / PARTS / 2**20,
        )
        translate_corpus(options, make_pool)


def prepare(folder: Path, make_pool: Any, workers: int) -> None:
    from trmt.scale.corpus_preparing import prepare_in_parts
    from trmt.sets import preparing

    size = (folder / "train.en").stat().st_size
    with tempfile.TemporaryDirectory() as out:
        options = preparing.PrepareOptions(
            train=(str(folder / "train"),),
            dev_size=0,
            out=Path(out, "set"),
            tokenizer=folder / "tokenizer",
            workers=workers,
        )
        if make_pool is None:
            preparing.prepare(options)
        else:
            prepare_in_parts(options, make_pool, part_bytes=size // PARTS)


def cutting(folder: Path) -> dict[str, Any]:
    """Ranges and their digests, of text that is in memory as far as the system keeps it there."""
    from trmt.text.ranges import split_by_size

    text = (folder / "text").read_bytes()
    with (folder / "long").open("wb") as stream:
        for _ in range(CUT_BYTES // len(text)):
            stream.write(text)
    began = time.process_time()
    with (folder / "long").open("rb") as stream:
        ranges = split_by_size(stream, size=1 << 20)
    return {"mb_per_cpu_second": round(ranges[-1].end / 1e6 / (time.process_time() - began))}


@dataclass(frozen=True)
class Nothing:
    """A part, and the job of doing it."""

    name: str = ""

    def load(self) -> Any:
        return lambda part: None


def handing(workers: int) -> dict[str, Any]:
    """How many parts the main process hands out in a second, if nobody takes time for them."""
    from trmt.scale.parts import process_parts
    from trmt.scale.ray_pool import LOCAL, ray_cluster

    with ray_cluster(LOCAL, workers=workers) as cluster, cluster.pool(Nothing(), count=workers) as pool:
        ready = pool.replies() + (pool.replies() if workers > 1 else [])
        pool.replies = chained(ready, pool.replies)
        began, worked = time.perf_counter(), time.process_time()
        process_parts([Nothing(str(number)) for number in range(HANDED)], pool, title="handing out")
        seconds, busy = time.perf_counter() - began, time.process_time() - worked
    return {"parts_per_second": round(HANDED / seconds), "parts_per_cpu_second": round(HANDED / busy)}


def chained(first: list[Any], later: Any) -> Any:
    """Replies that arrived before the clock was started, and then all others."""
    return lambda: [first.pop()] if first else later()


def sentencepiece_alone(folder: Path) -> dict[str, Any]:
    """Both sides of all pairs into pieces, block after block, on one thread."""
    import sentencepiece

    [model] = (folder / "tokenizer").glob("*.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    busy, count = 0.0, 0
    for name in ("train.en", "train.de"):
        with (folder / name).open(encoding="utf-8", newline="\n") as stream:
            lines = stream.read().split("\n")[:-1]
        count = len(lines)
        began = time.process_time()
        for begin in range(0, len(lines), BLOCK):
            processor.encode(lines[begin : begin + BLOCK], out_type=int, num_threads=1)
        busy += time.process_time() - began
    return {"lines_per_cpu_second": round(count / busy, 1)}


if __name__ == "__main__":
    main()
