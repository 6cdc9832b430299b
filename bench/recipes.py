"""What each recipe learns in a few minutes of one core: `python bench/recipes.py [--only NAME ...]`.

Most rows translate the demo's phrasebook; two are tasks that are no translation (data/beyond.py), and two
begin with a network that has read or written documents first. Large recipes are given a smaller network, no
dropout, and a rate that falls to nothing within the few steps there are. A row that is in the result file
with the same settings is not made again, so that work that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from provenance import RESULTS, ROOT, provenance, record

RESULT = "recipes"
SHORT = ("network.dropout=0.0", "batches.tokens=1024", "optim.schedule=cosine", "validation.sentences=100")
SMALL = ("network.d_model=128", *SHORT)
READS = ("batches.passage_tokens=32", "network.dropout=0.0", "optim.warmup=100")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A recipe and what is changed of it."""

    recipe: str
    steps: int
    settings: tuple[str, ...] = ()
    task: str = "phrasebook"
    start: str | None = None  # the recipe of what it begins with
    start_steps: int = 0
    start_settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.recipe} from {self.start}" if self.start else self.recipe

    @property
    def plan(self) -> dict:
        """All that the row's figures depend on, as JSON has it."""
        return json.loads(json.dumps(asdict(self)))


ROWS = (
    Row(recipe="transformer-tiny", steps=400, settings=(*SHORT, "optim.warmup=100")),
    Row(recipe="ssru-tiny", steps=400, settings=(*SHORT, "optim.warmup=100")),
    Row(recipe="rnn-fixed", steps=400, settings=(*SMALL, "optim.lr=4e-3", "optim.warmup=100")),
    Row(recipe="rnnsearch", steps=400, settings=(*SMALL, "optim.lr=4e-3", "optim.warmup=100")),
    Row(recipe="luong", steps=400, settings=(*SMALL, "optim.lr=4e-3", "optim.warmup=100")),
    Row(recipe="convs2s", steps=400, settings=(*SMALL, "optim.lr=3e-3", "optim.warmup=100")),
    Row(
        recipe="universal",
        steps=400,
        settings=(*SMALL, "network.feed_forward=512", "optim.lr=2e-3", "optim.warmup=100"),
    ),
    Row(recipe="summaries", task="summaries", steps=300),
    Row(recipe="topics", task="topics", steps=200),
    Row(
        recipe="phrasebook",
        steps=300,
        start="bart-tiny",
        start_steps=300,
        start_settings=(*READS, "batches.tokens=1024"),
    ),
    Row(
        recipe="phrasebook",
        steps=300,
        start="bert-tiny",
        start_steps=300,
        start_settings=(*READS, "batches.tokens=2048", "loss.next_sentence=false"),
    ),
)


class Workshop:
    """A folder with the texts and prepared sets of the tasks, where rows are made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def trmt(self, *words: str, stdin: bytes | None = None) -> bytes:
        """What a command writes; stops if it fails."""
        return self._run("-m", "trmt", *words, stdin=stdin)

    def _run(self, *words: str, stdin: bytes | None = None) -> bytes:
        here = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *words]
        return subprocess.run(
            command, cwd=self.folder, env=here, input=stdin, stdout=subprocess.PIPE, check=True
        ).stdout

    def prepared(self, task: str) -> tuple[str, str]:
        """The two languages of a task, which is prepared if it has not been."""
        languages = ("en", "de") if task == "phrasebook" else ("text", "answer")
        if (self.folder / "data" / task).exists():
            return languages
        words = [task] if task != "phrasebook" else []
        script = ROOT / "data" / ("beyond.py" if words else "phrasebook.py")
        self._run(str(script), *words, f"texts/{task}")
        learn = ("--train", f"texts/{task}/train", "--from", languages[0], "--to", languages[1])
        sizes = ("--size", "600", "--placeholder", "¶") if words else ("--size", "2400")
        self.trmt("tokenizer", f"data/pieces-{task}", *learn, *sizes)
        given = ("--train", f"texts/{task}/train", "--dev", f"texts/{task}/dev")
        rules = ("--max-ratio", "0") if words else ()
        self.trmt("prepare", f"data/{task}", *given, "--tokenizer", f"data/pieces-{task}", *rules)
        return languages

    def documents(self) -> str:
        """The phrasebook's English as documents, ten sentences that are alike in each."""
        self.prepared("phrasebook")
        place = "data/documents"
        if (self.folder / place).exists():
            return place
        for name in ("train", "dev"):
            text = (self.folder / f"texts/phrasebook/{name}.en").read_text("utf-8")
            lines = sorted({*text.splitlines()})
            parts = ("\n".join(lines[at : at + 10]) for at in range(0, len(lines), 10))
            (self.folder / f"{name}.txt").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        given = ("--documents", "train.txt", "--dev", "dev.txt", "--tokenizer", "data/pieces-phrasebook")
        self.trmt("prepare", place, *given)
        return place

    def run(self, row: Row) -> dict:
        """Train, translate the test set and score it."""
        self.prepared(row.task)
        model = f"models/{row.name.replace(' ', '-')}"
        begin: tuple[str, ...] = ()
        figures: dict = {}
        if row.start:
            first = f"{model}-start"
            figures["start"] = self.train(
                "pretrain", first, self.documents(), row.start, row.start_steps, row.start_settings
            )
            begin = ("--init-from", first if row.start.startswith("bart") else f"{first}:encoder")
        figures |= self.train(
            "train", model, f"data/{row.task}", row.recipe, row.steps, row.settings, begin=begin
        )
        now = provenance()
        return figures | self.scored(model, row.task) | {key: now[key] for key in ("commit", "cpu")}

    def scored(self, model: str, task: str) -> dict:
        """The scores of a model's translations of the test set."""
        source, target = self.prepared(task)
        texts = f"texts/{task}/test"
        translated = self.trmt("translate", model, stdin=(self.folder / f"{texts}.{source}").read_bytes())
        wanted = ("--ref", f"{texts}.{target}", "--metric", "bleu", "--metric", "chrf", "--json")
        scores = json.loads(self.trmt("score", *wanted, stdin=translated))["systems"][0]["scores"]
        answers = (self.folder / f"{texts}.{target}").read_bytes().splitlines()
        same = sum(one == other for one, other in zip(translated.splitlines(), answers, strict=True))
        return {"scores": scores, "exact": same, "sentences": len(answers)}

    def train(
        self,
        command: str,
        model: str,
        data: str,
        recipe: str,
        steps: int,
        settings: tuple[str, ...],
        *,
        begin: tuple[str, ...] = (),
    ) -> dict:
        """Train a run; `command` is train or pretrain, `begin` more of its options."""
        settings = (f"training.steps={steps}", f"validation.every={steps // 2}", *settings)
        changes = [word for setting in settings for word in ("--set", setting)]
        self.trmt(command, model, "--data", data, "--recipe", recipe, *changes, *begin)
        log = (self.folder / model / "log.jsonl").read_text("utf-8").splitlines()
        events = [json.loads(line) for line in log]
        looks = [event for event in events if event["event"] == "validate"]
        losses = [score["value"] for score in looks[-1]["scores"] if score["metric"] == "loss"]
        return {
            "parameters": events[0]["parameters"],
            "steps": steps,
            "seconds": round(events[-1]["seconds"], 1),
            "dev_loss": round(losses[0], 4),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Train every recipe for a few minutes and score it.")
    parser.add_argument("--only", action="append", default=[], choices=[row.name for row in ROWS])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    path = given.out / f"{RESULT}.json"
    done = json.loads(path.read_bytes())["figures"]["rows"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(Path(folder))
        for row in ROWS:
            known = done.get(row.name, {}).get("plan") == row.plan
            if known if not given.only else row.name not in given.only:
                continue
            done[row.name] = {"plan": row.plan, **shop.run(row)}
            rows = {each.name: done[each.name] for each in ROWS if each.name in done}
            command = "OMP_NUM_THREADS=1 python bench/recipes.py"
            print(record(RESULT, {"rows": rows}, command=command, folder=given.out), row.name)


if __name__ == "__main__":
    main()
