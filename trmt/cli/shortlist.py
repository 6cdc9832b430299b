"""`trmt shortlist`: what makes `trmt translate --shortlist` possible."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trmt.cli.options import Model


def command(
    model: Model = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Prepared set. [default: the one it was trained on, in data/]"),
    ] = None,
    best: Annotated[
        int, typer.Option("--best", help="Target pieces that a source piece may become, at most.")
    ] = 100,
    frequent: Annotated[
        int, typer.Option("--frequent", help="Most frequent target pieces, which every sentence may hold.")
    ] = 300,
    room: Annotated[
        int, typer.Option("--room", help="Pieces that a sentence's list has beside these, at most.")
    ] = 1500,
) -> None:
    """Learn from a prepared set which pieces translate which, and keep it in the bundle."""
    from trmt.shortlisting import ShortlistOptions, shortlist

    shortlist(ShortlistOptions(model=model, data=data, best=best, frequent=frequent, room=room))
