"""Recipes: TOML files and `--set key=value` as dataclasses, which are defined beside the code they configure.

An unknown key or a value of the wrong type is an error that names the key and the closest known one.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from trmt.errors import ConfigError
from trmt.registry import suggestion

T = TypeVar("T")
Tree = dict[str, Any]

# Old keys of a config class and their present names: recipes, run folders and bundles may still have them.
RENAMED_KEYS: Mapping[str, Mapping[str, str]] = {
    "BatchConfig": {"passage": "passage_tokens"},
}


def read_toml(path: Path) -> Tree:
    """The tables and values of a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no recipe {path}; check the path") from error
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}; check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; correct it") from error


def parse_value(text: str) -> Any:
    """The TOML value of `text`; text that is no TOML value is a string (`--set network.norm=post`)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def apply_settings(tree: Tree, settings: list[str]) -> Tree:
    """A copy of `tree` with each dotted `key=value` set."""
    changed = copy.deepcopy(tree)
    for setting in settings:
        dotted, equals, text = setting.partition("=")
        if not equals or not dotted.strip():
            raise ConfigError(f"--set takes key=value, not {setting!r}; for example --set optim.lr=5e-4")
        *parents, leaf = dotted.strip().split(".")
        table = changed
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {setting}: {parent!r} is a value, not a table")
        table[leaf] = parse_value(text.strip())
    return changed


def merge(base: Tree, override: Tree) -> Tree:
    """`base` with the entries of `override`, table by table."""
    out = dict(base)
    for key, value in override.items():
        known = out.get(key)
        out[key] = merge(known, value) if isinstance(value, dict) and isinstance(known, dict) else value
    return out


def rename_keys(cls: type, tree: Tree) -> Tree:
    """`tree` with the present names for old keys of the config class `cls`; of both, the later wins."""
    renamed: dict[str, str] = {}
    for each in cls.__mro__:
        renamed |= RENAMED_KEYS.get(each.__name__, {})
    return {renamed.get(key, key): value for key, value in tree.items()}


def build(cls: type[T], tree: Tree, *, where: str) -> T:
    """An instance of the dataclass `cls` from a tree; error messages name the source as `where`."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    values = {}
    for key, value in rename_keys(cls, tree).items():
        if key not in fields:
            raise ConfigError(f"{where} has an unknown key {key!r}; {suggestion(key, list(fields))}")
        values[key] = _convert(hints[key], value, where=f"{where}.{key}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where} needs a value for {name!r}; set it in the recipe or with --set")
    return cls(**values)


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    """`value` converted to the annotated type `hint`, or an error with the expected type."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is a table, not {value!r}")
        return build(hint, value, where=where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} = {value!r}: choose one of {', '.join(map(repr, args))}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, where=where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is a list, not {value!r}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ConfigError(f"{where} = {value!r}: expected {len(args)} values")
        return tuple(_convert(args[0], item, where=where) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is a table, not {value!r}")
        return {key: _convert(args[1], item, where=f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} = {value!r}: expected a value of type {hint.__name__}")
    return value


def to_tree(instance: Any) -> Tree:
    """The tree from which `build` makes this dataclass; fields that are None are left out."""
    return {
        field.name: to_tree(value) if dataclasses.is_dataclass(value) else _plain(value)
        for field in dataclasses.fields(instance)
        if (value := getattr(instance, field.name)) is not None and field.init
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def to_toml(tree: Tree) -> str:
    """A tree of scalars, lists and tables as TOML text that `read_toml` reads back."""
    lines = [
        f"{_key(key)} = {toml_value(value)}" for key, value in tree.items() if not isinstance(value, dict)
    ]
    for key, value in tree.items():
        if isinstance(value, dict):
            lines += _table(_key(key), value)
    return "\n".join(lines) + "\n"


def _table(name: str, tree: Tree) -> list[str]:
    lines = ["", f"[{name}]"]
    lines += [
        f"{_key(key)} = {toml_value(value)}" for key, value in tree.items() if not isinstance(value, dict)
    ]
    for key, value in tree.items():
        if isinstance(value, dict):
            lines += _table(f"{name}.{_key(key)}", value)
    return lines


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quoted(key)


def _quoted(text: str) -> str:
    # JSON's escapes are valid in TOML, but JSON does not escape DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_value(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return repr(value)
