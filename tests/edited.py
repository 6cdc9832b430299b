"""JSON files of trmt with other values, and with the checksum of these values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trmt.trees import CHECKSUM, with_checksum


def edit(path: Path, **changes: Any) -> None:
    """Change some values of a file; None removes one."""
    tree = json.loads(path.read_bytes()) | changes
    write(path, {key: value for key, value in tree.items() if value is not None})


def write(path: Path, tree: Any) -> None:
    """Write these values, with a checksum if the file has one so far."""
    signed = path.is_file() and CHECKSUM.encode() in path.read_bytes()
    path.write_text(json.dumps(with_checksum(tree) if signed else tree), encoding="utf-8")
