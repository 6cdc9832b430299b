"""The `trmt` command: a shell over the library, one file for each subcommand, one place for errors."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trmt import __version__, console
from trmt.cli import (
    align,
    attend,
    average,
    bert,
    check_resume,
    compare,
    env,
    export,
    importing,
    inspect,
    plot,
    prepare,
    pretrain,
    quantize,
    score,
    tokenizer,
    train,
    translate,
    vectors,
    verify,
)
from trmt.errors import TrmtError


class _Commands(TyperGroup):
    """Ends that Typer would meet without a word, or with a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            console.fail("interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader has gone: end quietly, and keep the interpreter from complaining when it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None


app = typer.Typer(
    cls=_Commands,
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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings and errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    console.set_quiet(quiet)


app.command("tokenizer")(tokenizer.command)
app.command("prepare")(prepare.command)
app.command("vectors")(vectors.command)
app.command("train")(train.command)
app.command("pretrain")(pretrain.command)
app.command("check-resume")(check_resume.command)
app.command("average")(average.command)
app.command("translate")(translate.command)
app.command("quantize")(quantize.command)
app.command("inspect")(inspect.command)
app.command("verify")(verify.command)
app.command("export")(export.command)
app.command("import")(importing.command)
app.command("align")(align.command)
app.command("score")(score.command)
app.command("attend")(attend.command)
app.command("plot")(plot.command)
app.command("compare")(compare.command)
app.command("env")(env.command)
app.add_typer(bert.app, name="bert")


def main() -> None:
    """Run the command line; every TrmtError ends here as one sentence and exit code 1."""
    # Before torch is loaded: threads that wait for each other by spinning keep a busy core from the one they
    # wait for. So they spin for a moment only.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        try:
            app()
        except TrmtError as error:
            console.fail(str(error))
            sys.exit(error.exit_code)
    except SystemExit as end:
        if os.environ.get("WORLD_SIZE", "1") != "1" and isinstance(end.code, int | None):
            # One of several processes: threads of torch that are still about abort it now and then when the
            # interpreter takes itself apart, and torchrun would call a run a failure that has ended well.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code or 0)
        raise
