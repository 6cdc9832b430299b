"""Trees of plain values, as JSON and TOML files have them, parsed within limits.

A file may be damaged, or written by somebody who wants to do harm. So its size, its depth and its numbers are
limited, and every way in which it can be wrong is a TreeError with the reason in words. What the values have
to be is checked by `trmt.config.build`.

A tree can carry a checksum of its values. Bytes that do not change a value, such as white space, are not part
of it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import tomllib
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

MAX_BYTES = 256 << 20  # of a file
_PIECE = 1 << 20  # bytes read at a time
MAX_DEPTH = 32  # of tables and lists in each other
MAX_INT = 2**63 - 1  # and its negative are the largest numbers
MAX_SHOWN = 80  # characters of a value in a message
_DIGITS = "Exceeds the limit"  # of digits, in an error of Python
CHECKSUM = "checksum"  # the key of a tree's own checksum


class TreeError(ValueError):
    """A file that is not a tree within the limits; its message continues a sentence: "is not valid JSON"."""


class LimitError(TreeError):
    """A tree that is too large in some way; whatever else it might be, it cannot be used."""


class AlteredTree(TreeError):
    """A tree whose values are not those that its checksum was made of."""


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """The values of a JSON file."""
    return parse_json(read_bytes(path, max_bytes=max_bytes))


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a file that has no more than `max_bytes`."""
    if "\0" in str(path):  # for which Python raises a ValueError
        raise FileNotFoundError(errno.ENOENT, "no file has such a name", str(path))
    with path.open("rb") as stream:
        # By pieces: Python would reserve memory for all that it is allowed to read.
        pieces = iter(lambda: stream.read(_PIECE), b"")
        raw = b"".join(islice(pieces, max_bytes // _PIECE + 1))
    if len(raw) > max_bytes:
        raise TreeError(f"has more than {max_bytes:,} bytes, which is the limit")
    return raw


def parse_json(raw: bytes | str) -> Any:
    """The values of JSON."""
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError) as error:  # Unicode errors are ValueErrors
        raise _kind(error)(f"is not valid JSON ({_reason(error)})") from error
    check_limits(tree)
    return tree


def parse_toml(text: str) -> dict[str, Any]:
    """The tables and values of TOML."""
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise _kind(error)(f"is not valid TOML: {_reason(error)}") from error
    check_limits(tree)
    return tree


def _kind(error: Exception) -> type[TreeError]:
    """Whether what cannot be parsed is beyond a limit of the parser."""
    return LimitError if isinstance(error, RecursionError) or _DIGITS in str(error) else TreeError


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "tables and lists are nested too deeply"
    if _DIGITS in str(error):  # Python's message continues with advice for programmers
        return "a number has too many digits"
    return " ".join(str(error).split())


def check_limits(tree: Any) -> None:
    """Raise a LimitError for a tree that is too deep, or has a number or a string that cannot be used."""
    level, depth = [tree], 0
    while level:
        if depth > MAX_DEPTH:
            raise LimitError(f"has tables and lists nested more than {MAX_DEPTH} deep, which is the limit")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                for key in value:
                    _check_text(key)
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                _check_text(value)
            elif isinstance(value, int) and abs(value) > MAX_INT:
                raise LimitError("has an integer of more than 64 bits")
        level, depth = below, depth + 1


def _check_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise LimitError("has text with half of a surrogate pair") from error


def shown(value: Any) -> str:
    """A value in a message, which is shortened if it is long."""
    if isinstance(value, int) and abs(value) > MAX_INT:
        return "an integer of more than 64 bits"
    text = repr(value) if not isinstance(value, str) or len(value) <= MAX_SHOWN else repr(value[:MAX_SHOWN])
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


# Checksums


def tree_checksum(tree: Mapping[str, Any]) -> str:
    """The SHA-256 of the values of a tree, as hex digits."""
    plain = json.loads(json.dumps(tree))  # as it is read back: tuples are lists, and keys strings
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def with_checksum(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with its checksum, for `verified`."""
    values = without_checksum(tree)
    return {**values, CHECKSUM: tree_checksum(values)}


def without_checksum(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree without a checksum."""
    return {key: value for key, value in tree.items() if key != CHECKSUM}


def verified(tree: Any, *, required: bool = False) -> dict[str, Any]:
    """The tree without its checksum, which has to be that of its values; older files may have none."""
    if not isinstance(tree, dict):
        raise TreeError("does not hold a JSON object")
    values = without_checksum(tree)
    if (required or CHECKSUM in tree) and tree.get(CHECKSUM) != tree_checksum(values):
        raise AlteredTree("is not as it was written: its checksum differs")
    return values
