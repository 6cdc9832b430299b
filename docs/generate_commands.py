"""The parts of commands.md: the functions behind the commands, as they are declared for Typer."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from trmt.cli import app

DEFAULT = re.compile(r"\s*\[default: (.*)\]$")
TYPES = {int: "INTEGER", float: "FLOAT", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Parameter:
    """An argument or an option of a command."""

    name: str
    info: Any  # what was given to typer.Argument or typer.Option
    hint: Any
    default: Any

    @property
    def is_option(self) -> bool:
        return isinstance(self.info, OptionInfo)

    @property
    def shown(self) -> str:
        """The parameter as the usage line or a table of options has it."""
        if not self.is_option:
            name = self.info.metavar or self.name.upper() + ("..." if self.repeats else "")
            return name if self.default is ... else f"[{name}]"
        default_name = f"--{self.name.replace('_', '-')}"
        names = ", ".join(self.declared) or default_name
        if self.hint is bool:
            return names if self.declared else f"{names}/--no-{names[2:]}"
        return f"{names} {self.info.metavar or self.value}"

    @property
    def declared(self) -> list[str]:
        """The names given to typer.Option, of which Typer takes the first one for a default at first."""
        first = [self.info.default] if isinstance(self.info.default, str) else []
        return [*first, *(self.info.param_decls or ())]

    @property
    def repeats(self) -> bool:
        return get_origin(self.hint) is list

    @property
    def value(self) -> str:
        """What kind of value it takes."""
        kind = get_args(self.hint)[0] if self.repeats else self.hint
        if get_origin(kind) is Literal:
            return "|".join(get_args(kind))
        if issubclass(kind, Enum):
            return "|".join(str(each.value) for each in kind)
        return TYPES[kind]

    @property
    def meaning(self) -> tuple[str, str]:
        """What it means, and its default."""
        text = " ".join((self.info.help or "").split())
        written = DEFAULT.search(text)
        text = DEFAULT.sub("", text)
        if written:
            return text, written[1]
        if isinstance(self.info.show_default, str):
            return text, self.info.show_default
        if self.default is ...:
            return text, "required"
        if self.default is True:
            return text, f"`{self.shown.split('/')[0]}`"
        hidden = self.default in (None, False, [], ()) or not self.info.show_default
        return text, "" if hidden else f"{self.default}"


def commands(typer_app: Any = app, prefix: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    """All commands by name; those of a group have two words."""
    for found in typer_app.registered_commands:
        yield f"{prefix}{found.name or found.callback.__name__.replace('_', '-')}", found.callback
    for group in typer_app.registered_groups:
        yield from commands(group.typer_instance, f"{group.name} ")


def names() -> list[str]:
    """The names of all commands."""
    return [name for name, _ in commands()]


def parameters(function: Callable[..., Any]) -> Iterator[Parameter]:
    """The arguments and options of a command, but hidden ones."""
    hints = get_type_hints(function, include_extras=True)
    for name, declared in inspect.signature(function).parameters.items():
        kind, *extras = get_args(hints[name])
        [info] = [each for each in extras if isinstance(each, OptionInfo | ArgumentInfo)]
        if get_origin(kind) in (Union, types.UnionType):
            [kind] = [each for each in get_args(kind) if each is not type(None)]
        default = ... if declared.default is declared.empty else declared.default
        if not info.hidden:
            yield Parameter(name, info, kind, default)


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
