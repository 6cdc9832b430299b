"""A short run on Multi30k by README's commands: trains, is stopped, resumes, averages, translates, scores.

    python bench/multi30k_short.py FOLDER [--steps 500]

FOLDER holds train, val and test_2016_flickr as .en and .de, plain or .gz, of the Multi30k data set
(Elliott et al. 2016, https://github.com/multi30k/dataset). Shows that the way works; the score of so few
steps is no measure of quality.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from provenance import record

TRMT = [sys.executable, "-m", "trmt"]


def main() -> None:
    parser = argparse.ArgumentParser(description="A short run on Multi30k.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    texts, steps = arguments.folder.resolve(), arguments.steps
    with tempfile.TemporaryDirectory() as work:
        figures = run(Path(work), texts, steps)
    print(record("multi30k-short", figures, command=f"python bench/multi30k_short.py FOLDER --steps {steps}"))


def run(work: Path, texts: Path, steps: int) -> dict:
    def trmt(*words: str) -> str:
        return subprocess.run([*TRMT, *words], cwd=work, check=True, stdout=subprocess.PIPE, text=True).stdout

    began = time.perf_counter()
    trmt("tokenizer", "--train", str(texts / "train"), "--from", "en", "--to", "de", "--size", "6000")
    trmt("prepare", "--train", str(texts / "train"), "--dev", str(texts / "val"))
    train = ["train", "--set", f"training.steps={steps}", "--set", f"validation.every={steps // 2}"]
    stopped = stop_halfway([*TRMT, *train], work, steps)
    trmt(*train)
    trmt("average", "--best", "2")
    translate = (
        f'gzip -cdf "{texts}"/test_2016_flickr.en* | "{sys.executable}" -m trmt translate > hypotheses.de'
    )
    subprocess.run(translate, shell=True, cwd=work, check=True)
    [reference] = texts.glob("test_2016_flickr.de*")
    scores = json.loads(trmt("score", "hypotheses.de", "--ref", str(reference), "--json"))
    return {
        "steps": steps,
        "stopped_and_resumed_at": stopped,
        "seconds": round(time.perf_counter() - began, 1),
        "scores": scores["systems"][0]["scores"],
    }


def stop_halfway(command: list[str], work: Path, steps: int) -> int:
    """Send SIGTERM in the second half; returns the step that was saved."""
    process = subprocess.Popen(command, cwd=work)
    while process.poll() is None:
        logs = list(work.glob("models/*/log.jsonl"))
        lines = logs[0].read_text(encoding="utf-8").splitlines() if logs else []
        if lines and json.loads(lines[-1])["step"] > steps // 2:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.5)
    assert process.wait() == 128 + signal.SIGTERM, "it had ended before it was stopped"
    return json.loads(logs[0].read_text(encoding="utf-8").splitlines()[-1])["step"]


if __name__ == "__main__":
    main()
