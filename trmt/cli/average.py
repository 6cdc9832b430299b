"""`trmt average`: average the weights of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            help="A run folder, or checkpoints. [default: the newest run in models/]",
        ),
    ] = None,
    best: Annotated[int | None, typer.Option("--best", help="The best N checkpoints of the run.")] = None,
    last: Annotated[int | None, typer.Option("--last", help="The last N checkpoints of the run.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Bundle to write. [default: average/ in the run folder]")
    ] = None,
) -> None:
    """Average the weights of checkpoints into a bundle. Without --best or --last: the best five."""
    from trmt.averaging import AverageOptions, average
    from trmt.verifying import record

    average(AverageOptions(places=tuple(checkpoints or ()), best=best, last=last, out=out), record)
