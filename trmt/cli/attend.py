"""`trmt attend`: where a network looks while it writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from trmt.cli.options import Device, Model, TrustCode

if TYPE_CHECKING:
    from trmt.insight.heatmaps.showing import Attender, Line


def command(
    model: Model = None,
    source: Annotated[
        str | None, typer.Option("--source", help="A sentence. [default: the lines of standard input]")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Its translation. [default: what the model makes of it]")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Page (.html) or picture (.png, .svg, .pdf) to write. [default: text on the terminal]",
        ),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            help="cross (target to source), encoder or decoder (to themselves); can be repeated for a page. "
            "[default: cross, on a page all]",
        ),
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", min=1, help="Which layer. [default: mean of all]")
    ] = None,
    head: Annotated[
        int | None, typer.Option("--head", min=1, help="Which head. [default: mean of all]")
    ] = None,
    words: Annotated[bool, typer.Option("--words/--pieces", help="Pieces joined to words.")] = False,
    beam: Annotated[int, typer.Option("--beam", help="Size of the beam; 1 is greedy search.")] = 4,
    device: Device = "auto",
    trust_code: TrustCode = False,
) -> None:
    """Draw where a network looks while it writes: lines of a source, or of a source, a tab and a target."""
    from trmt.errors import ConfigError
    from trmt.insight.heatmaps.showing import Attender, AttendOptions, Line, write

    if source is None and target is not None:
        raise ConfigError("--target is the translation of a --source; give both, or lines with a tab between")
    options = AttendOptions(
        model=model,
        kinds=cast(Any, tuple(kinds or ())),  # checked there
        layer=layer or 0,
        head=head or 0,
        by_words=words,
        out=out,
        beam=beam,
        device=device,
        trust_code=trust_code,
    )
    attender = Attender(options)
    lines = _stdin() if source is None else iter([[Line(1, source, target)]])
    if out:
        write(attender, (line for window in lines for line in window))
    else:
        for window in lines:
            _show(attender, window)


def _stdin() -> Iterator[list[Line]]:
    """The lines that are there, as they come."""
    import sys

    from trmt import console
    from trmt.errors import DataError
    from trmt.insight.heatmaps.showing import Line
    from trmt.streaming import BOM, LineReader

    if sys.stdin is None:
        raise DataError("standard input is closed; connect it to a file, a pipe or a terminal")
    if sys.stdin.isatty():
        console.say("type a line to see where the model looks while it translates it, Ctrl-D to end")
    number = 0
    for window in LineReader(getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)).windows():
        if not number:
            window[0] = window[0].removeprefix(BOM)
        yield [Line.read(raw, number + at) for at, raw in enumerate(window, start=1)]
        number += len(window)


def _show(attender: Attender, lines: list[Line]) -> None:
    """The matrices as text on standard output."""
    import os
    import shutil
    import sys

    from trmt.insight.heatmaps import text
    from trmt.insight.heatmaps.matrix import matrix
    from trmt.training import display

    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    width = shutil.get_terminal_size().columns
    for line, looks in attender.looks(lines):
        drawn = matrix(looks, attender.choice)
        head = [(f"{line.number}  {attender.choice}", None)]
        rows = text.rows(drawn, width=width, coloured=coloured)
        display.draw([head, [], *rows, [], text.legend(drawn, coloured=coloured), []], text.SHADES)
    sys.stdout.flush()
