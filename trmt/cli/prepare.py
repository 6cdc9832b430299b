"""`trmt prepare`: encode text as a prepared set for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trmt.cli import completion
from trmt.cli.common import OutputFolder, SourceColumn, TargetColumn, chosen_output
from trmt.errors import ConfigError
from trmt.registry import require

CORPUS = (
    "train.en,train.de; pairs.tsv, .jsonl or .parquet; a prefix of two files; hf:NAME or "
    "hf:NAME/CONFIG:SPLIT; - for TSV on standard input"
)


def command(
    folder: OutputFolder = None,
    train: Annotated[
        list[str] | None,
        typer.Option(
            "--train",
            metavar="CORPUS",
            help=f"Training pairs, repeatable: {CORPUS}. A suffix @2.5 is a sampling weight.",
        ),
    ] = None,
    dev: Annotated[
        str | None, typer.Option("--dev", metavar="CORPUS", help="Validation pairs, which are not filtered.")
    ] = None,
    dev_size: Annotated[
        int | None,
        typer.Option(
            "--dev-size",
            metavar="N",
            help="Without --dev: take N training pairs for validation; none of their sentences is left in "
            "training. 0: none. [default: 5 %, at most 500]",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="LANGUAGE",
            help="Source language. [default: the tokenizer's, else the file's ending]",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="LANGUAGE",
            help="Target language. [default: the tokenizer's, else the file's ending]",
        ),
    ] = None,
    documents: Annotated[
        list[str] | None,
        typer.Option(
            "--documents",
            metavar="FILE",
            help="For pretraining, instead of --train: one sentence per line, blank lines between documents; "
            "then --dev is such a file too. Repeatable.",
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            "--language",
            metavar="LANGUAGE",
            help="Language of the documents. [default: the files' ending, else the tokenizer's source]",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the tokenizer. [default: the one in data/ for the languages]",
            autocompletion=completion.folders,
        ),
    ] = None,
    max_length: Annotated[int, typer.Option(help="Maximum number of subword pieces of each side.")] = 250,
    max_ratio: Annotated[
        float,
        typer.Option(
            help="Drop pairs with a higher ratio of pieces; short sentences may differ more; 0: off."
        ),
    ] = 3.0,
    keep_duplicates: Annotated[bool, typer.Option("--keep-duplicates", help="Keep repeated pairs.")] = False,
    alignments: Annotated[
        list[str] | None,
        typer.Option(
            "--alignments",
            metavar="FILE",
            help="Word alignment of a --train corpus (trmt align); one file for each.",
        ),
    ] = None,
    source_column: SourceColumn = None,
    target_column: TargetColumn = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of worker processes. [default: one for each core]")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Encode on a Ray cluster: host:port, auto, or local for a new one here.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Folder to write. [default: data/SOURCE-TARGET]"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Prepare the set even if it is up to date.")] = False,
) -> None:
    """Encode text as a prepared set. Sentence pairs are filtered; --documents is for pretraining."""
    out = chosen_output(folder, output)
    if documents or language:
        for_pairs = {"--train": train, "--from": source, "--to": target, "--workers": workers}
        for_pairs["--dev-size"] = dev_size
        for name, value in {**for_pairs, "--alignments": alignments, "--ray": ray}.items():
            if value:
                raise ConfigError(f"{name} is for pairs, --documents and --language are not; leave one out")
        _prepare_documents(documents, dev, out, tokenizer, language, max_length, force)
        return
    from trmt.sets.preparing import PrepareOptions, prepare
    from trmt.text.filters import LengthLimits

    if ray and alignments:
        raise ConfigError("--alignments and --ray exclude each other; leave one out")
    options = PrepareOptions(
        train=tuple(train or ()),
        dev=dev,
        dev_size=dev_size,
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
        require("trmt.scale", "--ray")
        from trmt.cli import corpus

        corpus.prepare(options, ray=ray, workers=workers)
    else:
        prepare(options)


def _prepare_documents(
    documents: list[str] | None,
    dev: str | None,
    out: Path | None,
    tokenizer: Path | None,
    language: str | None,
    max_length: int,
    force: bool,
) -> None:
    from trmt.sets.documents import DocumentOptions, prepare_documents

    if not documents:
        raise ConfigError("--language is the language of --documents; name a file of documents")
    prepare_documents(
        DocumentOptions(tuple(documents), dev, out, tokenizer, language, max_length, force=force)
    )
