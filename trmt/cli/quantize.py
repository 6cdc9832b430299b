"""`trmt quantize`: a bundle with its weights in int8."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[Path, typer.Option("--out", help="Where to write the bundle.")],
    model: Annotated[
        Path | None,
        typer.Argument(help="Bundle or run folder. [default: $TRMT_MODEL, else the newest in models/]"),
    ] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Let the bundle name code outside trmt.")
    ] = False,
) -> None:
    """Write a bundle of a quarter of the size, which translates in int8 on the CPU."""
    from trmt.quantizing import quantize

    quantize(model, out, trust_code=trust_code)
