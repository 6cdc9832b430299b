"""Whether a prepared set is still the one that a run was begun with, file by file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trmt.sets.shards import INDEX, PreparedSet
from trmt.storage.files import write_json

RECORD = "data.json"  # in a run folder: what the index of its prepared set said at the beginning


def remember(run: Path, data: PreparedSet) -> None:
    """Keep what the index says beside the run."""
    write_json(run / RECORD, data.index)


def difference(run: Path, data: Path) -> str:
    """What in the folder `data` is not as it was when `run` was begun, as the tail of a sentence."""
    try:
        before = json.loads((run / RECORD).read_bytes())
        now = json.loads((data / INDEX).read_bytes())
        files = _changed(before["files"], now["files"])
        parts = _changed(before, now)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # of a run without a record
        return ""
    if files:
        more = f" and {len(files) - 1:,} other files differ" if len(files) > 1 else " differs"
        return f": {data / files[0]}{more}"
    return f": {data / INDEX} differs in {', '.join(map(repr, parts))}" if parts else ""


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
