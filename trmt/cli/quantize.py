"""`trmt quantize`: a bundle with its weights in int8."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trmt.cli.options import Model, TrustCode


def command(
    out: Annotated[Path, typer.Option("--out", help="Where to write the bundle.")],
    model: Model = None,
    trust_code: TrustCode = False,
) -> None:
    """Write a bundle of a quarter of the size, which translates in int8 on the CPU."""
    from trmt.quantizing import quantize

    quantize(model, out, trust_code=trust_code)
