"""Runs side by side: what they share, what they differ in, how far they came, and which is better.

Scores from the log are those of each run's own validations. Whether one run is better than another is told
from translations of the same sentences made here, by the paired bootstrap; runs with other dev sets than the
first are left out of that, and it is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trmt import console, scoring
from trmt.bundles import bundles, checkpoints
from trmt.errors import ConfigError, DataError, TrmtError
from trmt.insight.plotting import read_runs
from trmt.scoring import MetricScore, ScoreOptions, bleu_tokenizer
from trmt.sets.shards import PreparedSet
from trmt.text.corpus import pairs, parse_corpus
from trmt.training import describing
from trmt.training.history import History
from trmt.translating import TranslateOptions, Translator

ABSENT = "-"  # a setting that a run's network or objective does not have
Scores = dict[str, dict[str, MetricScore]]


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What `trmt compare` takes."""

    runs: tuple[Path, ...]
    test: str | None = None  # a corpus to translate with every run
    metrics: tuple[str, ...] = ("bleu", "chrf")
    beam: int = 4
    resamples: int = 1000
    log_only: bool = False  # nothing is translated
    device: str = "auto"

    def __post_init__(self) -> None:
        if len(self.runs) < 2:
            raise ConfigError("a comparison takes two runs or more; use trmt inspect for a single one")
        if self.log_only and self.test:
            raise ConfigError("--test translates and --log-only does not; leave one out")


@dataclass(frozen=True)
class RunFacts:
    """One run as its folder tells it."""

    folder: Path
    settings: dict[str, Any]
    data: dict[str, Any]
    progress: dict[str, Any]
    best: list[dict[str, Any]]  # of each metric, from its own validations
    bundle: Path | None  # what translates for it
    parameters: int | None
    languages: tuple[str, str]


@dataclass(frozen=True)
class Comparison:
    """What was found; by the names of the runs, the first of which is the baseline."""

    runs: dict[str, RunFacts]
    histories: dict[str, History]
    differences: dict[str, list[Any]]  # by setting, a value for each run
    dev: Scores = field(default_factory=dict)  # of the runs that share the first one's dev set
    left_out: dict[str, str] = field(default_factory=dict)  # why a run is not in `dev`
    test: Scores = field(default_factory=dict)


def compare(options: CompareOptions) -> Comparison:
    """Read the runs and, unless only logs are wanted, translate the dev set with each."""
    histories = read_runs(options.runs)
    folders = [place.parent if place.is_file() else place for place in options.runs]
    runs = {
        name: facts(folder, history)
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
        dev = _scored(shared, sources, references, options)
    test = {}
    if options.test:
        able = {name: run for name, run in runs.items() if run.bundle}
        test = _scored(able, *_test_text(options.test, next(iter(runs.values()))), options)
    return replace(found, dev=dev, left_out=left_out, test=test)


def facts(folder: Path, history: History) -> RunFacts:
    """What the folder of a run says."""
    if not describing.is_run(folder):
        raise DataError(f"{folder} is no run folder: it has no {checkpoints.CONFIG}; name runs of trmt train")
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
    """The settings that are not the same in all runs, each with a value for every run."""
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [each.get(name, ABSENT) for each in settings] for name in names if name != "description"}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def comparable(runs: Mapping[str, RunFacts]) -> tuple[dict[str, RunFacts], dict[str, str]]:
    """The runs that can translate the first one's dev set, and why the others are left out."""
    shared: dict[str, RunFacts] = {}
    left_out: dict[str, str] = {}
    (base_name, base), *_ = runs.items()
    for name, run in runs.items():
        if why := _hindrance(run):
            left_out[name] = why
        elif run.data["dev_text"] != base.data.get("dev_text") or run.languages != base.languages:
            left_out[name] = f"its dev set is another than that of {base_name}"
        else:
            shared[name] = run
    if base_name in left_out:
        left_out |= dict.fromkeys(shared, f"{base_name}, the first run, is not either")
        return {}, left_out
    return shared, left_out


def _hindrance(run: RunFacts) -> str:
    """Why nothing can be translated for a run, if so."""
    if run.bundle is None:
        return "it has no checkpoint yet"
    if not run.data.get("dev_text"):
        return "its folder does not say what its dev set was"
    return ""


def _dev_text(run: RunFacts) -> tuple[list[str], list[str]]:
    """The dev set's text, as it was when the run was begun."""
    place = Path(run.data["set"])
    try:
        data = PreparedSet.open(place)
        texts = data.dev_text()
    except TrmtError as error:
        raise DataError(
            f"the dev set of {run.folder} cannot be read ({error}); put {place} back, or leave "
            "translating out with --log-only"
        ) from error
    now = [data.index["files"][f"dev.{side}.txt"]["sha256"] for side in ("source", "target")]
    if "".join(now) != run.data["dev_text"]:
        raise DataError(
            f"{place} has another dev set than when {run.folder} was begun; put it back, or leave "
            "translating out with --log-only"
        )
    return texts


def _test_text(corpus: str, run: RunFacts) -> tuple[list[str], list[str]]:
    """Source and reference of the sentences of a corpus."""
    both = list(pairs(parse_corpus(corpus, *run.languages)))
    if not both:
        raise DataError(f"{corpus} is empty; there is nothing to translate")
    return [source for source, _ in both], [target for _, target in both]


def _scored(
    runs: Mapping[str, RunFacts], sources: list[str], references: list[str], options: CompareOptions
) -> Scores:
    """The scores of translations by each run, and whether they differ from those of the first."""
    translations = {name: _translated(name, run, sources, options) for name, run in runs.items()}
    language = next(iter(runs.values())).languages[1]
    how = ScoreOptions(
        metrics=options.metrics, tokenize=bleu_tokenizer(language), resamples=options.resamples
    )
    if len(translations) > 1:
        return scoring.compare(translations, [references], options=how)
    return {name: scoring.score(texts, [references], options=how) for name, texts in translations.items()}


def _translated(name: str, run: RunFacts, sources: list[str], options: CompareOptions) -> list[str]:
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
    """Everything, for programs."""
    from dataclasses import asdict

    def scores(table: Scores) -> dict[str, Any]:
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
