"""One experiment: from the texts of a corpus to scores, by trmt's commands, in stages that can be stopped.

Every stage leaves its result in the work folder, whole or not at all, and is not repeated. So a run that
does not fit into one call of so many minutes goes on in the next, training from its newest checkpoint.
Which average of checkpoints is scored on the tests is chosen on the dev set.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from budget import AGAIN, Budget, Ledger, OutOfTime, seconds
from provenance import RESULTS, ROOT, record

TRMT = [sys.executable, "-m", "trmt"]
RESULT = "result.json"  # of a seed, in its folder
Scores = dict[str, Any]  # {form of scoring: {metric: {name, value, signature}}}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A corpus, what is done to its text, a recipe, and how to translate and score."""

    name: str
    recipe: str
    languages: tuple[str, str]
    dev: str  # the name of its files, without language and .gz
    tests: tuple[str, ...]
    tokenizer: tuple[str, ...]  # options of `trmt tokenizer`
    prepare: tuple[str, ...] = ()
    moses: bool = False  # whether the network reads and writes lowercased words as Moses cuts them
    search: tuple[str, ...] = ("--beam", "4", "--length-penalty", "0.6")
    averages: tuple[tuple[str, int], ...] = (("best", 5), ("last", 10))
    forms: tuple[str, ...] = ("detokenised",)  # the ways to score; the dev set chooses by BLEU in the first


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how an experiment is run."""

    texts: Path  # the folder of the corpus
    work: Path  # what is made on the way
    budget: Budget
    device: str = "auto"
    threads: int = 0
    settings: tuple[str, ...] = ()  # changes of the recipe

    @property
    def here(self) -> list[str]:
        return ["--device", self.device] + (["--threads", str(self.threads)] if self.threads else [])


def main(description: str, experiments: Sequence[Experiment], *, seeds: int) -> None:
    """The command line that all experiments share; its exit status says whether there is more to do."""
    given = arguments(description, [experiment.name for experiment in experiments], seeds)
    experiment = next(one for one in experiments if one.name == given.experiment)
    name = given.name or experiment.name
    where = Setting(
        texts=given.folder.resolve(),
        work=(given.work or ROOT / "models" / f"bench-{name}").resolve(),
        budget=Budget(seconds(given.budget)),
        device=given.device,
        threads=given.threads,
        settings=tuple(given.set),
    )
    if given.keep:
        take_over(given.out / f"{name}.json", experiment, where)
    try:
        done = run(experiment, where, range(1, given.seeds + 1), at_once=given.at_once)
    except OutOfTime:
        print(f"{name}: nothing is complete yet; the same command goes on", file=sys.stderr)
        raise SystemExit(AGAIN) from None
    changed = "".join(f" --set {setting}" for setting in given.set)
    script = f"python bench/{Path(sys.argv[0]).name}"
    command = f"{script} FOLDER --experiment {experiment.name} --seeds {given.seeds}{changed}"
    shared = given.shared or given.at_once > 1
    figures = {**identity(experiment, where), "wanted": given.seeds, "shared": shared, "seeds": done}
    print(record(name, figures, command=command, folder=given.out))
    if len(done) < given.seeds:
        raise SystemExit(AGAIN)


def arguments(description: str, names: list[str], seeds: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help="where the corpus is")
    parser.add_argument("--experiment", choices=names, default=names[0])
    parser.add_argument("--seeds", type=int, default=seeds, help="so many runs, of seeds 1, 2, ...")
    parser.add_argument("--at-once", type=int, default=1, help="so many of them beside one another")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each run; 0 takes all")
    parser.add_argument("--budget", default="24h", help="stop in good time before this has passed: 9m, 540s")
    parser.add_argument("--work", type=Path, help="what is made on the way [default: in models/]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result")
    parser.add_argument("--shared", action="store_true", help="note that others use the device meanwhile")
    parser.add_argument("--keep", action="store_true", help="seeds that a result in --out has are done")
    parser.add_argument("--set", action="append", default=[], help="change the recipe; needs --name")
    parser.add_argument("--name", help="of the result [default: the experiment's]")
    given = parser.parse_args()
    if given.set and not given.name:
        parser.error("a changed recipe is another experiment: give its result a --name")
    return given


def identity(experiment: Experiment, where: Setting) -> dict[str, Any]:
    """What must be equal for two results to be of one experiment, as JSON has it."""
    from trmt.config import to_tree
    from trmt.training.recipe import load_recipe

    recipe = to_tree(load_recipe(experiment.recipe, list(where.settings)))
    return json.loads(json.dumps({"experiment": asdict(experiment), "recipe": recipe}))


def take_over(path: Path, experiment: Experiment, where: Setting) -> None:
    """The seeds that are complete in an earlier result, where their checkpoints are long gone."""
    figures = json.loads(path.read_bytes())["figures"] if path.exists() else {"seeds": []}
    expected = identity(experiment, where)
    if any(figures.get(key) != value for key, value in expected.items()):
        return
    for result in figures["seeds"]:
        finished = where.work / f"seed-{result['seed']}" / RESULT
        if not finished.exists():
            finished.parent.mkdir(parents=True, exist_ok=True)
            write_lines(finished, [json.dumps(result, indent=2, ensure_ascii=False)])


def run(experiment: Experiment, where: Setting, seeds: Sequence[int], *, at_once: int) -> list[Scores]:
    """The results of those seeds that are complete; raises OutOfTime when not even one is."""
    prepare(experiment, where)

    def attempt(seed: int) -> Scores | None:
        try:
            return run_seed(experiment, where, seed)
        except OutOfTime:
            return None

    with ThreadPoolExecutor(max_workers=at_once) as threads:
        found = list(threads.map(attempt, seeds))
    done = [result for result in found if result is not None]
    if not done:
        raise OutOfTime
    return done


# --------------------------------------------------------------------------- text and data


def prepare(experiment: Experiment, where: Setting) -> None:
    """Texts, tokenizer and prepared set, which all seeds share."""
    where.work.mkdir(parents=True, exist_ok=True)
    names = ("train", experiment.dev, *experiment.tests)
    for name in names:
        for language in experiment.languages:
            write_text(experiment, where, name, language)
    source, target = experiment.languages
    text, log = where.work / "text", where.work / "prepare.log"
    train, dev = str(text / "train"), str(text / experiment.dev)
    if not (where.work / "tokenizer").exists():
        learn = ["tokenizer", "tokenizer", "--train", train, "--from", source, "--to", target]
        where.budget.run([*TRMT, *learn, *experiment.tokenizer], log=log, cwd=where.work)
    make = ["prepare", "data", "--tokenizer", "tokenizer", "--train", train, "--dev", dev]
    where.budget.run([*TRMT, *make, *experiment.prepare], log=log, cwd=where.work)


def write_text(experiment: Experiment, where: Setting, name: str, language: str) -> None:
    """The text that the network is to read or write."""
    path = where.work / "text" / f"{name}.{language}"
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    lines = raw(where.texts, name, language)
    if experiment.moses:
        from moses import tokenised

        lines = tokenised(lines, language)
    write_lines(path, lines)


def raw(folder: Path, name: str, language: str) -> list[str]:
    """The lines of a file of the corpus, plain or packed."""
    [path] = [path for path in folder.glob(f"{name}.{language}*") if path.suffix in (f".{language}", ".gz")]
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode().removesuffix("\n").split("\n")


def write_lines(path: Path, lines: Sequence[str]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes("".join(f"{line}\n" for line in lines).encode())
    partial.replace(path)


def read_lines(path: Path) -> list[str]:
    return path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")


# ----------------------------------------------------------------------------------- a seed


def run_seed(experiment: Experiment, where: Setting, seed: int) -> Scores:
    """Train, average, choose on the dev set, translate and score the tests."""
    place = where.work / f"seed-{seed}"
    place.mkdir(exist_ok=True)
    finished = place / RESULT
    if finished.exists():
        return json.loads(finished.read_bytes())
    ledger = Ledger(place / "seconds.tsv")
    log = place / "log.txt"

    def trmt(stage: str, *words: str, **options: Any) -> None:
        began = time.monotonic()
        try:
            where.budget.run([*TRMT, *words], log=log, cwd=where.work, **options)
        finally:
            ledger.add(stage, time.monotonic() - began)

    folder = f"seed-{seed}/run"
    train = ["train", folder, "--data", "data", "--recipe", experiment.recipe, *where.here]
    for setting in (f"training.seed={seed}", *where.settings):
        train += ["--set", setting]
    trmt("train", *train)
    choices = {}
    for kind, count in experiment.averages:
        name = f"{kind}-{count}"
        if not (place / name).exists():
            trmt("average", "average", folder, f"--{kind}", str(count), "--out", f"seed-{seed}/{name}")
        translations = translated(experiment, where, place / name, (experiment.dev,), trmt)
        choices[name] = scored(experiment, where, experiment.dev, translations[experiment.dev])
    first = experiment.forms[0]
    chosen = max(choices, key=lambda name: choices[name][first]["bleu"]["value"])
    translations = translated(experiment, where, place / chosen, experiment.tests, trmt)
    result = {
        "seed": seed,
        "chosen": chosen,
        "dev": {name: scores[first]["bleu"]["value"] for name, scores in choices.items()},
        "dev_scores": choices[chosen],
        "tests": {name: scored(experiment, where, name, lines) for name, lines in translations.items()},
        "training": training(place / "run" / "log.jsonl"),
        "seconds": ledger.totals(),
    }
    write_lines(finished, [json.dumps(result, indent=2, ensure_ascii=False)])
    return result


def translated(
    experiment: Experiment,
    where: Setting,
    bundle: Path,
    names: tuple[str, ...],
    trmt: Callable[..., None],
) -> dict[str, list[str]]:
    """The translations of these sets, by one process for all that are missing."""
    source, target = experiment.languages
    outs = {name: bundle.parent / f"{bundle.name}.{name}.{target}" for name in names}
    missing = [name for name in names if not outs[name].exists()]
    if missing:
        texts = {name: read_lines(where.work / "text" / f"{name}.{source}") for name in missing}
        asked, answered = (bundle.parent / f"{bundle.name}.{suffix}" for suffix in ("asked", "answered"))
        write_lines(asked, [line for lines in texts.values() for line in lines])
        command = ["translate", str(bundle.relative_to(where.work)), *experiment.search, *where.here]
        with asked.open("rb") as stdin, answered.open("wb") as stdout:
            trmt("translate", *command, "--batch", "256", stdin=stdin, stdout=stdout)
        answers = read_lines(answered)
        for name, lines in texts.items():
            write_lines(outs[name], answers[: len(lines)])
            answers = answers[len(lines) :]
        assert not answers, "there is one line for each line"
    return {name: read_lines(path) for name, path in outs.items()}


def training(log: Path) -> Scores:
    """What the run's own log says of it."""
    events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    by_kind = {kind: [event for event in events if event["event"] == kind] for kind in ("train", "validate")}
    begun = next(event for event in events if event["event"] == "begin")
    speeds = [event["tokens_per_second"] for event in by_kind["train"]]
    return {
        "steps": events[-1]["step"],
        "calls": sum(event["event"] in ("begin", "resume") for event in events),
        "seconds": next((event["seconds"] for event in reversed(events) if event["event"] == "end"), None),
        "validation_seconds": round(sum(event["seconds"] for event in by_kind["validate"]), 1),
        "tokens_per_second": round(statistics.median(speeds)) if speeds else None,
        "device": begun["device"],
        "precision": begun["precision"],
        "parameters": begun["parameters"],
        "threads": begun["threads"],
        "cores": os.cpu_count(),
    }


# ---------------------------------------------------------------------------------- scoring


def scored(experiment: Experiment, where: Setting, name: str, hypotheses: list[str]) -> Scores:
    """The scores of translations in every form of the experiment."""
    return {form: FORMS[form](experiment, where, name, hypotheses) for form in experiment.forms}


def _published(experiment: Experiment, where: Setting, name: str, hypotheses: list[str]) -> Scores:
    """Lowercased words as Moses cuts them, on both sides; sacreBLEU cuts nothing more."""
    from moses import tokenised

    target = experiment.languages[1]
    words = hypotheses if experiment.moses else tokenised(hypotheses, target)
    return _scores(words, [tokenised(raw(where.texts, name, target), target)], ("bleu",), tokenize="none")


def _detokenised(experiment: Experiment, where: Setting, name: str, hypotheses: list[str]) -> Scores:
    """Text as people read it, against the references as they are."""
    target = experiment.languages[1]
    if experiment.moses:
        from moses import detokenised

        hypotheses = detokenised(hypotheses, target)
    references = [raw(where.texts, name, target)]
    return _scores(hypotheses, references, ("bleu", "chrf", "ter"), lowercase=experiment.moses)


def _all_references(experiment: Experiment, where: Setting, name: str, hypotheses: list[str]) -> Scores:
    """The same against every known translation; lines with fewer repeat one, which changes no score."""
    lines = [line.split("\t") for line in raw(where.texts, f"{name}.allrefs", experiment.languages[1])]
    most = max(map(len, lines))
    references = [[line[min(number, len(line) - 1)] for line in lines] for number in range(most)]
    return _scores(hypotheses, references, ("bleu", "chrf"))


def _scores(
    hypotheses: list[str], references: list[list[str]], metrics: tuple[str, ...], **options: Any
) -> Scores:
    from trmt.scoring import ScoreOptions, score

    found = score(hypotheses, references, options=ScoreOptions(metrics=metrics, **options))
    return {
        metric: {"name": one.name, "value": one.value, "signature": one.signature}
        for metric, one in found.items()
    }


FORMS = {"published": _published, "detokenised": _detokenised, "all references": _all_references}
