"""BLEU, chrF and TER with significance tests, by sacreBLEU and equal to its own scores to the last digit.

sacreBLEU does all the counting and the statistics. This file chooses the settings, checks the input, and
attaches sacreBLEU's signature to every score.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from trmt import console
from trmt.config import Options, check_strings, check_type, refuse_string
from trmt.errors import ConfigError, DataError
from trmt.registry import suggestion
from trmt.text.lines import read_lines

if TYPE_CHECKING:
    from pathlib import Path

Sentences = Sequence[str]

DEFAULT_TOKENIZER = "13a"
LANGUAGE_TOKENIZERS = {"zh": "zh", "ja": "ja-mecab", "ko": "ko-mecab"}  # sacreBLEU's choice
SIGNIFICANCE_LEVEL = 0.05


@dataclass(frozen=True)
class ScoreOptions(Options):
    """How to score; the defaults are sacreBLEU's."""

    metrics: Sequence[str] = ("bleu", "chrf", "ter")  # names in METRICS
    tokenize: str = DEFAULT_TOKENIZER  # sacreBLEU's tokenizer for BLEU; chrF and TER have one of their own
    lowercase: bool = False  # ignore case in BLEU and chrF; TER always does
    resamples: int = 0  # of the bootstrap, or trials of the test; 0: no intervals, tests with the default
    paired: Literal["bs", "ar"] = "bs"  # the test: paired bootstrap or approximate randomization
    seed: int = 12345  # of the resamples

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.metrics:
            raise ConfigError("there is no metric to score with; name at least one")
        for name in self.metrics:
            if name not in METRICS:
                raise ConfigError(f"there is no metric {name!r}; {suggestion(name, list(METRICS))}")
        if self.paired not in ("bs", "ar"):
            raise ConfigError(f"the paired test is bs or ar, not {self.paired!r}")
        if self.resamples < 0 or self.resamples == 1:
            raise ConfigError(f"{self.resamples} resamples are too few; use 0 for none, or about 1000")
        if self.seed < 1:  # for sacreBLEU, 0 means a random seed
            raise ConfigError(f"the seed must be 1 or more, not {self.seed}")


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval from bootstrap resamples: `mean` plus or minus `half_width`."""

    mean: float
    half_width: float


@dataclass(frozen=True)
class MetricScore:
    """One score of one system, with sacreBLEU's signature."""

    name: str  # as sacreBLEU writes it: BLEU, chrF2, TER
    value: float
    signature: str  # settings and versions that the score depends on
    interval: Interval | None = None
    p_value: float | None = None  # of the test for a difference from the baseline; None for the baseline

    @property
    def significant(self) -> bool:
        """Whether the difference from the baseline is significant."""
        return self.p_value is not None and self.p_value < SIGNIFICANCE_LEVEL


def score(
    hypotheses: Sentences, references: Sequence[Sentences], *, options: ScoreOptions | None = None
) -> dict[str, MetricScore]:
    """The scores of one system by metric; `references` holds one or more whole reference translations."""
    options = options or ScoreOptions()
    _check_sentences(hypotheses, references)
    check_aligned({"the hypotheses": hypotheses}, _numbered(references))
    scores = {}
    with _seeded(options.seed):
        for name in options.metrics:
            metric = METRICS[name](options)
            found = metric.corpus_score(hypotheses, references, n_bootstrap=max(options.resamples, 1))
            # float(): resampled numbers are numpy's, which JSON does not accept
            interval = Interval(float(found._mean), float(found._ci)) if options.resamples else None
            scores[name] = MetricScore(found.name, float(found.score), str(metric.get_signature()), interval)
    return scores


def compare(
    systems: Mapping[str, Sentences],
    references: Sequence[Sentences],
    *,
    options: ScoreOptions | None = None,
) -> dict[str, dict[str, MetricScore]]:
    """The scores of two or more systems, by system and metric; the first system is the baseline."""
    from sacrebleu.significance import PairedTest, Result

    options = options or ScoreOptions()
    if len(systems) < 2:
        raise ConfigError("a comparison needs two systems or more; use score for a single one")
    check_aligned(systems, _numbered(references))
    metrics = {name: METRICS[name](options) for name in options.metrics}
    with _seeded(options.seed):
        test = PairedTest(
            list(systems.items()),
            metrics,
            references,
            test_type=options.paired,
            n_samples=options.resamples,
            n_ar_confidence=0 if options.paired == "ar" else -1,  # 0: sacreBLEU's default number of resamples
        )
        signatures, results = test()
    compared: dict[str, dict[str, MetricScore]] = {system: {} for system in systems}
    for name, (shown, signature) in zip(metrics, signatures.items(), strict=True):
        for system, result in zip(systems, results[shown], strict=True):
            assert isinstance(result, Result) and result.mean is not None and result.ci is not None
            interval = Interval(float(result.mean), float(result.ci))
            found = MetricScore(shown, float(result.score), str(signature), interval, result.p_value)
            compared[system][name] = found
    return compared


# Metrics


def _bleu(options: ScoreOptions) -> Any:
    from sacrebleu.metrics.bleu import BLEU

    if options.tokenize not in BLEU.TOKENIZERS:
        known = suggestion(options.tokenize, list(BLEU.TOKENIZERS))
        raise ConfigError(f"sacreBLEU has no tokenizer {options.tokenize!r}; {known}")
    try:
        return BLEU(tokenize=options.tokenize, lowercase=options.lowercase)
    except (RuntimeError, ImportError, OSError) as error:  # a package or a download is missing
        why = " ".join(str(error).split())
        raise ConfigError(f"sacreBLEU's tokenizer {options.tokenize!r} cannot be used: {why}") from error


def _chrf(options: ScoreOptions, *, word_order: int = 0) -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF(lowercase=options.lowercase, word_order=word_order)


def _chrf_with_words(options: ScoreOptions) -> Any:
    return _chrf(options, word_order=2)


def _ter(options: ScoreOptions) -> Any:
    from sacrebleu.metrics.ter import TER

    return TER()


# By the name on the command line; each returns a `sacrebleu.metrics.base.Metric`.
METRICS: Mapping[str, Callable[[ScoreOptions], Any]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "chrf++": _chrf_with_words,
    "ter": _ter,
}


@cache  # so that there is one warning of a missing package, not one at every validation
def bleu_tokenizer(language: str) -> str:
    """sacreBLEU's tokenizer for a target language; `char` where its package is missing."""
    code = language.lower().replace("_", "-").partition("-")[0]
    name = LANGUAGE_TOKENIZERS.get(code, DEFAULT_TOKENIZER)
    try:
        _bleu(ScoreOptions(tokenize=name))
    except ConfigError:
        console.warn(
            f"BLEU is computed on characters, because the tokenizer for {code} is missing: install it with "
            f"pip install 'sacrebleu[{code}]'; scores on characters and on words are not comparable"
        )
        return "char"
    return name


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Set the seed of the resamples, which sacreBLEU reads only from the environment."""
    before = os.environ.get("SACREBLEU_SEED")
    os.environ["SACREBLEU_SEED"] = str(seed)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SACREBLEU_SEED"]
        else:
            os.environ["SACREBLEU_SEED"] = before


# Input


def _check_sentences(hypotheses: Sentences, references: Sequence[Sentences]) -> None:
    """Refuse what only looks like lists of sentences: a string is a list of letters."""
    check_strings(hypotheses, "hypotheses")
    refuse_string(references, "references")
    check_type(references, Sequence, "references")
    if any(isinstance(each, str) for each in references):
        raise ConfigError(
            "references is a list of whole reference translations, each a list of sentences; with one "
            "reference write [references]"
        )
    for number, reference in enumerate(references):
        check_strings(reference, f"references[{number}]")


def read_sentences(path: str | Path) -> list[str]:
    """The lines of a file, or of standard input for `-`, without trailing white space, as in sacreBLEU."""
    return [line.rstrip() for line in read_lines(path)]


def check_aligned(systems: Mapping[str, Sentences], references: Mapping[str, Sentences]) -> None:
    """Raise an error unless each system has as many lines as each reference, and at least one."""
    if not references:
        raise ConfigError("there is no reference to score against; give one or more")
    for reference, expected in references.items():
        for system, sentences in systems.items():
            if len(sentences) != len(expected):
                raise DataError(
                    f"{system} has {len(sentences)} lines but {reference} has {len(expected)}; "
                    "each line must be the translation of the same line"
                )
            if not sentences:
                raise DataError(f"{system} and {reference} are empty; there is nothing to score")


def _numbered(references: Sequence[Sentences]) -> dict[str, Sentences]:
    return {f"reference {number}": sentences for number, sentences in enumerate(references, 1)}
