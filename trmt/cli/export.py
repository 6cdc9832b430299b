"""`trmt export`: a bundle as another program's model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trmt.cli.options import Model


def command(
    to: Annotated[str, typer.Option("--to", help="ctranslate2, huggingface or onnx.")],
    model: Model = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write. [default: beside the model, named after the format]"),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(help="Have the other program load it and compare what it computes before it appears."),
    ] = True,
) -> None:
    """Write a model for CTranslate2, for Hugging Face (Marian), or as ONNX."""
    from trmt.interop.exporting import ExportOptions, export

    export(ExportOptions(model=model, to=to, out=out, check=check))
