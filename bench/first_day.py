"""What a first day gives: corpora of a few hundred to some hundred thousand pairs, with every default.

    python bench/first_day.py FOLDER --name tatoeba-en-de --from en --to de --sizes 300,3000,20000,160000
        [--budget 9m] [--work WORK] [--threads 1]

FOLDER holds train, dev and test, plain or .gz, one file for each language; of train the first lines are
taken, so many as --sizes says. Each size goes the way of README's commands: tokenizer, prepare, train,
average, translate, score; recipe and vocabulary are those that trmt selects. The time that a dry run of
`trmt train` would print is kept beside the measured one. Run again, it goes on where the time ran out; sizes
that are complete are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from budget import AGAIN, Budget, Ledger, OutOfTime, seconds
from experiment import raw, training, write_lines
from provenance import RESULTS, ROOT, provenance, record

TRMT = [sys.executable, "-m", "trmt"]
RESULT = "first-day"
RUN = "models/run"  # of a size, in its folder
DEV_LINES = 500
PLAN, ROW = "plan.json", "row.json"  # of a size, in its folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on corpora of several sizes with every default.")
    parser.add_argument("folder", type=Path, help="where the corpus is")
    parser.add_argument("--name", required=True, help="of the corpus, in the result")
    parser.add_argument("--from", dest="source", required=True, help="suffix of the source files")
    parser.add_argument("--to", dest="target", required=True, help="suffix of the target files")
    parser.add_argument("--sizes", default="300,3000,20000", help="numbers of pairs")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each command")
    parser.add_argument("--budget", default="24h", help="stop in good time before this has passed: 9m, 540s")
    parser.add_argument("--work", type=Path, help="what is made on the way [default: in models/]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result")
    parser.add_argument("--shared", action="store_true", help="note that others use the machine meanwhile")
    given = parser.parse_args()
    work = (given.work or ROOT / "models" / "bench-first-day").resolve()
    budget = Budget(seconds(given.budget))
    missing = False
    for pairs in map(int, given.sizes.split(",")):
        try:
            keep(given, pairs, Day(given, work / f"{given.name}-{pairs}", pairs, budget).run())
        except OutOfTime:
            missing = True
            break
    raise SystemExit(AGAIN if missing else 0)


def keep(given: argparse.Namespace, pairs: int, row: dict) -> None:
    """Write a row into the result, beside those that are there."""
    path = given.out / f"{RESULT}.json"
    rows = json.loads(path.read_bytes())["figures"]["rows"] if path.exists() else {}
    rows[f"{given.name} {pairs}"] = row
    ordered = dict(sorted(rows.items(), key=lambda item: (item[1]["corpus"], item[1]["pairs"])))
    command = "python bench/first_day.py FOLDER --name NAME --from SOURCE --to TARGET --sizes N"
    print(record(RESULT, {"rows": ordered}, command=command, folder=given.out), given.name, pairs, flush=True)


class Day:
    """A size of a corpus, from text to score."""

    def __init__(self, given: argparse.Namespace, work: Path, pairs: int, budget: Budget) -> None:
        self.given, self.work, self.pairs, self.budget = given, work, pairs, budget
        self.ledger = Ledger(work / "seconds.tsv")

    def run(self) -> dict:
        """The row of this size; what is complete is not repeated."""
        finished = self.work / ROW
        if finished.exists():
            return json.loads(finished.read_bytes())
        self.work.mkdir(parents=True, exist_ok=True)
        self.write_texts()
        threads = ["--threads", str(self.given.threads)]
        languages = ["--from", self.given.source, "--to", self.given.target]
        if not (self.work / "tokenizer").exists():
            self.trmt("tokenizer", "tokenizer", "tokenizer", "--train", "text/train", *languages)
        if not (self.work / "data").exists():
            sets = ["--train", "text/train", "--dev", "text/dev", "--tokenizer", "tokenizer"]
            self.trmt("prepare", "prepare", "data", *sets)
        plan = self.plan()
        self.trmt("train", "train", RUN, "--data", "data", *threads)
        run = self.work / RUN
        if len(list(run.glob("step-*"))) > 1 and not (run / "average").exists():
            self.trmt("average", "average", RUN)
        row = {
            "corpus": self.given.name,
            "pairs": self.pairs,
            "threads": self.given.threads,
            "shared": self.given.shared,
            "plan": plan,
            "training": training(run / "log.jsonl"),
            "best": best_scores(run / "log.jsonl"),
            "scores": self.scores(threads),
            "seconds": self.ledger.totals(),
            "commit": provenance()["commit"],
        }
        write_lines(finished, [json.dumps(row, indent=2, ensure_ascii=False)])
        return row

    def write_texts(self) -> None:
        """The text of this size, and the dev and test sets that all sizes share."""
        (self.work / "text").mkdir(exist_ok=True)
        for language in (self.given.source, self.given.target):
            for name, most in (("train", self.pairs), ("dev", DEV_LINES), ("test", None)):
                path = self.work / "text" / f"{name}.{language}"
                if path.exists():
                    continue
                lines = raw(self.given.folder.resolve(), name, language)
                if most and name == "train" and len(lines) < most:
                    raise SystemExit(f"{self.given.folder} has {len(lines)} pairs, not {most}")
                write_lines(path, lines[:most])

    def trmt(self, stage: str, *words: str, **options: object) -> None:
        began = time.monotonic()
        try:
            self.budget.run([*TRMT, *words], log=self.work / "log.txt", cwd=self.work, **options)
        finally:
            self.ledger.add(stage, time.monotonic() - began)

    def plan(self) -> dict:
        """What a dry run tells of the training, measured in a process of its own."""
        path = self.work / PLAN
        if not path.exists():
            code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import first_day"
            code += f"; first_day.write_plan({self.given.threads}, {PLAN!r})"
            subprocess.run([sys.executable, "-c", code], cwd=self.work, check=True)
        return json.loads(path.read_bytes())

    def scores(self, threads: list[str]) -> dict:
        """The scores of the model that a user gets, on the test set."""
        source, hypotheses = self.work / "text" / f"test.{self.given.source}", self.work / "hypotheses"
        with source.open("rb") as stdin, hypotheses.open("wb") as stdout:
            self.trmt("translate", "translate", RUN, *threads, stdin=stdin, stdout=stdout)
        wanted = ["--ref", f"text/test.{self.given.target}", "--json"]
        scores = self.work / "scores.json"
        with scores.open("wb") as stdout:
            self.trmt("score", "score", "hypotheses", *wanted, stdout=stdout)
        return json.loads(scores.read_bytes())["systems"][0]["scores"]


def write_plan(threads: int, path: str) -> None:
    """The figures of `trmt train --dry-run` for the set in the folder `data`, as JSON."""
    import torch

    from trmt.sets.shards import PreparedSet
    from trmt.training.budget import measure
    from trmt.training.planning import TrainOptions
    from trmt.training.recipe import fitting_recipe
    from trmt.training.run import TrainingRun
    from trmt.validating import validate

    torch.set_num_threads(threads)
    pairs = len(PreparedSet.open(Path("data")).split("train"))
    run = TrainingRun.from_options(TrainOptions(run=Path(RUN), data=Path("data")), validate)
    found = measure(run.state, run.batches, largest=False)
    assert run.validator, "there is a dev set"
    recipe = run.recipe
    plan = {
        "recipe": fitting_recipe(pairs, gpu=torch.cuda.is_available()),
        "vocabulary": run.tokenizer.target.vocabulary,
        "steps": run.last_step,
        "steps_per_epoch": run.steps_per_epoch,
        "every": recipe.validation.every,
        "patience": recipe.training.patience,
        "seconds_per_step": round(found.seconds, 4),
        "seconds_per_validation": round(run.validator.estimate_seconds() or 0.0, 3),
    }
    write_lines(Path(path), [json.dumps(plan)])


def best_scores(log: Path) -> dict:
    """The best score of each metric on the dev set, and its step."""
    from trmt.training.history import VALIDATE, History, best

    history = History.read(log)
    found = {name: best(history.curve(VALIDATE, name), name) for name in history.metrics()}
    return {
        name: {"value": round(point.value, 4), "step": point.step} for name, point in found.items() if point
    }


if __name__ == "__main__":
    main()
