"""Damage for files: values of a JSON tree that are not what they should be, and flipped bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trmt.trees import CHECKSUM, tree_checksum

Keys = tuple[Any, ...]


class Raw(str):
    """JSON as it is written."""


# For every value in turn: other types, huge and negative numbers, strings that are no names, deep nesting.
REPLACEMENTS: Sequence[Any] = (
    *(None, True, 0, -1, 1, 2**31, 2**63 - 1, 10**30, 0.5, float("nan"), float("inf"), 1e308),
    *("", "x" * 300, "\0", "../../x", "\ud800", "\x1b[31m\n", Raw("9" * 4400)),
    *([], {}, [{}], [5], [[]], {"a": 1}, ["a"]),
    *(Raw("[" * 100_000 + "]" * 100_000), Raw("[" * 40 + "]" * 40), Raw('{"a":' * 50 + "1" + "}" * 50)),
)


def mutants(tree: Any) -> Iterator[tuple[Keys, Callable[[], Any]]]:
    """Each value of a tree replaced, removed, or with a further key: where, and what makes the tree."""
    for keys in _places(tree):
        for replacement in REPLACEMENTS:
            yield keys, partial(_changed, tree, keys, replacement)
        if keys:
            yield keys, partial(_changed, tree, keys)
        if isinstance(_at(tree, keys), dict):
            yield keys, partial(_changed, tree, (*keys, "unknown"), [{}])


def _places(tree: Any, keys: Keys = ()) -> Iterator[Keys]:
    yield keys
    below = tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ()
    for key, value in below:
        yield from _places(value, (*keys, key))


def _at(tree: Any, keys: Keys) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def _changed(tree: Any, keys: Keys, *replacement: Any) -> Any:
    if not keys:
        return replacement[0]
    tree = copy.deepcopy(tree)
    parent = _at(tree, keys[:-1])
    if replacement:
        parent[keys[-1]] = replacement[0]
    else:
        del parent[keys[-1]]
    return tree


def as_json(tree: Any, *, signed: bool) -> bytes:
    """A mutant as a file, with the checksum that belongs to it if there can be one."""
    raw: list[str] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Raw):
            raw.append(value)
            return f"@raw{len(raw) - 1}@"
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    found = plain(tree)
    if signed and isinstance(found, dict) and not raw:
        found = {**found, CHECKSUM: tree_checksum(found)}
    text = json.dumps(found)
    for number, value in enumerate(raw):
        text = text.replace(f'"@raw{number}@"', value)
    return text.encode()


def flips(path: Path, count: int, *, seed: int = 1) -> Iterator[bytes]:
    """The bytes of a file with one of them changed, at random places and the first and last."""
    content = path.read_bytes()
    chooser = random.Random(f"{path.name} {seed}")
    places = {0, len(content) - 1, *(chooser.randrange(len(content)) for _ in range(count))}
    for place in sorted(places)[:count]:
        changed = bytearray(content)
        changed[place] ^= chooser.randrange(1, 256)
        yield bytes(changed)
