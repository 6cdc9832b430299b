"""`trmt average`: the mean of several checkpoints' weights as a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trmt.cli import completion


def command(
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            help="A run folder, or the checkpoints themselves. [default: the newest run in models/]",
            autocompletion=completion.models,
        ),
    ] = None,
    best: Annotated[int | None, typer.Option("--best", help="The best N checkpoints of the run.")] = None,
    last: Annotated[int | None, typer.Option("--last", help="The last N checkpoints of the run.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FOLDER", help="Bundle to write. [default: average/ in the run]"
        ),
    ] = None,
) -> None:
    """Average checkpoints into a bundle. Without --best or --last: the best five."""
    from trmt.averaging import AverageOptions, average
    from trmt.verifying import record

    average(AverageOptions(paths=tuple(checkpoints or ()), best=best, last=last, out=out), record)
