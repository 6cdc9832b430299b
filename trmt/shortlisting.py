"""Shortlists: a lexicon for a bundle, made from the pairs it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trmt import console
from trmt.alignment import aligning
from trmt.errors import ConfigError, DataError
from trmt.saved import bundles, checkpoints, lexicon
from trmt.saved.bundles import Manifest
from trmt.saved.lexicon import Lexicon
from trmt.sets.shards import PreparedSet, Split
from trmt.text.tokenizer import Side, Tokenizer

DATA = Path("data")
CELLS = 1 << 25  # of the sample that is aligned; memory is about 60 bytes for each
BLOCK = 1 << 16  # pairs counted together
ITERATIONS = 5
LEAST = 1e-4  # probability of a translation


@dataclass(frozen=True, kw_only=True)
class ShortlistOptions:
    """What `trmt shortlist` takes."""

    model: Path | None = None  # None: the default one
    data: Path | None = None  # None: the set that it was trained on, in data/
    best: int = 100  # target pieces of a source piece, at most
    frequent: int = 300  # target pieces that are in every list
    room: int = 1500  # pieces of a list beside these, at most

    def __post_init__(self) -> None:
        if self.best < 1 or self.frequent < 0 or self.room < 1:
            raise ConfigError("--best and --room take a number of at least 1, --frequent of at least 0")


@dataclass(frozen=True)
class Shortlisted:
    """What came of it."""

    folder: Path
    pairs: int  # that were aligned
    of: int  # that there are
    entries: int
    bytes: int


def shortlist(options: ShortlistOptions) -> Shortlisted:
    """Put a lexicon into a bundle, in the place of the one it may have."""
    folder = checkpoints.find_bundle(options.model) if options.model else checkpoints.default_bundle()
    manifest = bundles.read_manifest(folder)
    data = _data(options.data, manifest, folder)
    tokenizer = Tokenizer.load(folder / bundles.TOKENIZER)
    split = data.split("train")
    made, pairs = make(split, tokenizer, options)
    entry = lexicon.write(folder / lexicon.FILE, made, tokenizer=tokenizer.fingerprint)
    told = {"best": options.best, "frequent": options.frequent, "pairs": pairs, "data": data.fingerprint}
    bundles.rewrite_manifest(folder, shortlist={**entry, **told})
    found = Shortlisted(folder, pairs, len(split), len(made.targets), entry["bytes"])
    console.say(
        f"{found.entries:,} translations of pieces from {pairs:,} of {len(split):,} pairs, "
        f"{len(made.always):,} pieces in every list -> {folder / lexicon.FILE}"
    )
    return found


def _data(place: Path | None, manifest: Manifest, folder: Path) -> PreparedSet:
    name = manifest.data.get("set")
    if place is None and not name:
        raise ConfigError(f"{folder} does not say what it was trained on; name a prepared set with --data")
    data = PreparedSet.open(place or DATA / str(name))
    if data.index["tokenizer"] != manifest.tokenizer:
        raise DataError(
            f"{data.folder} was prepared with another tokenizer than that of {folder}; "
            f"prepare it with --tokenizer {folder / bundles.TOKENIZER}"
        )
    if manifest.data.get("fingerprint") not in (None, data.fingerprint):
        console.warn(f"{data.folder} is not what {folder} was trained on; what it lacks cannot be listed")
    return data


def make(split: Split, tokenizer: Tokenizer, options: ShortlistOptions) -> tuple[Lexicon, int]:
    """The lexicon of these pairs, and how many of them were aligned."""
    source, target = tokenizer.source, tokenizer.target
    sizes = source.vocabulary, target.vocabulary
    sample = aligning.sample(split, vocabularies=sizes, most=CELLS)
    found = aligning.model_one(sample, target_vocabulary=sizes[1], iterations=ITERATIONS)
    lists: list[list[int]] = [[] for _ in range(sizes[0])]
    for token, targets in aligning.best(found, count=options.best, least=LEAST):
        if token < sizes[0]:  # which the empty piece is not
            lists[token] = targets.tolist()
    for token, same in _same(source, target):
        # Names and numbers are copied, whether or not the sample has them.
        if same not in lists[token]:
            lists[token] = [same, *lists[token]][: options.best]
    begins = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    targets = np.array([token for each in lists for token in each], np.int64)
    always = _always(target, _counts(split, sizes[1]), options.frequent)
    return Lexicon(begins, targets, always, options.room, sizes[1]), sample.pairs


def _same(source: Side, target: Side) -> list[tuple[int, int]]:
    """Source and target ids of pieces that are spelled alike."""
    numbers = {piece: number for number, piece in enumerate(target.pieces(range(target.vocabulary)))}
    pieces = source.pieces(range(source.vocabulary))
    return [(token, numbers[piece]) for token, piece in enumerate(pieces) if piece in numbers]


def _counts(split: Split, vocabulary: int) -> np.ndarray:
    counts = np.zeros(vocabulary, np.int64)
    for begin in range(0, len(split), BLOCK):
        pairs = np.arange(begin, min(begin + BLOCK, len(split)))
        counts += np.bincount(split.gather("target.ids", pairs)[0], minlength=vocabulary)
    return counts


def _always(target: Side, counts: np.ndarray, frequent: int) -> np.ndarray:
    # With all ids up to it, the end of sentence has the same place in each list as in the vocabulary.
    first = range(target.eos + 1)
    spelled = filter(target.is_byte, range(target.vocabulary))
    most = np.argsort(-counts, kind="stable")[:frequent]
    return np.unique(np.array([*first, target.pad, target.unk, target.bos, *spelled, *most], np.int64))
