"""`trmt align`: word alignment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trmt.cli import completion
from trmt.cli.common import (
    Device,
    Model,
    Threads,
    TrustCode,
    exit_after_write_error,
    format_table,
    input_stream,
    output_stream,
    print_report,
    set_threads,
    warn_about_encoding,
    warn_about_lines,
)
from trmt.errors import ConfigError

METHODS = ("intersection", "union", "grow-diag", "grow-diag-final", "grow-diag-final-and")

if TYPE_CHECKING:
    from trmt.insight.alignment.aligners import Aligner, AttentionHead
    from trmt.insight.alignment.pipeline import AlignmentReport, AlignOptions
    from trmt.text.links import AlignmentScore


def command(
    model: Model = None,
    reverse: Annotated[
        Path | None,
        typer.Option(
            "--reverse",
            metavar="MODEL",
            help="Model of the reverse direction; both alignments are symmetrised.",
            autocompletion=completion.models,
        ),
    ] = None,
    model1: Annotated[
        Path | None,
        typer.Option(
            "--ibm-model1",
            metavar="FOLDER",
            autocompletion=completion.folders,
            help="Train IBM Model 1 on a prepared set instead of using a model.",
        ),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            "--pairs", metavar="CORPUS", help="Corpus to align, as for trmt prepare. [default: TSV on stdin]"
        ),
    ] = None,
    symmetrise: Annotated[
        str | None,
        typer.Option(
            "--symmetrise",
            metavar="METHOD",
            autocompletion=completion.among(*METHODS),
            help="intersection, union, grow-diag, grow-diag-final or grow-diag-final-and. "
            "[default: the last, if there are two directions]",
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            "--layer", help="Layer of the attention, from 1. [default: the guided one, else the penultimate]"
        ),
    ] = None,
    head: Annotated[
        int | None,
        typer.Option(
            "--head", help="Attention head, from 1. [default: the guided one, else the mean of all]"
        ),
    ] = None,
    shift: Annotated[
        bool | None,
        typer.Option(
            "--shift/--no-shift",
            help="Use the attention of the next decoding step, which has the target piece as its input. "
            "[default: no]",
        ),
    ] = None,
    gold: Annotated[
        Path | None,
        typer.Option("--gold", metavar="FILE", help="Gold links to compare with: alignment error rate."),
    ] = None,
    rank_heads: Annotated[
        bool, typer.Option("--rank-heads", help="With --gold: list all layers and heads, the best first.")
    ] = False,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            "--evaluate",
            metavar="FILE",
            help="With --gold: compare the links in this file and align nothing.",
        ),
    ] = None,
    device: Device = "auto",
    threads: Threads = 0,
    trust_code: TrustCode = False,
    counts: Annotated[Path | None, typer.Option("--counts", hidden=True)] = None,
    choose: Annotated[bool, typer.Option("--choose", hidden=True)] = False,
    given: Annotated[Path | None, typer.Option("--given", hidden=True)] = None,
) -> None:
    """Align the words of sentence pairs. Lines of source TAB target give lines of links such as 0-0 1-2."""
    from trmt.insight.alignment.aligners import HeadOptions
    from trmt.insight.alignment.pipeline import AlignOptions, evaluate_file

    # --counts, --choose and --given are the former names of --ibm-model1, --rank-heads and --evaluate.
    evaluate, rank_heads = evaluate or given, rank_heads or choose
    if not gold and (rank_heads or evaluate):
        name = "--rank-heads" if rank_heads else "--evaluate"
        raise ConfigError(f"{name} needs gold links to compare with; add --gold FILE")
    if evaluate and gold:
        print_report(_format_agreement(evaluate_file(evaluate, gold)))
        return
    set_threads(threads)
    options = AlignOptions(
        model=model,
        reverse=reverse,
        model1=model1 or counts,
        head=HeadOptions(layer=layer, head=head, shift=shift),
        method=symmetrise,
        device=device,
        trust_code=trust_code,
    )
    _align(options, pairs, gold, rank_heads=rank_heads)


def _align(options: AlignOptions, corpus: str | None, gold: Path | None, *, rank_heads: bool) -> None:
    from trmt.insight.alignment import pipeline
    from trmt.insight.alignment.aligners import AttentionAligner

    source, out = input_stream(), output_stream()
    aligner = pipeline.build_aligner(options)
    if rank_heads and gold:
        if not isinstance(aligner, AttentionAligner):
            raise ConfigError("--rank-heads is for one model; leave --reverse and --ibm-model1 out")
        batch = pipeline.read_pairs(aligner, corpus or source)
        print_report(_format_heads(pipeline.rank_heads(aligner, batch, gold)))
        return
    try:
        if corpus:
            report = pipeline.align_corpus(aligner, corpus, out, gold=gold)
        else:
            report = pipeline.align_stream(aligner, source, out, gold=gold)
    except OSError as error:
        exit_after_write_error(error, "links")
    _print_report(report, aligner)


def _print_report(report: AlignmentReport, aligner: Aligner) -> None:
    from trmt import console

    warn_about_lines(
        report.without_tab,
        "has no tab and gets no links; write source TAB target",
        "have no tab and get no links; write source TAB target",
    )
    warn_about_encoding(report.undecodable)
    if aligner.truncated:
        console.warn(f"pairs that were truncated because of their length: {aligner.truncated:,}")
    if report.agreement:
        console.say(_format_agreement(report.agreement))


def _format_agreement(agreement: AlignmentScore) -> str:
    return (
        f"alignment error rate {agreement.error_rate:.4f}, precision {agreement.precision:.4f}, "
        f"recall {agreement.recall:.4f} ({agreement.found:,} links, {agreement.sure:,} sure links in gold)"
    )


def _format_heads(ranked: list[tuple[AttentionHead, AlignmentScore]]) -> str:
    rows = [["layer", "head", "shift", "AER", "precision", "recall"]]
    for each, agreement in ranked:
        head = "mean" if each.head is None else str(each.head + 1)
        numbers = (agreement.error_rate, agreement.precision, agreement.recall)
        rows.append(
            [str(each.layer + 1), head, "yes" if each.shift else "no", *map("{:.4f}".format, numbers)]
        )
    return format_table(rows)
