"""Lexicons: for each source piece the target pieces that it may become, as a file in a bundle.

A translation that is searched for with a lexicon holds only what its source suggests, and what every
sentence may need: the first ids up to the end of sentence, bytes, and the most frequent pieces.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from trmt.errors import BundleError
from trmt.files import atomic_file, checksum

FILE = "shortlist.safetensors"
FORMAT = 1
HEAD = "lexicon"  # the entry of the metadata
ADVICE = "make it again with trmt shortlist"

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Lexicon:
    """For each source id its target ids, the most probable first, one source id after the other."""

    begins: Ids  # where those of each source id begin, and where the last ones end
    targets: Ids
    always: Ids  # in every list, ascending
    room: int  # ids that a list has at most beside these
    vocabulary: int  # of the target

    @property
    def width(self) -> int:
        """Ids that a list has at most."""
        return min(self.vocabulary, len(self.always) + self.room)

    @cached_property
    def _is_always(self) -> NDArray[np.bool_]:
        found = np.zeros(self.vocabulary, np.bool_)
        found[self.always] = True
        return found

    def suggested(self, source: int) -> Ids:
        """What a source id may become, the most probable first."""
        return self.targets[self.begins[source] : self.begins[source + 1]]

    def listed(self, source: Sequence[int], prefix: Sequence[int] = ()) -> Ids:
        """The ids that a translation of `source` may hold, ascending; those of `prefix` are among them.

        Where there is no room for all, the best of each source id come first.
        """
        parts = [self.suggested(token) for token in sorted(set(source))]
        rank = np.concatenate([np.arange(len(part)) for part in parts])
        suggested = np.concatenate(parts)[np.argsort(rank, kind="stable")]
        wanted = np.concatenate([np.array(prefix, np.int64), suggested])
        wanted = wanted[~self._is_always[wanted]]
        _, first = np.unique(wanted, return_index=True)
        chosen = wanted[np.sort(first)[: self.room]]
        return np.sort(np.concatenate([self.always, chosen]))


def write(path: Path, lexicon: Lexicon, *, tokenizer: str) -> dict[str, Any]:
    """Write a lexicon for bundles with this tokenizer; what a manifest has to say of the file."""
    tensors = {
        name: torch.from_numpy(getattr(lexicon, name).astype(np.int32))
        for name in ("begins", "targets", "always")
    }
    head = {"format": FORMAT, "tokenizer": tokenizer, "room": lexicon.room, "vocabulary": lexicon.vocabulary}
    metadata = {HEAD: json.dumps(head)}  # one entry, since safetensors writes several in any order
    with atomic_file(path) as stream:
        stream.write(save(tensors, metadata=metadata))
    return {"bytes": path.stat().st_size, "sha256": checksum(path)}


def read(path: Path, *, sha256: str, tokenizer: str, sizes: tuple[int, int]) -> Lexicon:
    """The lexicon in a file that `write` wrote for bundles with this tokenizer.

    `sizes` are those of the vocabularies.
    """
    try:
        if checksum(path) != sha256:
            raise BundleError(f"{path} is not as it was written: its checksum differs; {ADVICE}")
        with safe_open(path, framework="pt") as stream:
            head = json.loads((stream.metadata() or {})[HEAD])
            tensors = {
                name: stream.get_tensor(name).numpy().astype(np.int64)
                for name in ("begins", "targets", "always")
            }
        if head["format"] != FORMAT or head["tokenizer"] != tokenizer:
            raise BundleError(f"{path} was made for another tokenizer; {ADVICE}")
        lexicon = Lexicon(**tensors, room=int(head["room"]), vocabulary=int(head["vocabulary"]))
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}; {ADVICE}") from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is damaged: {error}; {ADVICE}") from error
    if not _fits(lexicon, sizes):
        raise BundleError(f"{path} does not fit the vocabularies of its bundle; {ADVICE}")
    return lexicon


def _fits(lexicon: Lexicon, sizes: tuple[int, int]) -> bool:
    source, target = sizes
    begins, targets, always = lexicon.begins, lexicon.targets, lexicon.always
    return bool(
        all(each.ndim == 1 and len(each) for each in (begins, always))
        and targets.ndim == 1
        and len(begins) == source + 1
        and begins[0] == 0
        and begins[-1] == len(targets)
        and (np.diff(begins) >= 0).all()
        and (np.diff(always) > 0).all()
        and lexicon.vocabulary == target
        and all(((each >= 0) & (each < target)).all() for each in (targets, always))
        and lexicon.room >= 0
    )
