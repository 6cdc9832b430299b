"""`trmt plot`: training curves of one run or several."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trmt.cli import completion
from trmt.cli.common import format_table, output_style, print_report

if TYPE_CHECKING:
    from trmt.training.history import History


class XAxis(StrEnum):
    """The quantity on the x axis."""

    steps = "steps"
    tokens = "tokens"
    hours = "hours"


CurvesOut = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Figure of the curves to write: .png, .svg or .pdf. [default: text]",
    ),
]
CurvesAxis = Annotated[XAxis, typer.Option("--x", help="The x axis of the curves.")]


def command(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            help="Run folders or their log.jsonl files. [default: the newest run in models/]",
            autocompletion=completion.models,
        ),
    ] = None,
    out: CurvesOut = None,
    x_axis: CurvesAxis = XAxis.steps,
) -> None:
    """Plot the training curves of runs. As text, or as a figure."""
    from trmt.insight.plotting import summary

    columns, rows = summary(draw_curves(tuple(runs or ()), out, x_axis))
    print_report(f"on the dev set\n{format_table([columns, *rows])}")


def draw_curves(runs: tuple[Path, ...], out: Path | None, x_axis: XAxis) -> dict[str, History]:
    """Write the curves to a figure, or print them as text; returns the histories of the runs."""
    from trmt.insight.plotting import LINE_COLOURS, PlotOptions, plot, rows
    from trmt.training import display

    histories, panels = plot(PlotOptions(runs=runs, out=out, axis=x_axis.value))
    if out is None:
        width, coloured = output_style()
        marked = len(histories) > 1 and not coloured
        text = rows(panels, list(histories), width=width, axis=x_axis.value, marked=marked)
        display.draw(text, LINE_COLOURS)
    return histories
