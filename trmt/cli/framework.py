"""What all commands share as commands: help, `--quiet`, former spellings of options, and how they end."""

from __future__ import annotations

import copy
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO, cast

import typer
from typer.core import TyperCommand, TyperGroup

from trmt import console
from trmt.cli.examples import EXAMPLES
from trmt.cli.parameters import Parameter, parameters

# Former spellings of options and the present ones, for commands that have the present one.
RENAMED: Mapping[str, str] = {"--out": "--output"}
# The exit code after the reader of standard output has gone, as of a process killed by SIGPIPE.
CLOSED_PIPE = 141

CONTEXT: Mapping[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 1000,  # columns of help: those of the terminal
}


def first_sentence(text: str) -> str:
    """The first sentence of a command's help text."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph)[0]


class Command(TyperCommand):
    """A command that takes `--quiet` as well as `trmt` itself does, and whose help ends with examples."""

    def get_params(self, ctx: Any) -> list[Any]:
        *own, last = super().get_params(ctx)
        found = [each for each in ctx.find_root().command.params if each.name == "quiet"]
        # Typer's classes of parameters differ from version to version; a copy needs none of them.
        for quiet in map(copy.copy, found):
            quiet.expose_value, quiet.callback = False, _make_quiet
            own.append(quiet)
        return [*own, last]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for each in self.params for name in each.opts}
        ctx.allow_extra_args = True  # which are refused below
        extra = super().parse_args(ctx, [_present_spelling(each, known) for each in args])
        if extra and not ctx.resilient_parsing:
            what = "argument" if len(extra) == 1 else "arguments"
            ctx.fail(f"unexpected {what} {' '.join(extra)}; {_advice(ctx, extra)}")
        return extra

    def declared(self) -> dict[str, Parameter]:
        """The arguments and options of the command by name, but hidden ones."""
        return {each.name: each for each in parameters(inspect.unwrap(cast(Any, self.callback)))}

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = (each.usage for each in self.declared().values() if not each.is_option)
        return [self.options_metavar or "", *arguments]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        known = self.declared()
        arguments = [(each.listed, each.help) for each in known.values() if not each.is_option]
        options = [
            (known[each.name].listed, known[each.name].help)
            if each.name in known
            else each.get_help_record(ctx)
            for each in self.get_params(ctx)
            if each.param_type_name == "option" and not each.hidden
        ]
        for title, rows in (("Arguments", arguments), ("Options", options)):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def get_short_help_str(self, limit: int = 45) -> str:
        return first_sentence(self.help or "")

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        name = ctx.command_path.removeprefix(ctx.find_root().command_path).strip()
        if examples := EXAMPLES.get(name):
            with formatter.section("Examples"):
                for line, meaning in examples:
                    # Never wrapped, so that it can be copied.
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
                    with formatter.indentation():
                        formatter.write_text(meaning)


def _advice(ctx: Any, extra: list[str]) -> str:
    """What to write instead of arguments that a command does not take."""
    command = ctx.command_path.removeprefix(ctx.find_root().command_path).strip()
    if command == "translate":
        files = "".join(f" {option} {each}" for option, each in zip(("-i", "-o"), extra, strict=False))
        line = f"trmt translate {ctx.params['model']}{files}"
        return f"name the text with -i and its translation with -o: {line}"
    corpora = ctx.params.get("train") or ()
    if corpora and len(extra) == 1 and "," not in corpora[-1]:
        return f"name both sides of a corpus in one word: --train {corpora[-1]},{extra[0]}"
    return f"trmt {command} -h shows what it takes"


def _present_spelling(argument: str, known: set[str]) -> str:
    name, equals, value = argument.partition("=")
    new = RENAMED.get(name)
    return argument if new is None or name in known or new not in known else f"{new}{equals}{value}"


def _make_quiet(ctx: Any, parameter: Any, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        console.set_quiet(True)


class CommandGroup(TyperGroup):
    """Lists whole sentences, and handles two exits for which Typer prints nothing or exits with 1."""

    def get_short_help_str(self, limit: int = 45) -> str:
        return first_sentence(self.help or "")

    def make_context(self, *arguments: Any, **more: Any) -> Any:
        with _typical_exits():  # it prints the version
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: Any) -> Any:
        with _typical_exits():
            return super().invoke(ctx)


@contextmanager
def _typical_exits() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.fail("interrupted")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        discard_closed_pipes()
        raise typer.Exit(CLOSED_PIPE) from None


def discard_closed_pipes() -> None:
    """Drop what is left to print where the reader has gone: Python would fail to print it when it exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            discard(stream)


def discard(stream: TextIO) -> None:
    """Drop what is left to print to a stream, and all that follows."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
