"""The parts of python.md: signatures and docstrings of the public names, and dataclasses in them."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any, get_args, get_type_hints

from generate_commands import table
from generate_recipes import comments

import trmt

WIDTH = 100


def names() -> list[str]:
    """All public names but the version."""
    return [name for name in trmt.__all__ if not name.startswith("__")]


def public_name(name: str) -> str:
    """Signature and docstring of one public name; of a class, also of its public methods."""
    found = getattr(trmt, name)
    if not inspect.isclass(found):
        return described(name, found)
    parts = [described(name, found)]
    for attribute, raw in vars(found).items():
        if attribute.startswith("_") or not inspect.getdoc(raw):
            continue
        method = getattr(found, attribute)
        if callable(method):
            prefix = name if isinstance(raw, classmethod | staticmethod) else name.lower()
            parts.append(described(f"{prefix}.{attribute}", method))
        elif isinstance(raw, property):
            parts.append(f"`{name.lower()}.{attribute}`: {text_of(raw)}")
    return "\n\n".join(parts)


def described(name: str, found: Any) -> str:
    """The signature as code, and the docstring."""
    return f"```text\n{signature(name, found)}\n```\n\n{text_of(found)}"


def text_of(found: Any) -> str:
    """A docstring with its paragraphs."""
    paragraphs = (inspect.getdoc(found) or "").split("\n\n")
    return "\n\n".join(" ".join(each.split()) for each in paragraphs)


def signature(name: str, found: Any) -> str:
    """The signature in one line, or with one line for each parameter."""
    if inspect.isclass(found) and issubclass(found, BaseException):
        return name
    known = inspect.signature(found)
    given = [each for each in known.parameters.values() if each.name not in ("self", "cls")]
    shown = [shorter(str(each.replace(default=Default(each.default)))) for each in given]
    keywords = [each.kind is each.KEYWORD_ONLY for each in given]
    if True in keywords:
        shown.insert(keywords.index(True), "*")
    result = known.return_annotation
    returns = "" if result in (known.empty, "None", None) else f" -> {result}"
    one_line = f"{name}({', '.join(shown)}){shorter(returns)}"
    if len(one_line) <= WIDTH:
        return one_line
    return "\n".join([f"{name}(", *(f"    {each}," for each in shown), f"){shorter(returns)}"])


class Default:
    """A default as a reader wants to see it."""

    def __new__(cls, value: Any) -> Any:
        return super().__new__(cls) if dataclasses.is_dataclass(value) else value

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"{type(self.value).__name__}()"


def shorter(text: str) -> str:
    """An annotation without quotes and module names."""
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text).replace("'", "")


def types() -> str:
    """The dataclasses that the public names take and return, with their fields."""
    found: dict[type, None] = {}
    for name in names():
        public = getattr(trmt, name)
        callables = [public]
        if inspect.isclass(public):
            callables = [getattr(public, each) for each in vars(public) if not each.startswith("_")]
            callables += [public.__init__]
        for each in callables:
            if inspect.isroutine(each):
                collect(get_type_hints(each).values(), found)
    return "\n\n".join(described_type(each) for each in found)


def collect(hints: Any, found: dict[type, None]) -> None:
    """Add the dataclasses of trmt in these annotations, and those in their fields."""
    for hint in hints:
        collect(get_args(hint), found)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint not in found:
            found[hint] = None
            collect(get_type_hints(hint).values(), found)


def described_type(cls: type) -> str:
    """The fields of a dataclass."""
    meanings = comments(cls)
    rows = [
        (f"`{each.name}`", f"`{shorter(str(each.type))}`", default(each), meanings.get(each.name, ""))
        for each in dataclasses.fields(cls)
        if not each.name.startswith("_")
    ]
    title = f"### `{cls.__module__}.{cls.__name__}`"
    return "\n\n".join([title, text_of(cls), table(("field", "type", "default", "meaning"), rows)])


def default(field: Any) -> str:
    """The default of a field."""
    if field.default is not dataclasses.MISSING:
        return f"`{Default(field.default)!r}`"
    return "empty" if field.default_factory is not dataclasses.MISSING else ""
