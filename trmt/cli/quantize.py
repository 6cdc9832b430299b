"""`trmt quantize`: quantise a bundle to int8."""

from __future__ import annotations

from typing import Annotated

import typer

from trmt.cli.common import Model, TrustCode


def command(
    out: Annotated[
        str,
        typer.Option("--output", "-o", metavar="FOLDER", help="Bundle to write, or its name in models/."),
    ],
    model: Model = None,
    trust_code: TrustCode = False,
) -> None:
    """Quantise the weights of a model to int8. A quarter of the size, for translation on the CPU."""
    from trmt.bundles.checkpoints import named_folder
    from trmt.quantizing import quantize

    quantize(model, named_folder(out), trust_code=trust_code)
