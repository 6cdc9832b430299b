"""`trmt vectors`: train word vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trmt.cli import completion
from trmt.cli.common import OutputFolder, required_output


def command(
    text: Annotated[
        list[str], typer.Option("--text", metavar="FILE", help="Text with one sentence per line; repeatable.")
    ],
    file: OutputFolder = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the tokenizer. [default: the one in data/]",
            autocompletion=completion.folders,
        ),
    ] = None,
    width: Annotated[
        int, typer.Option(min=1, help="Dimension of the vectors; must be network.d_model.")
    ] = 512,
    target: Annotated[bool, typer.Option("--target", help="The text is in the target language.")] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs.")] = 5,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File to write, in the text format of word2vec. [required]"
        ),
    ] = None,
) -> None:
    """Train vectors of subword pieces. For --set vectors.source=FILE; needs pip install 'trmt[vectors]'."""
    from trmt import console
    from trmt.text.tokenizer import Tokenizer
    from trmt.text.tokenizer_folders import find_tokenizer
    from trmt.training.word_vectors import TextPieces, train_vectors, write_vectors

    out = required_output(file, output)
    loaded = Tokenizer.load(tokenizer or find_tokenizer(None))
    side = loaded.target if target else loaded.source
    vectors = train_vectors(TextPieces(text, side), size=width, seed=seed, epochs=epochs)
    write_vectors(out, vectors)
    console.say(f"{len(vectors.words):,} vectors of dimension {width} -> {out}")
