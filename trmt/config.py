"""Trees of values as dataclasses: recipes with `--set key=value`, and the JSON files that trmt writes.

The dataclass of a file is its schema, and is defined beside the code that uses it. An unknown key of a recipe
or a value of the wrong type is an error that names the key and the closest known one. Integers have at most
64 bits, and `Within` limits numbers further.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import numbers
import re
import types
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from trmt.errors import BundleError, ConfigError, TrmtError
from trmt.registry import suggestion
from trmt.trees import MAX_INT, MAX_SHOWN, LimitError, TreeError, check_limits, parse_toml, read_bytes, shown

T = TypeVar("T")
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Within:
    """The smallest and the largest value of a number: `Annotated[int, Within(1, 100)]`."""

    low: float
    high: float


Count = Annotated[int, Within(0, 2**53)]  # of steps, tokens, bytes and other things
MAX_LENGTH = 2**31 - 1  # of a sentence in pieces, which also bounds ids
MAX_BEAM = 1000

# Old keys of a config class and their present names: recipes, run folders and bundles may still have them.
RENAMED_KEYS: Mapping[str, Mapping[str, str]] = {
    "BatchConfig": {"passage": "passage_tokens"},
}


# What a value of an annotated type may be, and how that is said
KINDS: Mapping[Any, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "text"),
    Path: (Path, "a path"),
}


class Options:
    """The options of a command: a dataclass that takes strings as paths and lists as tuples.

    A value of another type is an error. So is a single string where a list is wanted: its letters would be
    taken one by one.
    """

    def __post_init__(self) -> None:
        for name, (hint, is_optional) in _field_types(cast(Hashable, type(self))).items():
            value = getattr(self, name)
            taken = value if value is None and is_optional else _taken(hint, value, name=name)
            if taken is not value:
                object.__setattr__(self, name, taken)  # most are frozen


@cache
def _field_types(cls: Any) -> dict[str, tuple[Any, bool]]:
    """The annotation of each field without None, and whether it had that."""
    hints = get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        hint, is_optional = hints[field.name], False
        if get_origin(hint) in (Union, types.UnionType):
            is_optional = type(None) in get_args(hint)
            hint = next((arg for arg in get_args(hint) if arg is not type(None)), hint)
        found[field.name] = hint, is_optional
    return found


def _taken(hint: Any, value: Any, *, name: str) -> Any:
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is str and isinstance(value, Path):
        return str(value)
    if hint in KINDS:
        if not _is_a(hint, value):
            raise ConfigError(f"{name} is {KINDS[hint][1]} and not {shown(value)}")
        return value
    if get_origin(hint) not in (tuple, list, Sequence):
        if isinstance(hint, type):
            check_type(value, hint, name)
        return value
    refuse_string(value, name)
    if not isinstance(value, Iterable):
        raise ConfigError(f"{name} is a list and not {shown(value)}")
    inner = get_args(hint)
    is_fixed = get_origin(hint) is tuple and inner[-1] is not Ellipsis
    items = [_taken(inner[0], each, name=f"{name}[{number}]") for number, each in enumerate(value)]
    if is_fixed and len(items) != len(inner):
        raise ConfigError(f"{name} has {len(inner)} values and not {len(items)}: {shown(value)}")
    return items if get_origin(hint) is list else tuple(items)


def _is_a(hint: type, value: Any) -> bool:
    return isinstance(value, KINDS[hint][0]) and (hint is bool or not isinstance(value, bool))


def check_type(value: Any, wanted: type, name: str) -> None:
    """Raise a ConfigError unless the value is of this type."""
    if not isinstance(value, wanted):
        raise ConfigError(f"{name} is a value of type {wanted.__name__} and not {shown(value)}")


def check_strings(values: Any, name: str) -> None:
    """Raise a ConfigError unless these are several strings."""
    refuse_string(values, name)
    if not isinstance(values, Sequence):
        raise ConfigError(f"{name} is a list of strings and not {shown(values)}")
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise ConfigError(f"{name} is a list of strings, but {name}[{number}] is {shown(value)}")


def refuse_string(value: Any, name: str) -> None:
    """Raise a ConfigError for a single string, or a path, where a list is wanted."""
    if isinstance(value, str | bytes | Path):
        shown = str(value) if isinstance(value, Path) else value
        raise ConfigError(f"{name} is a list and not a single string; write [{shown!r}]")


def read_toml(path: Path) -> Tree:
    """The tables and values of a TOML file."""
    try:
        return parse_toml(read_bytes(path).decode("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no recipe {path}; check the path") from error
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}; check the path") from error
    except TreeError as error:
        raise ConfigError(f"{path} {error}; correct it") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; correct it") from error


def parse_value(text: str) -> Any:
    """The TOML value of `text`; text that is no TOML value is a string (`--set network.norm=post`)."""
    try:
        return parse_toml(f"value = {text}")["value"]
    except LimitError:
        raise
    except TreeError:
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
        try:
            table[leaf] = parse_value(text.strip())
        except LimitError as error:
            raise ConfigError(f"--set {shown(dotted)}: the value {error}; choose another") from error
    return changed


def merge(base: Tree, override: Tree) -> Tree:
    """`base` with the entries of `override`, table by table."""
    out = dict(base)
    for key, value in override.items():
        known = out.get(key)
        out[key] = merge(known, value) if isinstance(value, dict) and isinstance(known, dict) else value
    return out


def select(tree: Tree, dotted: Collection[str]) -> Tree:
    """The values of `tree` with one of these dotted names, as a tree."""
    found: Tree = {}
    for key, value in tree.items():
        below = [name.removeprefix(f"{key}.") for name in dotted if name.startswith(f"{key}.")]
        if below and isinstance(value, dict):
            found[key] = select(value, below)
        elif key in dotted:
            found[key] = value
    return found


def rename_keys(cls: type, tree: Tree) -> Tree:
    """`tree` with the present names for old keys of the config class `cls`; of both, the later wins."""
    renamed: dict[str, str] = {}
    for each in cls.__mro__:
        renamed |= RENAMED_KEYS.get(each.__name__, {})
    return {renamed.get(key, key): value for key, value in tree.items()}


def build(cls: type[T], tree: Tree, *, where: str) -> T:
    """An instance of the dataclass `cls` from a tree; error messages name the source as `where`."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = _hints(cast(Any, cls))
    values = {}
    for key, value in rename_keys(cls, tree).items():
        if key not in fields:
            table = _table_of_recipe(where)
            known = suggestion(key, list(fields), prefix=f"{table}." if table else "")
            raise ConfigError(f"{where} has an unknown key {shown(key)}; {known}")
        values[key] = _convert(hints[key], value, where=f"{where}.{key}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where} needs a value for {name!r}; set it in the recipe or with --set")
    return cls(**values)


def build_stored(
    cls: type[T],
    tree: Any,
    *,
    where: str,
    advice: str,
    error: type[TrmtError] = BundleError,
    exact: bool = False,
) -> T:
    """As `build`, for a file that trmt wrote: `advice` ends its errors; unknown keys are one if `exact`."""
    try:
        check_limits(tree)
        if not isinstance(tree, dict):
            raise ConfigError(f"{where} does not hold a JSON object")
        if not exact:
            known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
            tree = {key: value for key, value in tree.items() if key in known}
        return build(cls, tree, where=where)
    except TreeError as reason:
        raise error(f"{where} {reason}; {advice}") from reason
    except ConfigError as reason:
        what = str(reason).partition(";")[0]  # the rest is advice about recipes
        raise error(f"{what}; {advice}") from reason


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def build_table(hint: type[T], tree: Any, *, where: str) -> T:
    """The table that a TypedDict describes; keys that it does not have stay as they are."""
    return cast(T, _convert(hint, tree, where=where))


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    """`value` converted to the annotated type `hint`, or an error with the expected type."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        return _within(_convert(args[0], value, where=where), args[1], where=where)
    if is_typeddict(hint):
        return _convert_typed_dict(hint, value, where=where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is a table, not {shown(value)}")
        return build(hint, value, where=where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} = {shown(value)}: choose one of {', '.join(map(repr, args))}")
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, where=where)
    if origin in (tuple, list):
        return _convert_sequence(origin, args, value, where=where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is a table, not {shown(value)}")
        return {
            key: _convert(args[1], item, where=f"{where}.{key[:MAX_SHOWN]}") for key, item in value.items()
        }
    if isinstance(value, int) and abs(value) > MAX_INT:
        raise ConfigError(f"{where} = {shown(value)}: choose a smaller number")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        kind = KINDS[hint][1] if hint in KINDS else f"a value of type {hint.__name__}"
        raise ConfigError(f"{where} = {shown(value)}: expected {kind}")
    return value


def _table_of_recipe(where: str) -> str:
    """The dotted name of a recipe's table, as --set has it; of anything else, nothing."""
    found = re.fullmatch(r"recipe\.(\w+(?:\.\w+)*)|(network|loss)", where)
    return found[1] or found[2] if found else ""


def _convert_sequence(kind: type, args: tuple[Any, ...], value: Any, *, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where} is a list, not {shown(value)}")
    if kind is tuple and args[-1] is not Ellipsis and len(value) != len(args):
        raise ConfigError(f"{where} = {shown(value)}: expected {len(args)} values")
    hints = [args[0]] * len(value) if kind is list or args[-1] is Ellipsis else args
    return kind(_convert(hint, item, where=where) for hint, item in zip(hints, value, strict=True))


def _convert_typed_dict(hint: Any, value: Any, *, where: str) -> Tree:
    """A table with the keys of a TypedDict, and maybe others, which stay as they are."""
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is a table, not {shown(value)}")
    hints = _hints(hint)
    for name, each in hints.items():
        if hint.__total__ and get_origin(each) is not NotRequired and name not in value:
            raise ConfigError(f"{where} has no {name!r}")
    return {
        key: _convert(_unwrapped(hints[key]), item, where=f"{where}.{key}") if key in hints else item
        for key, item in value.items()
    }


def _unwrapped(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is NotRequired else hint


def _within(value: Any, limits: Within, *, where: str) -> Any:
    if value is not None and not limits.low <= value <= limits.high:  # a NaN is not within limits
        raise ConfigError(f"{where} = {shown(value)}: choose a number from {limits.low:,} to {limits.high:,}")
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
