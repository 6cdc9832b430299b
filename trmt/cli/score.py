"""`trmt score`: how good translations are, and whether one system is better than another."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from trmt import console
from trmt.errors import ConfigError

if TYPE_CHECKING:
    from trmt.scoring import MetricScore, ScoreOptions

    Table = dict[str, dict[str, MetricScore]]

STDIN = "-"


class Paired(StrEnum):
    """The paired significance tests of sacreBLEU."""

    bs = "bs"
    ar = "ar"


def command(
    systems: Annotated[
        list[str] | None,
        typer.Argument(help="Translations to score, one file per system, the baseline first; - is stdin."),
    ] = None,
    ref: Annotated[
        list[str] | None, typer.Option("--ref", "-r", help="A reference translation; repeatable.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", "-m", help="bleu, chrf, chrf++ or ter; repeatable.  [default: bleu chrf ter]"
        ),
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="Target language: BLEU splits words as it wants (zh, ja, ko).")
    ] = None,
    tokenize: Annotated[
        str | None, typer.Option(help="sacreBLEU's tokenizer for BLEU.  [default: by --to, else 13a]")
    ] = None,
    lowercase: Annotated[bool, typer.Option(help="Ignore case in BLEU and chrF; TER always does.")] = False,
    paired: Annotated[
        Paired, typer.Option(help="Test of several systems: paired bootstrap, or approximate randomization.")
    ] = Paired.bs,
    resamples: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Bootstrap resamples, or trials of ar.  [default: 1000 (ar: 10000); one system: none]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=1, help="Seed of the resamples.")] = 12345,
    as_json: Annotated[bool, typer.Option("--json", help="All digits, for programs.")] = False,
) -> None:
    """Score translations against references with sacreBLEU: trmt score output.de --ref test.de."""
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
        table = {name: score(text, reference_texts, options=options) for name, text in texts.items()}
    else:
        table = compare(texts, reference_texts, options=options)
    typer.echo(_as_json(table, references) if as_json else _as_text(table))
    _explain(table, options)


def _check_names(systems: list[str], references: list[str]) -> None:
    if not references:
        raise ConfigError("there is no reference to score against; name one with --ref FILE")
    if len(set(systems)) < len(systems):
        raise ConfigError("a system is named twice; name each file once")
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


def _as_json(table: Table, references: list[str]) -> str:
    import json
    from dataclasses import asdict

    systems = [
        {
            "system": system,
            "scores": {
                metric: {key: value for key, value in asdict(found).items() if value is not None}
                for metric, found in scores.items()
            },
        }
        for system, scores in table.items()
    ]
    return json.dumps({"references": references, "systems": systems}, indent=2, ensure_ascii=False)


def _as_text(table: Table) -> str:
    """Aligned columns: one row per metric for one system, one row per system for several."""
    first = next(iter(table.values()))
    if len(table) == 1:
        return aligned([[found.name, shown(found), found.signature] for found in first.values()])
    rows = [["system", *(found.name for found in first.values())]]
    rows += [[system, *(shown(found) for found in scores.values())] for system, scores in table.items()]
    signatures = [[found.name, found.signature] for found in first.values()]
    return f"{aligned(rows)}\n\n{aligned(signatures)}"


def shown(found: MetricScore) -> str:
    """A score in a cell, with its interval and p-value where it has them."""
    text = f"{found.value:.2f}"
    if found.interval is not None:
        text += f" ({found.interval.mean:.2f} ± {found.interval.half_width:.2f})"
    if found.p_value is not None:
        text += f" p = {found.p_value:.4f}" + ("*" if found.significant else "")
    return text


def aligned(rows: list[list[str]]) -> str:
    """Rows as text, each column as wide as its widest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in padded)


def _explain(table: Table, options: ScoreOptions) -> None:
    scores = [found for row in table.values() for found in row.values()]
    if any(found.interval for found in scores):
        console.say("in brackets: mean and 95% interval of the resamples")
    if any(found.p_value is not None for found in scores):
        test = {"bs": "paired bootstrap", "ar": "approximate randomization"}[options.paired]
        console.say(f"p: {test} against {next(iter(table))}; * differs at p < 0.05")
