"""The keys that a recipe can have: values, defaults and meanings, from the config dataclasses.

The meaning of a key is the comment beside its field.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from trmt.config import toml_value
from trmt.registry import NETWORKS, OBJECTIVES, resolve
from trmt.training.recipe import Recipe

IGNORED = re.compile(r"# *(type: ignore|noqa)\S*")  # comments for programs


@dataclass(frozen=True)
class Key:
    """A key of a recipe."""

    table: str  # the name of its table; empty outside of all tables
    name: str
    hint: Any  # the type of its values
    default: Any  # None if it is not set
    meaning: str

    @property
    def path(self) -> str:
        """The name with that of the table, as `--set` takes it."""
        return f"{self.table}.{self.name}" if self.table else self.name


def recipe_keys(recipe: Recipe) -> dict[str, list[Key]]:
    """All keys of a recipe by table, with the options of its network and its objective."""
    network = resolve(NETWORKS, recipe.architecture).config_class
    loss = resolve(OBJECTIVES, recipe.objective).config_class
    classes = {"network": network, "loss": loss} | {name: table_class(name) for name in tables()}
    order = [each.name for each in dataclasses.fields(Recipe) if is_table(each)]
    outside = [each for each in keys_of(Recipe) if each.name not in order]
    return {"": outside, **{name: keys_of(classes[name], table=name) for name in order}}


def tables() -> list[str]:
    """The names of the tables whose keys are the same for all architectures."""
    hints = get_type_hints(Recipe)
    return [each.name for each in dataclasses.fields(Recipe) if dataclasses.is_dataclass(hints[each.name])]


def table_class(name: str) -> type:
    """The config class of one of these tables."""
    found: type = get_type_hints(Recipe)[name]
    return found


def is_table(field: Any) -> bool:
    """Whether a field of the recipe is a table of its own."""
    return field.default_factory is not dataclasses.MISSING


def keys_of(cls: type, *, table: str = "") -> list[Key]:
    """The keys of a config class."""
    hints, meanings = get_type_hints(cls), comments(cls)
    return [
        Key(
            table,
            each.name,
            hints[each.name],
            None if each.default is dataclasses.MISSING else each.default,
            meanings.get(each.name, ""),
        )
        for each in dataclasses.fields(cls)
        if is_key(each)
    ]


def is_key(field: Any) -> bool:
    """Whether a recipe can set this field; those without a default are set from the tokenizer."""
    missing = dataclasses.MISSING
    return field.init and not (field.default is missing and field.default_factory is missing)


def values(hint: Any, *, mark: str = "") -> str:
    """What may be written, in the words of TOML; literal text is between two of `mark`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"{mark}{toml_value(each)}{mark}" for each in args)
    if origin in (Union, types.UnionType):
        return " or ".join(values(each, mark=mark) for each in args if each is not type(None))
    if origin in (tuple, list):
        return f"list of {values(args[0], mark=mark)}"
    names = {bool: f"{mark}true{mark}, {mark}false{mark}", int: "integer", float: "number", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def comments(cls: type) -> dict[str, str]:
    """The comment beside each field of a dataclass, its bases included; else the comment lines above it."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if dataclasses.is_dataclass(each):
            found |= {name: text for name, text in _own_comments(each).items() if text or name not in found}
    return found


def _own_comments(cls: type) -> dict[str, str]:
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
