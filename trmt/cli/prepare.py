"""`trmt prepare`: turn text into a set to train on."""

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
            "--train", metavar="CORPUS", help=f"Pairs to train on, repeatable: {CORPUS}. @2.5 is a weight."
        ),
    ] = None,
    dev: Annotated[
        str | None, typer.Option("--dev", metavar="CORPUS", help="Pairs to validate on, never filtered.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="LANGUAGE", help="By itself the tokenizer's source.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--to", metavar="LANGUAGE", help="By itself the tokenizer's target.")
    ] = None,
    documents: Annotated[
        list[str] | None,
        typer.Option(
            "--documents",
            metavar="FILE",
            help="For pretraining, instead of --train: one sentence a line, blank lines between documents; "
            "--dev is such a file too. Repeatable.",
        ),
    ] = None,
    language: Annotated[
        str | None, typer.Option("--language", help="Of the documents. By itself the tokenizer's source.")
    ] = None,
    tokenizer: Annotated[Path, typer.Option(help="The folder of the tokenizer.")] = Path("data/tokenizer"),
    max_length: Annotated[int, typer.Option(help="The most pieces that a side of a pair may have.")] = 250,
    max_ratio: Annotated[
        float,
        typer.Option(help="How many times longer one side may be, in pieces beyond the first few; 0: any."),
    ] = 3.0,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Keep pairs that come more than once.")
    ] = False,
    alignments: Annotated[
        list[str] | None,
        typer.Option(
            "--alignments", metavar="FILE", help="Links of words (trmt align), one file for each --train."
        ),
    ] = None,
    source_column: Annotated[str | None, typer.Option(help="The column of the source text.")] = None,
    target_column: Annotated[str | None, typer.Option(help="The column of the target text.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Worker processes.", show_default="one for each core")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Have the workers of a Ray cluster encode: host:port, auto, or local for one here.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Prepare again even what is up to date.")] = False,
) -> None:
    """Encode and filter pairs of sentences, or documents, into a checksummed set of shards."""
    if documents or language:
        for_pairs = {"--train": train, "--from": source, "--to": target, "--workers": workers}
        for name, value in {**for_pairs, "--alignments": alignments, "--ray": ray}.items():
            if value:
                raise ConfigError(f"{name} is for pairs and --documents or --language is not; leave one out")
        _prepare_documents(documents, dev, out, tokenizer, language, max_length, force)
        return
    from trmt.sets.preparing import PrepareOptions, prepare
    from trmt.text.filters import Limits

    if ray and alignments:
        raise ConfigError("--alignments cannot be cut into the parts that --ray makes; leave one out")
    options = PrepareOptions(
        train=tuple(train or ()),
        dev=dev,
        out=out,
        tokenizer=tokenizer,
        languages=(source, target),
        columns=(source_column, target_column),
        limits=Limits(max_length, max_ratio),
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
        raise ConfigError("--language is that of --documents, and there are none; name a file")
    prepare_documents(
        DocumentOptions(tuple(documents), dev, out, tokenizer, language, max_length, force=force)
    )
