"""The parts of recipes.md: the fields of the config dataclasses, with the comments beside them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import sys
import textwrap
import tokenize
import types
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from generate_commands import table

from trmt.config import read_toml
from trmt.registry import NETWORKS, OBJECTIVES, resolve
from trmt.training.recipe import Recipe
from trmt.training.recipe import __file__ as RECIPE_FILE
from trmt.training.recipe import names as recipe_names

HEAD = ("key", "values", "default", "meaning")
IGNORED = re.compile(r"# *(type: ignore|noqa)\S*")  # comments for programs


def recipes() -> str:
    """A list of the recipes that come with trmt."""
    folder = Path(RECIPE_FILE).parent.parent / "recipes"
    rows = []
    for name in recipe_names():
        tree = read_toml(folder / f"{name}.toml")
        rows.append((f"`{name}`", f"`{tree.get('architecture', 'transformer')}`", tree["description"]))
    return table(("recipe", "architecture", "description"), rows)


def config(name: str) -> str:
    """The keys of one table of a recipe, or with `recipe` those outside of all tables."""
    if name == "recipe":
        fields = [each for each in dataclasses.fields(Recipe) if not is_table(each)]
        return table(HEAD, [row(Recipe, each) for each in fields])
    return keys_of(table_class(name), prefix=f"{name}.")


def is_table(field: Any) -> bool:
    """Whether a field of the recipe is a table of its own."""
    return field.default_factory is not dataclasses.MISSING


def tables() -> list[str]:
    """The names of the tables whose keys are always the same."""
    hints = get_type_hints(Recipe)
    return [each.name for each in dataclasses.fields(Recipe) if dataclasses.is_dataclass(hints[each.name])]


def table_class(name: str) -> type:
    """The config class of one of these tables."""
    found: type = get_type_hints(Recipe)[name]
    return found


def networks() -> str:
    """The keys of every registered network."""
    return sections(NETWORKS, "architecture", "network.")


def objectives() -> str:
    """The keys of every registered objective."""
    return sections(OBJECTIVES, "objective", "loss.")


def sections(registered: Mapping[str, str], key: str, prefix: str) -> str:
    """A section for each class; keys inherited from another entry's config class are not repeated."""
    names: dict[str, list[str]] = {}
    for name, path in registered.items():
        names.setdefault(path, []).append(name)
    seen: dict[type, str] = {}
    parts = []
    for path, several in names.items():
        cls = resolve(registered, several[0])
        config_class = cls.config_class
        title = ", ".join(f"`{name}`" for name in several)
        parts += [f"### {key} {title}", summary(path, names)]
        base = next((each for each in config_class.__mro__ if each in seen), None)
        changed = keys_of(config_class, prefix=prefix, than=base)
        if base:
            known = {each.name for each in dataclasses.fields(config_class)}
            gone = [f"`{prefix}{each.name}`" for each in dataclasses.fields(base) if each.name not in known]
            without = f" without {', '.join(gone)}" if gone else ""
            parts.append(f"The keys of `{seen[base]}`{without}{', and:' if changed else '.'}")
        parts += [changed] if changed else []
        seen.setdefault(config_class, several[0])
    return "\n\n".join(parts)


def summary(path: str, paths: Collection[str]) -> str:
    """The first paragraph of a module if only this class of it is registered, else that of the class."""
    module, _, name = path.partition(":")
    described: Any = import_module(module)
    if sum(each.partition(":")[0] == module for each in paths) > 1:
        described = getattr(described, name)
    return " ".join((inspect.getdoc(described) or "").split("\n\n")[0].split())


def keys_of(cls: type, *, prefix: str, than: type | None = None) -> str:
    """The table of a config class; with `than`, only what differs from that class."""
    fields = [
        each for each in dataclasses.fields(cls) if is_key(each) and (not than or differs(each, cls, than))
    ]
    return table(HEAD, [row(cls, each, prefix) for each in fields]) if fields else ""


def is_key(field: Any) -> bool:
    """Whether a recipe can set this field; those without a default are set from the tokenizer."""
    missing = dataclasses.MISSING
    return field.init and not (field.default is missing and field.default_factory is missing)


def differs(field: Any, cls: type, than: type) -> bool:
    """Whether a field is new in `cls`, or has another type or default than in `than`."""
    known = {each.name: each for each in dataclasses.fields(than)}.get(field.name)
    types_of = [get_type_hints(each).get(field.name) for each in (cls, than)]
    return known is None or types_of[0] != types_of[1] or field.default != known.default


def row(cls: type, field: Any, prefix: str = "") -> tuple[str, ...]:
    """One key."""
    return (
        f"`{prefix}{field.name}`",
        values(get_type_hints(cls)[field.name]),
        default(field),
        comments(cls).get(field.name, ""),
    )


def values(hint: Any) -> str:
    """What may be written, in the words of TOML."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{toml(each)}`" for each in args)
    if origin in (Union, types.UnionType):
        return " or ".join(values(each) for each in args if each is not type(None))
    if origin in (tuple, list):
        return f"list of {values(args[0])}"
    names = {bool: "`true`, `false`", int: "integer", float: "number", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def default(field: Any) -> str:
    """The default as TOML has it."""
    if field.default is not dataclasses.MISSING:
        return f"`{toml(field.default)}`" if field.default is not None else ""
    return ""


def toml(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else f"{value}"


def comments(cls: type) -> dict[str, str]:
    """The comment beside each field of a dataclass, its bases included; else the comment lines above it."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if dataclasses.is_dataclass(each):
            found |= {name: text for name, text in own_comments(each).items() if text or name not in found}
    return found


def own_comments(cls: type) -> dict[str, str]:
    """The comments of the fields that a class itself defines."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # a class that was made while running
        return {}
    lines = source.splitlines()
    comment = {
        token.start[0]: IGNORED.sub("", token.string).lstrip("# ").rstrip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        texts = [comment[line] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in comment]
        if not texts:
            above = node.lineno - 1
            while above in comment and lines[above - 1].lstrip().startswith("#"):
                texts.insert(0, comment[above])
                above -= 1
        found[node.target.id] = re.sub(r"\s+", " ", " ".join(texts))
    return found


def fields_without_meaning() -> list[str]:
    """The keys that no comment explains."""
    classes = {Recipe, *map(table_class, tables())}
    for registered in (NETWORKS, OBJECTIVES):
        classes |= {resolve(registered, name).config_class for name in registered}
    return sorted(
        f"{cls.__module__}.{cls.__name__}.{each.name}"
        for cls in classes
        for each in dataclasses.fields(cls)
        if is_key(each) and not comments(cls).get(each.name) and not (cls is Recipe and is_table(each))
    )


if __name__ == "__main__":
    print("\n".join(fields_without_meaning()), file=sys.stderr)
