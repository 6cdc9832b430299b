"""`trmt attend`: attention maps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from trmt.cli import completion
from trmt.cli.common import Device, Model, Threads, TrustCode, input_stream, output_style, set_threads

if TYPE_CHECKING:
    from trmt.insight.heatmaps.extractor import AttendLine, AttentionExtractor


def command(
    model: Model = None,
    source: Annotated[
        str | None, typer.Option("--source", help="A source sentence. [default: the lines of standard input]")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Its translation. [default: translated by the model]")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Page (.html) or figure (.png, .svg, .pdf) to write. [default: text on the terminal]",
        ),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            metavar="KIND",
            autocompletion=completion.among("cross", "encoder", "decoder"),
            help="cross (attention), encoder or decoder (self-attention); repeatable for a page. "
            "[default: cross, for a page all]",
        ),
    ] = None,
    layer: Annotated[int | None, typer.Option("--layer", min=1, help="Layer. [default: mean of all]")] = None,
    head: Annotated[
        int | None, typer.Option("--head", min=1, help="Attention head. [default: mean of all]")
    ] = None,
    words: Annotated[
        bool, typer.Option("--words/--pieces", help="Show the weights between words or subword pieces.")
    ] = False,
    beam: Annotated[int, typer.Option("--beam", help="Beam size; 1 is greedy search.")] = 4,
    device: Device = "auto",
    threads: Threads = 0,
    trust_code: TrustCode = False,
) -> None:
    """Show the attention of a network. Input lines are a source, or a source, a tab and a target."""
    from trmt.errors import ConfigError
    from trmt.insight.heatmaps.extractor import AttendLine, AttendOptions, AttentionExtractor, write_maps

    if source is None and target is not None:
        raise ConfigError("--target is the translation of a --source; give both, or lines with a tab between")
    set_threads(threads)
    options = AttendOptions(
        model=model,
        kinds=cast(Any, tuple(kinds or ())),  # AttendOptions checks them
        layer=layer or 0,
        head=head or 0,
        by_words=words,
        out=out,
        beam=beam,
        device=device,
        trust_code=trust_code,
    )
    extractor = AttentionExtractor(options)
    windows = _read_lines() if source is None else iter([[AttendLine(1, source, target)]])
    if out:
        write_maps(extractor, (line for window in windows for line in window))
    else:
        for window in windows:
            _print_maps(extractor, window)


def _read_lines() -> Iterator[list[AttendLine]]:
    """The lines of standard input, as they arrive."""
    from trmt import console
    from trmt.insight.heatmaps.extractor import AttendLine
    from trmt.streaming import BOM, LineReader

    source = input_stream()
    if source.isatty():
        console.say("type a line to see the attention of its translation, Ctrl-D to end")
    count = 0
    for window in LineReader(source).windows():
        if not count:
            window[0] = window[0].removeprefix(BOM)
        yield [AttendLine.parse(raw, number) for number, raw in enumerate(window, start=count + 1)]
        count += len(window)


def _print_maps(extractor: AttentionExtractor, lines: list[AttendLine]) -> None:
    """Print the maps as text on standard output."""
    import sys

    from trmt.insight.heatmaps import terminal
    from trmt.insight.heatmaps.maps import choose_map
    from trmt.training import display

    width, coloured = output_style()
    for line, maps in extractor.maps(lines):
        drawn = choose_map(maps, extractor.choice)
        title = [(f"{line.number}  {extractor.choice}", None)]
        rows = terminal.rows(drawn, width=width, coloured=coloured)
        display.draw([title, [], *rows, [], terminal.legend(drawn, coloured=coloured), []], terminal.SHADES)
    sys.stdout.flush()
