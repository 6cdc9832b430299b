"""`trmt vectors`: word vectors from text in one language."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Argument(help="The file to write, in the text format of word2vec.")],
    text: Annotated[
        list[str], typer.Option("--text", metavar="FILE", help="One sentence a line. Repeatable.")
    ],
    tokenizer: Annotated[Path, typer.Option(help="The folder of the tokenizer.")] = Path("data/tokenizer"),
    width: Annotated[int, typer.Option(min=1, help="Numbers of a vector: network.d_model.")] = 512,
    target: Annotated[
        bool, typer.Option("--target", help="The text is in the language translated to.")
    ] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the text.")] = 5,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 1,
) -> None:
    """Make vectors of the tokenizer's pieces, for --set vectors.source=FILE (pip install 'trmt[vectors]')."""
    from trmt import console
    from trmt.text.tokenizer import Tokenizer
    from trmt.training.word_vectors import TextPieces, train_vectors, write_vectors

    loaded = Tokenizer.load(tokenizer)
    side = loaded.target if target else loaded.source
    vectors = train_vectors(TextPieces(text, side), width=width, seed=seed, epochs=epochs)
    write_vectors(out, vectors)
    console.say(f"{len(vectors.words):,} vectors of {width} numbers -> {out}")
