"""Comparison of runs: settings that differ, progress, scores, and whether scores differ significantly.

The best scores of a run are those of its own validations, from its log. For significance tests by the paired
bootstrap, the same sentences are translated with all runs. Runs whose dev set is not that of the first run
are left out of the comparison on the dev set, with a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trmt import console, scoring
from trmt.bundles import bundles, checkpoints
from trmt.config import Options
from trmt.errors import ConfigError, DataError, TrmtError
from trmt.insight.plotting import read_runs
from trmt.scoring import MetricScore, ScoreOptions, bleu_tokenizer
from trmt.text.corpus import parse_corpus
from trmt.text.pairs import read_corpus
from trmt.training import describing
from trmt.training.history import History
from trmt.translating import TranslateOptions, Translator

ABSENT = "-"  # instead of a setting that a run does not have
RunScores = dict[str, dict[str, MetricScore]]  # run -> metric -> score


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options):
    """The options of `trmt compare`."""

    runs: tuple[Path, ...]
    test: str | None = None  # a corpus to translate with every run
    metrics: tuple[str, ...] = ("bleu", "chrf")
    beam: int = 4
    resamples: int = 1000
    log_only: bool = False  # translate nothing
    device: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.runs) < 2:
            raise ConfigError("a comparison needs two runs or more; use trmt inspect for a single run")
        if self.log_only and self.test:
            raise ConfigError("--test and --log-only exclude each other; leave one out")


@dataclass(frozen=True)
class RunFacts:
    """What the folder of a run contains."""

    folder: Path
    settings: dict[str, Any]
    data: dict[str, Any]
    progress: dict[str, Any]
    best: list[dict[str, Any]]  # the best score of each metric in the log
    bundle: Path | None  # the average or best checkpoint
    parameters: int | None
    languages: tuple[str, str]


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison, by the names of the runs; the first run is the baseline."""

    runs: dict[str, RunFacts]
    histories: dict[str, History]
    differences: dict[str, list[Any]]  # setting -> its value in each run
    dev: RunScores = field(default_factory=dict)  # of the runs with the dev set of the first run
    left_out: dict[str, str] = field(default_factory=dict)  # why a run is not in `dev`
    test: RunScores = field(default_factory=dict)


def compare(options: CompareOptions) -> Comparison:
    """Read the runs and, without `log_only`, translate the dev set and the test set with each."""
    named = (path if path.is_file() else checkpoints.find_folder(path) for path in options.runs)
    options = replace(options, runs=tuple(named))
    histories = read_runs(options.runs)
    folders = [path.parent if path.is_file() else path for path in options.runs]
    runs = {
        name: run_facts(folder, history)
        for (name, history), folder in zip(histories.items(), folders, strict=True)
    }
    found = Comparison(runs, histories, differences([run.settings for run in runs.values()]))
    if options.log_only:
        return found
    options = replace(options, metrics=tuple(dict.fromkeys(options.metrics)))
    shared, left_out = comparable(runs)
    for name, why in left_out.items():
        console.warn(f"{name} is not compared on the dev set: {why}")
    dev = {}
    if shared:
        sources, references = _dev_text(next(iter(shared.values())))
        dev = _translate_and_score(shared, sources, references, options)
    test = {}
    if options.test:
        with_bundle = {name: run for name, run in runs.items() if run.bundle}
        test = _translate_and_score(
            with_bundle, *_test_text(options.test, next(iter(runs.values()))), options
        )
    return replace(found, dev=dev, left_out=left_out, test=test)


def run_facts(folder: Path, history: History) -> RunFacts:
    """Read the folder of a run."""
    if not describing.is_run(folder):
        raise DataError(
            f"{folder} is not a run folder: it has no {checkpoints.CONFIG}; name runs of trmt train"
        )
    bundle, parameters = None, None
    languages: tuple[str, str] = ("", "")
    if checkpoints.list_checkpoints(folder) or bundles.is_bundle(folder / checkpoints.AVERAGE):
        bundle = checkpoints.find_bundle(folder)
        manifest = bundles.read_manifest(bundle)
        languages = manifest.languages
        weights = bundles.read_weights(bundle, manifest, verify=False)
        parameters = sum(describing.parameter_counts(weights, manifest).values())
    return RunFacts(
        folder=folder,
        settings=describing.settings(folder),
        data=describing.data(folder),
        progress=describing.progress(history),
        best=describing.best_scores(history),
        bundle=bundle,
        parameters=parameters,
        languages=languages,
    )


def differences(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, with their value in each."""
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [each.get(name, ABSENT) for each in settings] for name in names if name != "description"}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def comparable(runs: Mapping[str, RunFacts]) -> tuple[dict[str, RunFacts], dict[str, str]]:
    """The runs with the dev set of the first run, and why the others are left out."""
    shared: dict[str, RunFacts] = {}
    left_out: dict[str, str] = {}
    (base_name, base), *_ = runs.items()
    for name, run in runs.items():
        if why := _not_translatable(run):
            left_out[name] = why
        elif run.data["dev_text"] != base.data.get("dev_text") or run.languages != base.languages:
            left_out[name] = f"its dev set is not that of {base_name}"
        else:
            shared[name] = run
    if base_name in left_out:
        left_out |= dict.fromkeys(shared, f"the first run, {base_name}, is not compared either")
        return {}, left_out
    return shared, left_out


def _not_translatable(run: RunFacts) -> str:
    """Why the dev set of a run cannot be translated; empty if it can."""
    if run.bundle is None:
        return "it has no checkpoint yet"
    if not run.data.get("dev_text"):
        return "its folder does not record its dev set"
    return ""


def _dev_text(run: RunFacts) -> tuple[list[str], list[str]]:
    """The dev set of a run; an error if it has changed since the run was started."""
    try:
        data = describing.dev_set(run.folder)
        if data is None:
            raise DataError(f"{run.folder} has no dev set")
        return data.dev_text()
    except TrmtError as error:
        raise DataError(f"{error}; restore it, or translate nothing with --log-only") from error


def _test_text(corpus: str, run: RunFacts) -> tuple[list[str], list[str]]:
    """The sources and references of a corpus."""
    both = list(read_corpus(parse_corpus(corpus, *run.languages)))
    if not both:
        raise DataError(f"{corpus} is empty; there is nothing to translate")
    return [source for source, _ in both], [target for _, target in both]


def _translate_and_score(
    runs: Mapping[str, RunFacts], sources: list[str], references: list[str], options: CompareOptions
) -> RunScores:
    """The scores of each run, with significance tests against the first."""
    translations = {name: _translate(name, run, sources, options) for name, run in runs.items()}
    language = next(iter(runs.values())).languages[1]
    score_options = ScoreOptions(
        metrics=options.metrics, tokenize=bleu_tokenizer(language), resamples=options.resamples
    )
    if len(translations) > 1:
        return scoring.compare(translations, [references], options=score_options)
    return {
        name: scoring.score(texts, [references], options=score_options)
        for name, texts in translations.items()
    }


def _translate(name: str, run: RunFacts, sources: list[str], options: CompareOptions) -> list[str]:
    search = TranslateOptions(
        search="beam" if options.beam > 1 else "greedy", beam=max(options.beam, 1), device=options.device
    )
    translator = Translator.load(run.bundle, options=search)
    texts = [""] * len(sources)
    with console.progress(f"translating with {name}", len(sources)) as progress:
        for number, translation in translator.ready(sources):
            texts[number] = translation.text
            progress.advance()
    return texts


def as_tree(found: Comparison, options: CompareOptions) -> dict[str, Any]:
    """The comparison as a tree for JSON."""
    from dataclasses import asdict

    def scores(table: RunScores) -> dict[str, Any]:
        return {
            run: {
                metric: {key: value for key, value in asdict(score).items() if value is not None}
                for metric, score in row.items()
            }
            for run, row in table.items()
        }

    return {
        "runs": {
            name: {
                "folder": str(run.folder),
                "bundle": str(run.bundle) if run.bundle else None,
                "languages": list(run.languages),
                "data": run.data,
                "parameters": run.parameters,
                **run.progress,
                "best": run.best,
            }
            for name, run in found.runs.items()
        },
        "differences": {
            setting: dict(zip(found.runs, values, strict=True))
            for setting, values in found.differences.items()
        },
        "dev": scores(found.dev),
        "dev_left_out": found.left_out,
        "test": {"corpus": options.test, "scores": scores(found.test)} if options.test else None,
        "search": {"beam": options.beam},
        "paired_bootstrap": {"resamples": options.resamples, "baseline": next(iter(found.runs))},
    }
