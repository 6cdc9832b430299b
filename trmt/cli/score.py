"""`trmt score`: score translations and compare systems."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from trmt import console
from trmt.cli import completion
from trmt.cli.common import format_table, print_report
from trmt.errors import ConfigError

if TYPE_CHECKING:
    from trmt.scoring import MetricScore, ScoreOptions

    SystemScores = dict[str, dict[str, MetricScore]]

STDIN = "-"


class PairedTest(StrEnum):
    """The paired significance tests of sacreBLEU: bootstrap and approximate randomization."""

    bs = "bs"
    ar = "ar"


def command(
    systems: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE",
            help="Translations to score, a file for each system, the baseline first; - is stdin.",
        ),
    ] = None,
    ref: Annotated[
        list[str] | None,
        typer.Option("--ref", "-r", metavar="FILE", help="File of reference translations; repeatable."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            "-m",
            metavar="NAME",
            help="bleu, chrf, chrf++ or ter; repeatable. [default: bleu chrf ter]",
            autocompletion=completion.metrics,
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="LANGUAGE", help="Target language; selects the BLEU tokenizer of zh, ja and ko."
        ),
    ] = None,
    tokenize: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="sacreBLEU's tokenizer for BLEU. [default: by --to, else 13a]"),
    ] = None,
    lowercase: Annotated[bool, typer.Option(help="Ignore case in BLEU and chrF; TER always does.")] = False,
    paired: Annotated[
        PairedTest,
        typer.Option(
            help="Test of several systems: paired bootstrap (bs) or approximate randomization (ar)."
        ),
    ] = PairedTest.bs,
    resamples: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Bootstrap resamples, or trials of ar. [default: 1,000 (ar: 10,000); one system: none]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=1, help="Seed of the resamples.")] = 12345,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with all digits.")] = False,
) -> None:
    """Score translations with sacreBLEU. Several systems are compared with a paired significance test."""
    from trmt.scoring import ScoreOptions, bleu_tokenizer, compare, score

    names = systems or [STDIN]
    references = ref or []
    _check_names(names, references)
    options = ScoreOptions(
        metrics=tuple(dict.fromkeys(metric or ("bleu", "chrf", "ter"))),
        tokenize=tokenize or bleu_tokenizer(to or ""),
        lowercase=lowercase,
        resamples=resamples or 0,
        paired=paired.value,
        seed=seed,
    )
    texts, reference_texts = _read(names, references)
    if len(texts) == 1 or resamples == 0:
        scores = {name: score(text, reference_texts, options=options) for name, text in texts.items()}
    else:
        scores = compare(texts, reference_texts, options=options)
    print_report(_as_json(scores, references) if as_json else _as_text(scores))
    _explain(scores, options)


def _check_names(systems: list[str], references: list[str]) -> None:
    if not references:
        raise ConfigError("there are no references to score against; name a file with --ref FILE")
    if len(set(systems)) < len(systems):
        raise ConfigError("a system is given twice; name each file once")
    if (systems + references).count(STDIN) > 1:
        raise ConfigError("standard input can be read only once; name files for the rest")


def _read(systems: list[str], references: list[str]) -> tuple[dict[str, list[str]], list[list[str]]]:
    import sys

    from trmt.scoring import check_aligned, read_sentences

    if STDIN in systems and sys.stdin.isatty():
        console.say("reading translations from standard input, up to Ctrl-D")
    expected = {name: read_sentences(name) for name in dict.fromkeys(references)}
    texts = {name: read_sentences(name) for name in systems}
    shown = {"standard input" if name == STDIN else name: text for name, text in texts.items()}
    check_aligned(
        shown, {"standard input" if name == STDIN else name: text for name, text in expected.items()}
    )
    return texts, [expected[name] for name in references]


def _as_json(scores: SystemScores, references: list[str]) -> str:
    import json
    from dataclasses import asdict

    systems = [
        {
            "system": system,
            "scores": {
                metric: {key: value for key, value in asdict(found).items() if value is not None}
                for metric, found in row.items()
            },
        }
        for system, row in scores.items()
    ]
    return json.dumps({"references": references, "systems": systems}, indent=2, ensure_ascii=False)


def _as_text(scores: SystemScores) -> str:
    """A row for each metric if there is one system, else a row for each system."""
    if len(scores) > 1:
        return format_systems("system", scores)
    [row] = scores.values()
    return format_table([[found.name, format_score(found), found.signature] for found in row.values()])


def format_systems(heading: str, scores: SystemScores) -> str:
    """A table with a row for each system and a column for each metric, and the signatures of the metrics."""
    first = next(iter(scores.values()))
    rows = [[heading, *(found.name for found in first.values())]]
    rows += [[system, *map(format_score, row.values())] for system, row in scores.items()]
    signatures = [[found.name, found.signature] for found in first.values()]
    return f"{format_table(rows)}\n\n{format_table(signatures)}"


def format_score(found: MetricScore) -> str:
    """A score with its interval and p-value, if it has them."""
    text = f"{found.value:.2f}"
    if found.interval is not None:
        text += f" ({found.interval.mean:.2f} ± {found.interval.half_width:.2f})"
    if found.p_value is not None:
        text += f" p = {found.p_value:.4f}" + ("*" if found.significant else "")
    return text


def _explain(scores: SystemScores, options: ScoreOptions) -> None:
    all_scores = [found for row in scores.values() for found in row.values()]
    if any(found.interval for found in all_scores):
        console.say("in brackets: mean and 95% interval of the resamples")
    if any(found.p_value is not None for found in all_scores):
        test = {"bs": "paired bootstrap", "ar": "approximate randomization"}[options.paired]
        console.say(f"p: {test} against {next(iter(scores))}; * differs at p < 0.05")
