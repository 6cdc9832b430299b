"""The parts of commands.md: the functions behind the commands, as they are declared for Typer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from trmt.cli import app
from trmt.cli.parameters import parameters


def commands(typer_app: Any = app, prefix: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    """All commands by name; those of a group have two words."""
    for found in typer_app.registered_commands:
        yield f"{prefix}{found.name or found.callback.__name__.replace('_', '-')}", found.callback
    for group in typer_app.registered_groups:
        yield from commands(group.typer_instance, f"{group.name} ")


def names() -> list[str]:
    """The names of all commands."""
    return [name for name, _ in commands()]


def overview(page: str = "") -> str:
    """A list of all commands with links to their sections of a page, one line each."""
    rows = [
        (f"[`trmt {name}`]({page}#trmt-{name.replace(' ', '-')})", first_sentence(function))
        for name, function in commands()
    ]
    return table(("command", ""), rows)


def first_sentence(function: Callable[..., Any]) -> str:
    """The first sentence of a command's help text."""
    return re.split(r"(?<=\.) (?=[A-Z])", description(function).split("\n\n")[0])[0]


def description(function: Callable[..., Any]) -> str:
    """The help text of a command."""
    return "\n\n".join(" ".join(each.split()) for each in (inspect.getdoc(function) or "").split("\n\n"))


def command(*words: str) -> str:
    """Usage, description, arguments and options of one command."""
    name = " ".join(words)
    function = dict(commands())[name]
    known = sorted(parameters(function), key=lambda each: each.is_option)
    arguments = [each.shown for each in known if not each.is_option]
    options = ["[OPTIONS]"] if len(known) > len(arguments) else []
    usage = " ".join(["trmt", name, *options, *arguments])
    rows = [(f"`{each.shown}`", *each.meaning) for each in known]
    tables = [table(("", "meaning", "default"), rows)] if rows else []
    return "\n\n".join([f"`{usage}`", description(function), *tables])


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, tuple("---" for _ in head), *(tuple(map(escaped, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(cell: str) -> str:
    """A cell in which neither bars nor, outside of code, angle brackets mean anything."""
    parts = cell.replace("|", "\\|").split("`")
    return "`".join(part.replace("<", "&lt;") if index % 2 == 0 else part for index, part in enumerate(parts))
