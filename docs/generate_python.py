"""The parts of python.md: signatures and docstrings of the public names, and dataclasses in them."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from generate_commands import table
from generate_recipes import comments

import trmt

WIDTH = 100


def names() -> list[str]:
    """All public names but the version, and the options, which are among the types."""
    found = [name for name in trmt.__all__ if not name.startswith("__")]
    return [name for name in found if not dataclasses.is_dataclass(getattr(trmt, name))]


def public_name(name: str) -> str:
    """Signature and docstring of one public name; of a class, its public methods and properties."""
    found = getattr(trmt, name)
    if not inspect.isclass(found):
        return described(name, found)
    parts = [f"`{name}`: {text_of(found)}"]
    for attribute, raw in vars(found).items():
        if attribute.startswith("_") or not inspect.getdoc(raw):
            continue
        prefix = name if isinstance(raw, classmethod | staticmethod) else name.lower()
        if isinstance(raw, property):
            parts.append(f"`{prefix}.{attribute}`: {text_of(raw)}")
        elif callable(getattr(found, attribute)):
            parts.append(described(f"{prefix}.{attribute}", getattr(found, attribute)))
    return "\n\n".join(parts)


def described(name: str, found: Any) -> str:
    """The signature as code, and the docstring."""
    return f"```text\n{signature(name, found)}\n```\n\n{text_of(found)}"


def text_of(found: Any) -> str:
    """A docstring with its paragraphs."""
    paragraphs = (inspect.getdoc(found) or "").split("\n\n")
    return "\n\n".join(" ".join(each.split()) for each in paragraphs)


def signature(name: str, function: Any) -> str:
    """The signature in one line, or with one line for each parameter."""
    known = inspect.signature(function)
    shown = []
    for each in known.parameters.values():
        if each.kind is each.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        default = "" if each.default is each.empty else f" = {value(each.default)}"
        shown.append(f"{each.name}: {annotation(each.annotation)}{default}")
    shown = [each for each in shown if not each.startswith(("self:", "cls:"))]
    returns = "" if known.return_annotation is known.empty else f" -> {annotation(known.return_annotation)}"
    one_line = f"{name}({', '.join(shown)}){returns}"
    if len(one_line) <= WIDTH:
        return one_line
    return "\n".join([f"{name}(", *(f"    {each}," for each in shown), f"){returns}"])


def annotation(hint: Any) -> str:
    """An annotation without module names; most are text, because of `from __future__ import annotations`."""
    return re.sub(
        r"\b(?:[a-z_]\w*\.)+(\w+)", r"\1", hint if isinstance(hint, str) else inspect.formatannotation(hint)
    )


def value(default: Any) -> str:
    """A default as code."""
    if isinstance(default, Path):
        return f'Path("{default}")'
    return f"{type(default).__name__}()" if dataclasses.is_dataclass(default) else repr(default)


def types() -> str:
    """The dataclasses that the public names take and return, with their fields."""
    found: dict[type, None] = {}
    for name in names():
        public = getattr(trmt, name)
        known = vars(public) if inspect.isclass(public) else {}
        methods = [getattr(public, each) for each in known if not each.startswith("_")]
        for each in methods or [public]:
            if inspect.isroutine(each):
                collect(get_type_hints(each).values(), found)
    return "\n\n".join(described_type(each) for each in found)


def collect(hints: Any, found: dict[type, None]) -> None:
    """Add the dataclasses in these annotations and in their fields, but not those of callbacks."""
    for hint in hints:
        if get_origin(hint) is not Callable:
            collect(get_args(hint), found)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint not in found:
            found[hint] = None
            collect(get_type_hints(hint).values(), found)


def described_type(cls: type) -> str:
    """The fields of a dataclass."""
    meanings = comments(cls)
    rows = [
        (f"`{each.name}`", f"`{annotation(each.type)}`", default_of(each), meanings.get(each.name, ""))
        for each in dataclasses.fields(cls)
        if not each.name.startswith("_")
    ]
    module = "trmt" if cls.__name__ in trmt.__all__ else cls.__module__
    title = f"### `{module}.{cls.__name__}`"
    return "\n\n".join([title, text_of(cls), table(("field", "type", "default", "meaning"), rows)])


def default_of(field: Any) -> str:
    """The default of a field."""
    if field.default is not dataclasses.MISSING:
        return f"`{value(field.default)}`"
    return "" if field.default_factory is dataclasses.MISSING else f"`{value(field.default_factory())}`"
