"""`trmt tokenizer`: train a subword tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trmt import console
from trmt.cli import completion
from trmt.cli.common import OutputFolder, SourceColumn, TargetColumn, chosen_output

if TYPE_CHECKING:
    from trmt.text.tokenizer_training import TokenizerReport

CORPUS = (
    "Training text, repeatable: train.en,train.de; pairs.tsv, .jsonl or .parquet; a prefix of two files; "
    "hf:NAME; - for TSV on standard input."
)
LANGUAGE = "language. [default: the file's ending: train.en,train.de, pairs.en-de.tsv]"
RULES = ("nfc", "nfkc", "nmt_nfkc", "nmt_nfkc_cf", "none")
RULE = "nfc, nfkc, nmt_nfkc, nmt_nfkc_cf or none; stored with the tokenizer."


def command(
    folder: OutputFolder = None,
    train: Annotated[
        list[str] | None,
        typer.Option("--train", metavar="CORPUS", help=CORPUS),
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="LANGUAGE", help=f"Source {LANGUAGE}")
    ] = None,
    target: Annotated[str | None, typer.Option("--to", metavar="LANGUAGE", help=f"Target {LANGUAGE}")] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Vocabulary size of each model, with special ids and bytes. "
            "[default: 1,000, 2,000 or 8,000, by the number of pairs]",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Subword algorithm: bpe or unigram.",
            autocompletion=completion.among("bpe", "unigram"),
        ),
    ] = "bpe",
    joint: Annotated[
        bool, typer.Option("--joint/--separate", help="One model for both languages, or two.")
    ] = True,
    coverage: Annotated[
        float | None,
        typer.Option(
            help="Share of the characters of the text that get pieces of their own. "
            "[default: 1 for small alphabets, 0.9995 for others]",
            show_default=False,
        ),
    ] = None,
    byte_fallback: Annotated[bool, typer.Option(help="Encode other characters as bytes.")] = True,
    split_digits: Annotated[bool, typer.Option(help="Make every digit a separate piece.")] = True,
    normalise_source: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            autocompletion=completion.among(*RULES),
            help=f"Normalisation of source text: {RULE}",
        ),
    ] = "nfc",
    normalise_target: Annotated[
        str,
        typer.Option(
            metavar="RULE",
            autocompletion=completion.among(*RULES),
            help=f"Normalisation of target text: {RULE}",
        ),
    ] = "nfc",
    tag: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SYMBOL", help="A symbol that never results from text, such as <2de>; repeatable."
        ),
    ] = None,
    placeholder: Annotated[
        list[str] | None,
        typer.Option(metavar="SYMBOL", help="A symbol that is a single piece in text; repeatable."),
    ] = None,
    source_column: SourceColumn = None,
    target_column: TargetColumn = None,
    sample: Annotated[int, typer.Option(help="Maximum number of training sentences, sampled.")] = 2_000_000,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder to write. [default: data/tokenizer-SOURCE-TARGET]",
        ),
    ] = None,
) -> None:
    """Train a subword tokenizer with sentencepiece. Statistics of its tokens are printed."""
    from trmt.text.corpus import find_languages, unknown_languages
    from trmt.text.tokenizer_folders import tokenizer_folder
    from trmt.text.tokenizer_training import TokenizerOptions, train_tokenizer

    source, target = find_languages(train or (), source, target)
    if train and not (source and target):
        raise unknown_languages(train)
    options = TokenizerOptions(
        corpora=tuple(train or ()),
        languages=(source or "", target or ""),
        kind=kind,  # type: ignore[arg-type]
        joint=joint,
        size=size,
        coverage=coverage,
        byte_fallback=byte_fallback,
        split_digits=split_digits,
        normalise_source=normalise_source,  # type: ignore[arg-type]
        normalise_target=normalise_target,  # type: ignore[arg-type]
        tags=tuple(tag or ()),
        placeholders=tuple(placeholder or ()),
        source_column=source_column,
        target_column=target_column,
        sample=sample,
        seed=seed,
    )
    out = chosen_output(folder, output) or tokenizer_folder(source or "", target or "")
    tokenizer, report = train_tokenizer(options, out=out)
    _show(report)
    sides = [tokenizer.source] if joint else [tokenizer.source, tokenizer.target]
    sizes = " and ".join(f"{side.vocabulary:,}" for side in sides)
    console.say(
        f"wrote {out}: {source} to {target}, {'joint' if joint else 'separate'} {kind}, {sizes} pieces"
    )


def _show(report: TokenizerReport) -> None:
    sides = (("source", report.source), ("target", report.target))
    rows = [
        ["language", *(side.language for _, side in sides)],
        ["sentences", *(f"{side.sentences:,}" for _, side in sides)],
        ["tokens/word", *(f"{side.tokens_per_word:.2f}" for _, side in sides)],
        ["tokens/char", *(f"{side.tokens_per_character:.2f}" for _, side in sides)],
        ["unknown", *(f"{side.unknown / max(side.tokens, 1):.2%}" for _, side in sides)],
        ["bytes", *(f"{side.bytes / max(side.tokens, 1):.2%}" for _, side in sides)],
    ]
    console.table("Tokens in a sample of the training text", ["side", *(name for name, _ in sides)], rows)
    for name, side in sides:
        if side.lost:
            console.say(f"{name} characters that are lost: {'; '.join(map(str, side.lost))}")
