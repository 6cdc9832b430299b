"""`trmt align`: which word of a translation comes from which word of its source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trmt.cli.options import Device, Model, TrustCode
from trmt.cli.score import aligned
from trmt.cli.translate import leave
from trmt.cli.translate import streams as standard_streams
from trmt.errors import ConfigError

if TYPE_CHECKING:
    from trmt.insight.alignment.aligning_streams import Report
    from trmt.insight.alignment.linking import Aligner, Look
    from trmt.text.links import AlignmentScore

SHOWN = 5  # lines that a message names


def command(
    model: Model = None,
    reverse: Annotated[
        Path | None,
        typer.Option("--reverse", help="A model of the other direction; links are those of both."),
    ] = None,
    counts: Annotated[
        Path | None,
        typer.Option("--counts", metavar="SET", help="Count in a prepared set instead of asking a model."),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option("--pairs", metavar="CORPUS", help="As for trmt prepare. [default: TSV on stdin]"),
    ] = None,
    symmetrise: Annotated[
        str | None,
        typer.Option(
            "--symmetrise",
            help="intersection, union, grow-diag, grow-diag-final or grow-diag-final-and. "
            "[default: the last, for two directions]",
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            "--layer", help="Whose attention, from 1. [default: the guided one, or the last but one]"
        ),
    ] = None,
    head: Annotated[
        int | None, typer.Option("--head", help="From 1. [default: the guided one, else the mean of all]")
    ] = None,
    shift: Annotated[
        bool | None,
        typer.Option("--shift/--no-shift", help="Look a step later, when the word goes in. [default: no]"),
    ] = None,
    gold: Annotated[
        Path | None, typer.Option("--gold", help="Links that people found: how far from these?")
    ] = None,
    choose: Annotated[
        bool, typer.Option("--choose", help="With --gold: a table of all layers and heads, best first.")
    ] = False,
    given: Annotated[
        Path | None, typer.Option("--given", help="With --gold: judge the links in this file, find none.")
    ] = None,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Find which words belong together: source TAB target in, links such as 0-0 1-2 out."""
    if not gold and (choose or given):
        raise ConfigError(
            f"{'--choose' if choose else '--given'} needs gold to compare with; add --gold FILE"
        )
    from trmt.insight.alignment import aligning_streams as streams
    from trmt.insight.alignment.linking import AttentionAligner, LookOptions

    if given and gold:
        typer.echo(_verdict(streams.judge_given(given, gold)))
        return
    options = streams.AlignOptions(
        model=model,
        reverse=reverse,
        counts=counts,
        look=LookOptions(layer=layer, head=head, shift=shift),
        method=symmetrise,
        device=device,
        trust_code=trust_code,
    )
    source, out = standard_streams()
    aligner = streams.build_aligner(options)
    if choose and gold:
        if not isinstance(aligner, AttentionAligner):
            raise ConfigError("--choose is for the layers of one model; leave --reverse and --counts out")
        some = streams.read_pairs(aligner, pairs or source)
        typer.echo(_looks(streams.judge_looks(aligner, some, gold)))
        return
    try:
        if pairs:
            report = streams.align_corpus(aligner, pairs, out, gold=gold)
        else:
            report = streams.align_stream(aligner, source, out, gold=gold)
    except OSError as error:
        leave(error, "links")
    _explain(report, aligner)


def _explain(report: Report, aligner: Aligner) -> None:
    from trmt import console

    for numbers, one, several in (
        (
            report.halves,
            "has no tab and so no links; write source TAB target",
            "have no tab and so no links; write source TAB target",
        ),
        (
            report.undecodable,
            "is not valid UTF-8; what could not be read was replaced",
            "are not valid UTF-8; what could not be read was replaced",
        ),
    ):
        if len(numbers) == 1:
            console.warn(f"line {numbers[0]} {one}")
        elif numbers:
            shown = ", ".join(map(str, numbers[:SHOWN])) + (", ..." if len(numbers) > SHOWN else "")
            console.warn(f"{len(numbers):,} lines {several}: {shown}")
    if aligner.cut:
        console.warn(f"pairs longer than what is looked at: {aligner.cut:,}; the words behind have no links")
    if report.agreement:
        console.say(_verdict(report.agreement))


def _verdict(seen: AlignmentScore) -> str:
    return (
        f"alignment error rate {seen.error_rate:.4f}, precision {seen.precision:.4f}, "
        f"recall {seen.recall:.4f} ({seen.found:,} links, {seen.sure:,} sure ones in gold)"
    )


def _looks(verdicts: list[tuple[Look, AlignmentScore]]) -> str:
    rows = [["layer", "head", "shift", "AER", "precision", "recall"]]
    for look, seen in verdicts:
        head = "mean" if look.head is None else str(look.head + 1)
        figures = [f"{value:.4f}" for value in (seen.error_rate, seen.precision, seen.recall)]
        rows.append([str(look.layer + 1), head, "yes" if look.shift else "no", *figures])
    return aligned(rows)
