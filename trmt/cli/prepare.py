"""`trmt prepare`: encode and filter text for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trmt.errors import ConfigError

CORPUS = (
    "train.en,train.de; pairs.tsv, .jsonl or .parquet; a prefix; hf:NAME or hf:NAME/CONFIG:SPLIT; - for TSV "
    "on standard input"
)


def command(
    out: Annotated[
        Path | None,
        typer.Argument(help="The folder to write.", show_default="data/SOURCE-TARGET"),
    ] = None,
    train: Annotated[
        list[str] | None,
        typer.Option(
            "--train",
            metavar="CORPUS",
            help=f"Pairs to train on, repeatable: {CORPUS}. A suffix @2.5 is a weight.",
        ),
    ] = None,
    dev: Annotated[
        str | None,
        typer.Option("--dev", metavar="CORPUS", help="Pairs to validate on; only empty ones are dropped."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="LANGUAGE", help="The source language; the tokenizer's by default."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--to", metavar="LANGUAGE", help="The target language; the tokenizer's by default."),
    ] = None,
    documents: Annotated[
        list[str] | None,
        typer.Option(
            "--documents",
            metavar="FILE",
            help="For pretraining, instead of --train: one sentence per line, blank lines between documents; "
            "--dev is such a file too. Repeatable.",
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option("--language", help="The language of the documents; the tokenizer's source by default."),
    ] = None,
    tokenizer: Annotated[Path, typer.Option(help="The folder of the tokenizer.")] = Path("data/tokenizer"),
    max_length: Annotated[int, typer.Option(help="Drop pairs with more pieces on either side.")] = 250,
    max_ratio: Annotated[
        float,
        typer.Option(
            help="Drop pairs with a higher ratio of pieces; short sentences may differ more; 0: off."
        ),
    ] = 3.0,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Keep pairs that occur more than once.")
    ] = False,
    alignments: Annotated[
        list[str] | None,
        typer.Option(
            "--alignments", metavar="FILE", help="Word alignments (trmt align), one file for each --train."
        ),
    ] = None,
    source_column: Annotated[
        str | None, typer.Option(help="The column of the source text, by name or number.")
    ] = None,
    target_column: Annotated[
        str | None, typer.Option(help="The column of the target text, by name or number.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes.", show_default="one for each core")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Encode on the workers of a Ray cluster: host:port, auto, or local to start one here.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Prepare again even if the set is up to date.")
    ] = False,
) -> None:
    """Encode and filter sentence pairs, or documents, for training."""
    if documents or language:
        for_pairs = {"--train": train, "--from": source, "--to": target, "--workers": workers}
        for name, value in {**for_pairs, "--alignments": alignments, "--ray": ray}.items():
            if value:
                raise ConfigError(f"{name} is for pairs, --documents and --language are not; leave one out")
        _prepare_documents(documents, dev, out, tokenizer, language, max_length, force)
        return
    from trmt.sets.preparing import PrepareOptions, prepare
    from trmt.text.filters import LengthLimits

    if ray and alignments:
        raise ConfigError("--alignments does not work with --ray; leave one out")
    options = PrepareOptions(
        train=tuple(train or ()),
        dev=dev,
        out=out,
        tokenizer=tokenizer,
        languages=(source, target),
        columns=(source_column, target_column),
        limits=LengthLimits(max_length, max_ratio),
        keep_duplicates=keep_duplicates,
        alignments=tuple(alignments or ()),
        workers=workers,
        force=force,
    )
    if ray:
        from trmt.cli import corpus

        corpus.prepare(options, ray=ray, workers=workers)
    else:
        prepare(options)


def _prepare_documents(
    documents: list[str] | None,
    dev: str | None,
    out: Path | None,
    tokenizer: Path,
    language: str | None,
    max_length: int,
    force: bool,
) -> None:
    from trmt.sets.documents import DocumentOptions, prepare_documents

    if not documents:
        raise ConfigError("--language needs --documents; name a file")
    prepare_documents(
        DocumentOptions(tuple(documents), dev, out, tokenizer, language, max_length, force=force)
    )
