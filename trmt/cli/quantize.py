"""`trmt quantize`: quantise a bundle to int8."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trmt.cli.common import Model, TrustCode


def command(
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Bundle to write.")],
    model: Model = None,
    trust_code: TrustCode = False,
) -> None:
    """Quantise the weights of a model to int8. A quarter of the size, for translation on the CPU."""
    from trmt.quantizing import quantize

    quantize(model, out, trust_code=trust_code)
