"""The parts of recipes.md: the fields of the config dataclasses, with the comments beside them."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from generate_commands import table

from trmt.config import read_toml, toml_value
from trmt.registry import NETWORKS, OBJECTIVES, resolve
from trmt.training.recipe import Recipe
from trmt.training.recipe import __file__ as RECIPE_FILE
from trmt.training.recipe import names as recipe_names
from trmt.training.recipe_keys import comments, is_key, is_table, table_class, tables, values

HEAD = ("key", "values", "default", "meaning")


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


def differs(field: Any, cls: type, than: type) -> bool:
    """Whether a field is new in `cls`, or has another type or default than in `than`."""
    known = {each.name: each for each in dataclasses.fields(than)}.get(field.name)
    types_of = [get_type_hints(each).get(field.name) for each in (cls, than)]
    return known is None or types_of[0] != types_of[1] or field.default != known.default


def row(cls: type, field: Any, prefix: str = "") -> tuple[str, ...]:
    """One key."""
    return (
        f"`{prefix}{field.name}`",
        values(get_type_hints(cls)[field.name], mark="`"),
        default(field),
        comments(cls).get(field.name, ""),
    )


def default(field: Any) -> str:
    """The default as TOML has it."""
    if field.default is dataclasses.MISSING or field.default is None:
        return ""
    return f"`{toml_value(field.default)}`"


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
