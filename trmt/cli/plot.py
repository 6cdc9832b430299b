"""`trmt plot`: the curves of one run or of several side by side."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Across(StrEnum):
    """What curves are drawn over."""

    steps = "steps"
    tokens = "tokens"
    hours = "hours"


def command(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Run folders, or their log.jsonl files. [default: the newest run in models/]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Picture to write: .png, .svg or .pdf. [default: text on the terminal]"),
    ] = None,
    across: Annotated[Across, typer.Option("--x", help="What the curves are drawn over.")] = Across.steps,
) -> None:
    """Draw losses, scores, learning rate and speed of runs: trmt plot models/a models/b --out curves.svg."""
    import os
    import shutil
    import sys

    from trmt import console
    from trmt.insight.plotting import ON_DARK, PlotOptions, plot, rows, summary
    from trmt.training import display

    options = PlotOptions(runs=tuple(runs or ()), out=out, axis=across.value)
    histories, drawn = plot(options)
    if out is None:
        coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        marked = len(histories) > 1 and not coloured
        width = shutil.get_terminal_size().columns
        pictured = rows(drawn, list(histories), width=width, axis=options.axis, marked=marked)
        display.draw(pictured, ON_DARK)
    console.table("on the dev set", *summary(histories))
