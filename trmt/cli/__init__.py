"""The `trmt` command line: a table of commands, and the place where errors end."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated

import typer

from trmt import __version__, console
from trmt.cli.framework import CLOSED_PIPE, CONTEXT, Command, CommandGroup, discard_closed_pipes
from trmt.errors import TrmtError
from trmt.registry import is_installed

# name -> (module of trmt.cli and the command in it, the optional package that it needs)
COMMANDS: Mapping[str, tuple[str, str | None]] = {
    "new": ("new:command", None),
    "tokenizer": ("tokenizer:command", None),
    "prepare": ("prepare:command", None),
    "vectors": ("vectors:command", None),
    "train": ("train:command", None),
    "recipes": ("recipes:command", None),
    "pretrain": ("train:pretrain", "trmt.lab"),
    "check-resume": ("check_resume:command", None),
    "average": ("average:command", None),
    "translate": ("translate:command", None),
    "quantize": ("quantize:command", None),
    "inspect": ("inspect:command", "trmt.insight"),
    "models": ("models:command", None),
    "verify": ("verify:command", None),
    "export": ("interop:export_command", "trmt.interop"),
    "import": ("interop:import_command", "trmt.interop"),
    "align": ("align:command", "trmt.insight"),
    "score": ("score:command", None),
    "attend": ("attend:command", "trmt.insight"),
    "plot": ("plot:command", "trmt.insight"),
    "compare": ("compare:command", "trmt.insight"),
    "env": ("env:command", None),
    "bert": ("interop:bert", "trmt.interop"),
}


app = typer.Typer(
    cls=CommandGroup,
    name="trmt",
    help="Train your own translator: tokenizer, prepare, train, average, translate, score, plot.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in help texts are brackets
    context_settings=dict(CONTEXT),
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"trmt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    console.set_quiet(quiet)


def _add_commands() -> None:
    """Add the commands whose packages are installed."""
    for name, (path, package) in COMMANDS.items():
        if package is not None and not is_installed(package):
            continue
        module, _, attribute = path.partition(":")
        command = getattr(import_module(f"trmt.cli.{module}"), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, cls=CommandGroup)
        else:
            app.command(name, cls=Command)(command)


_add_commands()


def main() -> None:
    """Run the command line; what trmt/errors.py names becomes one line on standard error and exit code 1."""
    # Must be set before torch is loaded. OpenMP threads that wait spin only briefly, because a spinning
    # thread takes a busy core from the one that it waits for.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    code = _run()
    if os.environ.get("WORLD_SIZE", "1") != "1" and isinstance(code, int | None):
        # In a distributed run, threads of torch that are still running sometimes abort the interpreter at
        # exit, and torchrun would report a successful run as failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def _run() -> str | int | None:
    """Run the command line; returns the exit code."""
    try:
        return _outcome()
    except BrokenPipeError:
        discard_closed_pipes()
        return CLOSED_PIPE


def _outcome() -> str | int | None:
    """Run the command line; of errors that a user can act on, print one line."""
    try:
        try:
            app()
        except SystemExit as end:
            # Readers that have gone and disks that are full are noticed here, and not when Python exits.
            for stream in (sys.stdout, sys.stderr):
                if stream is not None and not stream.closed:
                    stream.flush()
            return end.code
    except TrmtError as error:
        console.fail(str(error))
        return error.exit_code
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.filename is None:
            return _report_full_output(error)
        console.fail(f"cannot use {error.filename}: {error.strerror}; check the path and its permissions")
        return TrmtError.exit_code
    return 0


def _report_full_output(error: OSError) -> int:
    """Name the reason why standard output cannot be written; any other error is raised again."""
    from trmt.storage.files import write_advice

    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        raise error
    discard_closed_pipes()
    console.fail(f"cannot write the output: {error.strerror}; {write_advice(error)}")
    return TrmtError.exit_code
