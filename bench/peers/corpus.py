"""The common corpus: the pieces of trmt's prepared set as words `p<id>`, so that every toolkit sees the same.

Names instead of the pieces themselves, because some pieces hold characters that other programs take for
white space, normalise, or give a meaning.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trmt.sets.shards import Split


def write(data_set: Path, folder: Path) -> None:
    """Write the splits of `data_set` as text, unless that is done."""
    from trmt.sets.shards import PreparedSet
    from trmt.text.tokenizer import Tokenizer

    data = PreparedSet.open(data_set)
    if not Tokenizer.load(data.tokenizer_folder).joint:
        raise SystemExit(f"{data_set} has a tokenizer for each side; comparing needs one for both")
    stamp = folder / "fingerprint"
    if stamp.is_file() and stamp.read_text(encoding="ascii") == data.fingerprint:
        return
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    for name in data.splits:
        for side in ("source", "target"):
            seen |= _write_side(data.split(name), f"{side}.ids", folder / f"{name}.{side}")
    if "dev" not in data.splits:
        for side in ("source", "target"):
            lines = (folder / f"train.{side}").read_text(encoding="ascii").splitlines(keepends=True)[:100]
            (folder / f"dev.{side}").write_text("".join(lines), encoding="ascii")
    vocabulary = max(int(size) for size in data.index["vocabulary"])
    specials = {0, 1, 2, 3}
    words = [f"p{number}\n" for number in range(vocabulary) if number in seen or number not in specials]
    (folder / "pieces.txt").write_text("".join(words), encoding="ascii")
    stamp.write_text(data.fingerprint, encoding="ascii")


def _write_side(split: Split, column: str, path: Path) -> set[int]:
    import numpy as np

    seen: set[int] = set()
    with path.open("w", encoding="ascii") as file:
        for begin in range(0, len(split), 10_000):
            pairs = np.arange(begin, min(begin + 10_000, len(split)))
            ids, lengths = split.gather(column, pairs)
            seen.update(np.unique(ids).tolist())
            words = [f"p{number}" for number in ids.tolist()]
            at = 0
            for length in lengths.tolist():
                file.write(" ".join(words[at : at + length]) + "\n")
                at += length
    return seen
