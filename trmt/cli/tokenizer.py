"""`trmt tokenizer`: train a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trmt import console

if TYPE_CHECKING:
    from trmt.text.tokenizer_training import TokenizerReport

CORPUS = (
    "Text to train on, repeatable: train.en,train.de; pairs.tsv, .jsonl or .parquet; a prefix; "
    "hf:NAME; - for TSV on standard input."
)
RULE = "nfc, nfkc, nmt_nfkc, nmt_nfkc_cf or none; stored with the tokenizer."


def command(
    out: Annotated[Path, typer.Argument(help="The folder to write.")] = Path("data/tokenizer"),
    train: Annotated[
        list[str] | None,
        typer.Option("--train", metavar="CORPUS", help=CORPUS),
    ] = None,
    source: Annotated[str, typer.Option("--from", metavar="LANGUAGE", help="The source language.")] = "",
    target: Annotated[str, typer.Option("--to", metavar="LANGUAGE", help="The target language.")] = "",
    size: Annotated[int, typer.Option(help="Pieces in each model, special ids and bytes included.")] = 8000,
    kind: Annotated[str, typer.Option(help="The type of the sentencepiece model: bpe or unigram.")] = "bpe",
    joint: Annotated[
        bool, typer.Option("--joint/--separate", help="One model for both languages, or one for each.")
    ] = True,
    coverage: Annotated[
        float | None,
        typer.Option(
            help="Share of running characters that have a piece of their own.",
            show_default="1 for small alphabets, 0.9995 for others",
        ),
    ] = None,
    byte_fallback: Annotated[bool, typer.Option(help="Spell characters without a piece in bytes.")] = True,
    split_digits: Annotated[bool, typer.Option(help="Make every digit a piece of its own.")] = True,
    normalise_source: Annotated[str, typer.Option(metavar="RULE", help=f"For source text: {RULE}")] = "nfc",
    normalise_target: Annotated[str, typer.Option(metavar="RULE", help=f"For target text: {RULE}")] = "nfc",
    tag: Annotated[
        list[str] | None, typer.Option(help="A symbol that text cannot spell, such as <2de>; repeatable.")
    ] = None,
    placeholder: Annotated[
        list[str] | None, typer.Option(help="A symbol that is never split in text; repeatable.")
    ] = None,
    source_column: Annotated[
        str | None, typer.Option(help="The column of the source text, by name or number.")
    ] = None,
    target_column: Annotated[
        str | None, typer.Option(help="The column of the target text, by name or number.")
    ] = None,
    sample: Annotated[
        int, typer.Option(help="Sentences to train on at most, of both languages together.")
    ] = 2_000_000,
    seed: Annotated[int, typer.Option(help="The seed of the sample.")] = 1,
) -> None:
    """Train a sentencepiece tokenizer on sentence pairs, and print statistics of its pieces."""
    from trmt.text.tokenizer_training import TokenizerOptions, train_tokenizer

    options = TokenizerOptions(
        corpora=tuple(train or ()),
        languages=(source, target),
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
    tokenizer, report = train_tokenizer(options, out=out)
    _print_report(report)
    sides = [tokenizer.source] if joint else [tokenizer.source, tokenizer.target]
    sizes = " and ".join(f"{side.vocabulary:,}" for side in sides)
    console.say(f"wrote {out}: {'joint' if joint else 'separate'} {kind}, {sizes} pieces")


def _print_report(report: TokenizerReport) -> None:
    sides = (("source", report.source), ("target", report.target))
    rows = [
        [
            name,
            side.language,
            f"{side.sentences:,}",
            f"{side.tokens_per_word:.2f}",
            f"{side.tokens_per_character:.2f}",
            f"{side.unknown / max(side.tokens, 1):.2%}",
            f"{side.bytes / max(side.tokens, 1):.2%}",
        ]
        for name, side in sides
    ]
    columns = ["side", "language", "sentences", "pieces/word", "pieces/char", "unknown", "bytes"]
    console.table("Pieces in a sample of the training text", columns, rows)
    for name, side in sides:
        if side.lost:
            console.say(f"{name} characters lost in encoding and decoding: {'; '.join(map(str, side.lost))}")
