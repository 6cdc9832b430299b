"""Measures `trmt prepare`: pairs per second, on the clock and of processor time, and peak memory.

    python bench/prepare.py 1000000 --workers 2

writes bench/results/prepare-1000000.json. Memory is what getrusage calls the maximum resident set size: of
the main process, which holds nothing else, and of the largest worker.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import ROOT, record

CHUNK = 50_000
DUPLICATES = 0.02


def main() -> None:
    arguments = _arguments()
    if arguments.stage == "write":
        write_corpus(arguments.folder, arguments.pairs, arguments.longest)
    elif arguments.stage == "tokenizer":
        train_tokenizer(arguments.folder)
    elif arguments.stage == "prepare":
        print(json.dumps(measure(arguments.folder, arguments.pairs, arguments.workers)))
    else:
        run(arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure trmt prepare.")
    parser.add_argument("pairs", type=int, help="how many synthetic pairs")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--longest", type=int, default=40, help="words in the longest sentences")
    parser.add_argument("--folder", type=Path, help="where to put the corpus (a temporary folder)")
    parser.add_argument("--stage", choices=["write", "tokenizer", "prepare"], help=argparse.SUPPRESS)
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Each stage is a process of its own, so that the memory of one is not counted for another."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for stage in ("write", "tokenizer", "prepare"):
            command = [sys.executable, __file__, str(arguments.pairs), "--workers", str(arguments.workers)]
            command += ["--longest", str(arguments.longest), "--folder", folder, "--stage", stage]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT)
    command = f"python bench/prepare.py {arguments.pairs} --workers {arguments.workers}"
    path = record(f"prepare-{arguments.pairs}", json.loads(done.stdout), command=command)
    print(path.read_text(encoding="utf-8"), end="")


def write_corpus(folder: Path, count: int, longest: int) -> None:
    """Sentences of 3 words and more with the frequencies of a language; one in fifty is an exact copy."""
    import numpy as np

    chooser = np.random.default_rng(1)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    languages = []
    for _ in range(2):
        sizes = chooser.integers(2, 12, 50_000)
        spelled = "".join(letters[chooser.zipf(1.3, int(sizes.sum())) % 26])
        ends = np.cumsum(sizes)
        words = [spelled[end - size : end] for end, size in zip(ends.tolist(), sizes.tolist(), strict=True)]
        languages.append(np.array(words, object))
    with (folder / "train.en").open("wb") as source, (folder / "train.de").open("wb") as target:
        for begin in range(0, count, CHUNK):
            size = min(CHUNK, count - begin)
            lengths = chooser.integers(3, longest, size, endpoint=True)
            copied = chooser.random(size) < DUPLICATES
            sides = [_sentences(chooser, words, lengths) for words in languages]
            for file, side in zip((source, target), sides, strict=True):
                picked = [side[0] if copy else text for text, copy in zip(side, copied, strict=True)]
                file.write("".join(picked).encode())


def _sentences(chooser: Any, words: Any, lengths: Any) -> list[str]:
    picked = words[(chooser.zipf(1.2, int(lengths.sum())) - 1) % len(words)].tolist()
    sentences, begin = [], 0
    for length in lengths.tolist():
        sentences.append(" ".join(picked[begin : begin + length]) + "\n")
        begin += length
    return sentences


def train_tokenizer(folder: Path) -> None:
    from trmt.text import tokenizer_training

    options = tokenizer_training.TokenizerOptions(
        corpora=(str(folder / "train"),), languages=("en", "de"), size=8000, sample=100_000
    )
    tokenizer_training.train_tokenizer(options, out=folder / "tokenizer")


def measure(folder: Path, count: int, workers: int) -> dict[str, object]:
    import resource

    from trmt.sets.preparing import PrepareOptions, prepare

    options = PrepareOptions(
        train=(str(folder / "train"),),
        dev_size=0,
        out=folder / "set",
        tokenizer=folder / "tokenizer",
        workers=workers,
    )
    began = time.perf_counter()
    prepared = prepare(options)
    seconds = time.perf_counter() - began
    unit = 1024 if sys.platform == "darwin" else 1  # kilobytes everywhere else
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    main, worker = (usage.ru_maxrss / unit / 1024 for usage in usages)
    busy = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    return {
        "pairs": count,
        "workers": workers,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
        "pairs_per_second": round(count / seconds),
        "pairs_per_cpu_second": round(count / busy),
        "source_bytes": (folder / "train.en").stat().st_size,
        "target_bytes": (folder / "train.de").stat().st_size,
        "peak_mib_main": round(main),
        "peak_mib_largest_worker": round(worker),
        "peak_mib_all": round(main + (worker * workers if workers > 1 else 0)),
        "kept": len(prepared.split("train")),
        "dropped": prepared.index["corpora"][0]["dropped"],
        "values": prepared.index["splits"]["train"]["values"],
    }


if __name__ == "__main__":
    main()
