"""A record of the prepared set in the run folder, and the files that have changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trmt import console
from trmt.errors import ConfigError
from trmt.sets.index import INDEX, check_index
from trmt.sets.shards import DOCUMENTS, PreparedSet
from trmt.storage.files import write_json
from trmt.trees import CHECKSUM, TreeError, read_json, verified

RECORD = "data.json"  # in a run folder: the index of the prepared set when the run was started


def write_record(run: Path, data: PreparedSet) -> None:
    """Store the index of the prepared set in the run folder."""
    write_json(run / RECORD, data.index)


def read_record(run: Path) -> dict[str, Any] | None:
    """The index in the record of a run; None without one, and with a warning if it is damaged."""
    path = run / RECORD
    try:
        tree = read_json(path)
        verified(tree)
        return check_index(tree)
    except FileNotFoundError:
        return None
    except (OSError, TreeError, ConfigError) as error:
        console.warn(f"{path} cannot be used ({error}), so that the data of this run remains unknown")
        return None


def is_of_documents(run: Path) -> bool:
    """Whether the record of a run says that it was pretrained on documents."""
    return (read_record(run) or {}).get("kind") == DOCUMENTS


def describe_changes(run: Path, data: Path) -> str:
    """How the set in the folder `data` differs from the record of `run`, as the end of a sentence."""
    try:
        before, now = read_json(run / RECORD), read_json(data / INDEX)
        files = _changed_keys(before["files"], now["files"])
        keys = _changed_keys(before, now)
    except (OSError, TreeError, KeyError, TypeError, AttributeError):  # a run without a record
        return ""
    if files:
        more = f" and {len(files) - 1:,} other files differ" if len(files) > 1 else " differs"
        return f": {data / files[0]}{more}"
    return f": {data / INDEX} differs in {', '.join(map(repr, keys))}" if keys else ""


def _changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = {*before, *now} - {CHECKSUM}
    return [key for key in sorted(keys) if before.get(key) != now.get(key)]
