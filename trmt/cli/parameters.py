"""The arguments and options of commands as their functions declare them, for their help and the docs."""

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

DEFAULT = re.compile(r"\s*\[(?:default: (.*)|(required))\]$")
TYPES = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Parameter:
    """An argument or an option of a command."""

    name: str
    info: Any  # what was given to typer.Argument or typer.Option
    hint: Any
    default: Any

    @property
    def is_option(self) -> bool:
        """Whether it is an option."""
        return isinstance(self.info, OptionInfo)

    @property
    def metavar(self) -> str:
        """What stands for the value; of a flag, nothing."""
        if self.hint is bool:
            return ""
        return str(self.info.metavar or (self._kind if self.is_option else self.name.upper()))

    @property
    def usage(self) -> str:
        """An argument in the usage line."""
        name = self.metavar if self.default is ... else f"[{self.metavar}]"
        return f"{name}..." if self.repeats else name

    @property
    def shown(self) -> str:
        """The parameter in the docs."""
        if not self.is_option:
            return self.usage
        return f"{', '.join(self.spellings)} {self.metavar}".strip()

    @property
    def listed(self) -> str:
        """The parameter in its list of help."""
        if not self.is_option:
            return self.metavar
        short_first = sorted(self.spellings, key=lambda each: each.startswith("--"))
        return f"{', '.join(short_first)} {self.metavar}".strip()

    @property
    def spellings(self) -> list[str]:
        """The names of an option; of a flag that can be switched off, both in one."""
        # Typer takes the first name for a default at first.
        first = [self.info.default] if isinstance(self.info.default, str) else []
        default = f"--{self.name.replace('_', '-')}"
        if self.hint is bool:
            default = f"{default}/--no-{default[2:]}"
        return [*first, *(self.info.param_decls or ())] or [default]

    @property
    def repeats(self) -> bool:
        """Whether it takes several values."""
        return get_origin(self.hint) is list

    @property
    def _kind(self) -> str:
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
            return text, written[1] or written[2]
        if isinstance(self.info.show_default, str):
            return text, self.info.show_default
        if self.default is ...:
            return text, "required"
        if self.default is True:
            return text, self.spellings[0].split("/")[0]
        hidden = self.default in (None, False, [], ()) or not self.info.show_default
        is_count = isinstance(self.default, int) and "seed" not in self.name
        return text, "" if hidden else f"{self.default:,}" if is_count else f"{self.default}"

    @property
    def help(self) -> str:
        """The meaning with the default behind it."""
        text, default = self.meaning
        if not default:
            return text
        return f"{text} [{'' if default == 'required' else 'default: '}{default}]"


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
