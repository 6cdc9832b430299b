"""What several commands share: options, standard streams, warnings about lines, and output for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, NoReturn

import typer

Model = Annotated[
    Path | None,
    typer.Argument(
        help="Bundle, run folder, or name of one in models/. [default: $TRMT_MODEL, else the newest finished]"
    ),
]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps or auto.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. [default: all]")]
TrustCode = Annotated[
    bool, typer.Option("--trust-code", help="Allow the model to load code from outside trmt.")
]

MAX_SHOWN = 5  # line numbers that a warning names


def input_stream() -> BinaryIO:
    """Standard input as a stream of bytes."""
    import sys

    from trmt.errors import DataError

    if sys.stdin is None:
        raise DataError("standard input is closed; connect it to a file, a pipe or a terminal")
    # Unbuffered, so that a thread which still waits for input cannot keep Python from exiting.
    return getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)


def output_stream() -> BinaryIO:
    """Standard output as a stream of bytes."""
    import sys

    from trmt.errors import DataError

    if sys.stdout is None:
        raise DataError("standard output is closed; connect it to a file, a pipe or a terminal")
    return sys.stdout.buffer


def exit_after_write_error(error: OSError, what: str) -> NoReturn:
    """End the command after a failed write; without a message if the reader has closed the pipe."""
    import os
    import sys

    from trmt.errors import DataError

    # Python would try to flush the buffer again when it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        raise typer.Exit(141) from error
    raise DataError(
        f"cannot write the {what}: {error.strerror}; free some space or write to another disk"
    ) from error


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


def output_style() -> tuple[int, bool]:
    """The width of the terminal, and whether standard output may be coloured."""
    import os
    import shutil
    import sys

    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return shutil.get_terminal_size().columns, coloured
