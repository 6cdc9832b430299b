"""What several commands share: options, standard streams, warnings about lines, and output for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, NoReturn, TypeVar, cast

import typer

from trmt.cli import completion
from trmt.cli.framework import CLOSED_PIPE, discard
from trmt.errors import ConfigError

Model = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL",
        help="Bundle, run folder, or name of one in models/. [default: $TRMT_MODEL, else the newest]",
        autocompletion=completion.models,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, mps or auto.",
        autocompletion=completion.devices,
    ),
]
Threads = Annotated[
    int, typer.Option("--threads", min=0, metavar="N", help="CPU threads. [default: all]", show_default=False)
]
OutputFolder = Annotated[Path | None, typer.Argument(hidden=True)]  # the former place of --output
OutputName = Annotated[str | None, typer.Argument(hidden=True)]
SourceColumn = Annotated[
    str | None, typer.Option("--source-column", metavar="COLUMN", help="Column of the source text.")
]
TargetColumn = Annotated[
    str | None, typer.Option("--target-column", metavar="COLUMN", help="Column of the target text.")
]
TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Allow the model to load code from outside trmt.")
]

Output = TypeVar("Output", Path, str)
MAX_SHOWN = 5  # line numbers that a warning names


def input_stream() -> BinaryIO:
    """Standard input as a stream of bytes, decompressed if it is compressed."""
    import sys

    from trmt.errors import DataError
    from trmt.storage.compression import Decompressed

    if sys.stdin is None:
        raise DataError("standard input is closed; connect it to a file, a pipe or a terminal")
    # Unbuffered, so that a thread which still waits for input cannot keep Python from exiting.
    stream: BinaryIO = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    return stream if stream.isatty() else cast(BinaryIO, Decompressed(stream, "standard input"))


def chosen_output(argument: Output | None, option: Output | None) -> Output | None:
    """What to write: --output, or the argument that it was before."""
    if argument and option:
        raise ConfigError(f"{argument} and --output {option} are two places to write to; leave one out")
    return option or argument


def required_output(argument: Output | None, option: Output | None) -> Output:
    """What to write; nothing is a wrong usage."""
    out = chosen_output(argument, option)
    if out is None:
        raise typer.BadParameter("name what to write", param_hint="--output")
    return out


def set_threads(count: int) -> None:
    """Set the number of CPU threads; 0 leaves it as it is, one for each core."""
    import torch

    if count:
        torch.set_num_threads(count)


def print_report(text: str) -> None:
    """Print the data that a command was called for."""
    import sys

    output_stream()
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        exit_after_write_error(error, "report")


def output_stream() -> BinaryIO:
    """Standard output as a stream of bytes."""
    import sys

    from trmt.errors import DataError

    if sys.stdout is None:
        raise DataError("standard output is closed; connect it to a file, a pipe or a terminal")
    return sys.stdout.buffer


def exit_after_write_error(error: OSError, what: str) -> NoReturn:
    """End the command after a failed write; without a message if the reader has closed the pipe."""
    import sys

    from trmt.errors import DataError
    from trmt.storage.files import write_advice

    discard(sys.stdout)  # Python would try to flush it again when it exits
    if isinstance(error, BrokenPipeError):
        raise typer.Exit(CLOSED_PIPE) from error
    raise DataError(f"cannot write the {what}: {error.strerror}; {write_advice(error)}") from error


def warn_about_lines(numbers: Sequence[int], one: str, several: str) -> None:
    """Warn about lines by their numbers: "line 3 <one>" or "2 lines <several>: 3, 5"."""
    from trmt import console

    if len(numbers) == 1:
        console.warn(f"line {numbers[0]} {one}")
    elif numbers:
        shown = ", ".join(map(str, numbers[:MAX_SHOWN])) + (", ..." if len(numbers) > MAX_SHOWN else "")
        console.warn(f"{len(numbers):,} lines {several}: {shown}")


def warn_about_encoding(numbers: Sequence[int]) -> None:
    """Warn about lines that are not valid UTF-8."""
    warn_about_lines(
        numbers,
        "is not valid UTF-8; undecodable bytes were replaced",
        "are not valid UTF-8; undecodable bytes were replaced",
    )


def format_table(rows: list[list[str]]) -> str:
    """Rows as text, each column as wide as its widest cell."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in padded)


def fitting_table(head: list[str], rows: list[list[str]]) -> str:
    """A table; on a terminal that is too narrow for it, a paragraph for each row."""
    text = format_table([head, *rows])
    width = terminal_width()
    if width is None or max(map(len, text.splitlines())) < width:
        return text
    paragraphs = []
    for first, *cells in rows:
        facts = ", ".join(
            f"{name} {cell}".strip() for name, cell in zip(head[1:], cells, strict=True) if cell
        )
        paragraphs += [first, wrapped(facts, indent="  ")]
    return "\n".join(paragraphs)


def wrapped(text: str, *, indent: str, first: str | None = None) -> str:
    """Text on indented lines, on a terminal wrapped to its width; `first` comes before the first line."""
    first = indent if first is None else first
    width = terminal_width()
    if width is None or not text:
        return first + text
    return textwrap.fill(
        text,
        max(width - 1, len(indent) + 10),
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def terminal_width() -> int | None:
    """The width of the terminal that standard output is, or None if it is something else."""
    import sys

    return output_style()[0] if sys.stdout.isatty() else None


def output_style() -> tuple[int, bool]:
    """The width of the terminal, and whether standard output may be coloured."""
    import os
    import shutil
    import sys

    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return shutil.get_terminal_size().columns, coloured
