"""The `trmt` command line: a table of commands, and the place where errors end."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trmt import __version__, console
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


class _CommandGroup(TyperGroup):
    """Handles two exits for which Typer prints nothing or a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            console.fail("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader of standard output has gone. Python must not complain when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None


app = typer.Typer(
    cls=_CommandGroup,
    name="trmt",
    help="Train your own translator: tokenizer, prepare, train, average, translate, score, plot.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in help texts are brackets
    context_settings={"help_option_names": ["-h", "--help"]},
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
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)


_add_commands()


def main() -> None:
    """Run the command line; a TrmtError becomes one line on standard error and exit code 1."""
    # Must be set before torch is loaded. OpenMP threads that wait spin only briefly, because a spinning
    # thread takes a busy core from the one that it waits for.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        try:
            app()
        except TrmtError as error:
            console.fail(str(error))
            sys.exit(error.exit_code)
    except SystemExit as end:
        if os.environ.get("WORLD_SIZE", "1") != "1" and isinstance(end.code, int | None):
            # In a distributed run, threads of torch that are still running sometimes abort the interpreter at
            # exit, and torchrun would report a successful run as failed.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code or 0)
        raise
