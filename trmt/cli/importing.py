"""`trmt import`: another program's model as a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder with a Marian model, as OPUS-MT's.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Bundle to write. [default: in models/, of the same name]")
    ] = None,
    source: Annotated[
        str, typer.Option("--from", help="Language translated from. [default: as the model tells]")
    ] = "",
    target: Annotated[
        str, typer.Option("--to", help="Language translated to. [default: as the model tells]")
    ] = "",
    check: Annotated[
        bool, typer.Option(help="Compare with what transformers, if installed, makes of the folder.")
    ] = True,
) -> None:
    """Make a bundle of a Marian model: one that translates the same and can be trained on."""
    from trmt.interop.importing import ImportOptions, import_model

    import_model(ImportOptions(folder=folder, out=out, languages=(source, target), check=check))
