"""A dev set from the training pairs, for corpora without one.

Two pairs are connected if they have an equal source or an equal target. Connected components stay on one
side, so that no sentence of the dev set is in the training set. Components are taken in the order of a keyed
hash of their pairs, which depends on their texts alone: neither the order of the input nor the number of
workers changes the choice.

Hashes of all pairs are written to a file, 16 bytes a pair. In memory are only the components of candidates,
the pairs with the smallest hashes: the file is read until these components grow no more. A component that
becomes too large is given up, so memory does not grow with the corpus.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trmt import console
from trmt.errors import ConfigError
from trmt.sets.encoding import BLOCK_PAIRS, BlockEncoder, TextBlock
from trmt.text.corpus import Corpus, TextPair, is_stream
from trmt.text.filters import KEPT, LengthLimits
from trmt.text.pairs import DEFAULT_COLUMNS, count_pairs, read_corpus
from trmt.text.tokenizer import Tokenizer

MIN_PAIRS = 100  # below, no dev set is taken
DEFAULT_SIZE, DEFAULT_SHARE = 500, 20  # pairs of the dev set: the smaller of 500 and a twentieth
NAME = "taken from train"  # of the corpus

KEY = b"trmt dev split"
HASHES = np.dtype([("source", "<u8"), ("target", "<u8")])
CHUNK = 1 << 20  # hashes in memory while the file is read
CANDIDATES = 4  # for each pair that is wanted, at first
MAX_CANDIDATES = 1 << 17  # after so many, a smaller dev set is taken
MANY_PAIRS = 1 << 18  # in memory, above which components that are too large already are given up
MAX_ROUNDS = 64  # readings of the file, after which components that still grow are given up

Hashes = NDArray[Any]  # of dtype HASHES


def default_size(pairs: int) -> int:
    """The size of the dev set that is taken from so many pairs if none is named."""
    return min(DEFAULT_SIZE, pairs // DEFAULT_SHARE)


def take_dev_set(
    corpora: Sequence[Corpus], tokenizer: Tokenizer, limits: LengthLimits, *, size: int | None, work: Path
) -> tuple[tuple[Corpus, ...], Corpus | None]:
    """The corpora to train on, and the dev set to drop from them; None if there is none.

    `size` None is the default size. The dev set is a file in `work`, and so are corpora that can be read only
    once.
    """
    corpora, hashes = _write_hashes(corpora, tokenizer, work)
    wanted = default_size(len(hashes)) if size is None else size
    if len(hashes) < MIN_PAIRS:
        console.warn(
            f"{len(hashes)} pairs are too few to take a dev set from, {MIN_PAIRS} are needed; training "
            "cannot validate without --dev"
        )
        return corpora, None
    if 2 * wanted > len(hashes):
        raise ConfigError(f"--dev-size {size} is more than half of the {len(hashes):,} pairs; choose fewer")
    pairs = list(_texts(corpora, tokenizer, hashes, choose(hashes, wanted)))
    pairs = _without_dropped(pairs, tokenizer, limits)
    if not pairs:
        console.warn(
            "no dev set can be taken, too many pairs have the same source or target; training cannot "
            "validate without --dev"
        )
        return corpora, None
    console.say(
        f"dev set: {len(pairs):,} of {len(hashes):,} training pairs (--dev-size); pairs with the same source "
        "or target stay together"
    )
    path = work / "dev.jsonl"
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(map(_json_line, pairs))
    return corpora, _spooled(corpora[0], path, name=NAME, weight=1.0)


def _without_dropped(pairs: Sequence[TextPair], tokenizer: Tokenizer, limits: LengthLimits) -> list[TextPair]:
    """The pairs that the length filters keep; they would drop the others from the training pairs, too."""
    if not pairs:
        return []
    sources, targets = map(list, zip(*pairs, strict=True))
    dropped_by = BlockEncoder(tokenizer, limits)(TextBlock(0, sources, targets)).dropped_by
    return [pair for pair, filter in zip(pairs, dropped_by.tolist(), strict=True) if filter == KEPT]


# Reading: hashes of all pairs with text, and copies of streams


def _write_hashes(
    corpora: Sequence[Corpus], tokenizer: Tokenizer, work: Path
) -> tuple[tuple[Corpus, ...], Hashes]:
    path = work / "hashes"
    readable: list[Corpus] = []
    sizes = [count_pairs(corpus) for corpus in corpora]
    total = None if None in sizes else sum(filter(None, sizes))
    with (
        path.open("wb") as hash_file,
        console.progress("choosing a dev set", total, unit="pairs") as progress,
        ExitStack() as stack,
    ):
        for number, corpus in enumerate(corpora):
            copy = work / f"corpus-{number}.jsonl" if _reads_once(corpus) else None
            copy_file = stack.enter_context(copy.open("w", encoding="utf-8")) if copy else None
            for block in _blocks(corpus):
                hash_file.write(_hashes_of(block, tokenizer).tobytes())
                if copy_file:
                    copy_file.writelines(map(_json_line, block))
                progress.advance(len(block))
            readable.append(_spooled(corpus, copy) if copy else corpus)
    found = np.memmap(path, HASHES, "r") if path.stat().st_size else np.zeros(0, HASHES)
    return tuple(readable), found


def _blocks(corpus: Corpus) -> Iterator[list[TextPair]]:
    pairs = read_corpus(corpus)
    while block := list(islice(pairs, BLOCK_PAIRS)):
        yield block


def _reads_once(corpus: Corpus) -> bool:
    """Whether a corpus can be read only once, or is sent over the network each time."""
    if corpus.format == "dataset":
        return not Path(corpus.paths[0]).is_dir()
    return any(map(is_stream, corpus.paths))


def _spooled(corpus: Corpus, path: Path, **changes: Any) -> Corpus:
    """The corpus read from a file of pairs."""
    return replace(corpus, format="jsonl", paths=(str(path),), columns=DEFAULT_COLUMNS, cells=None, **changes)


def _json_line(pair: TextPair) -> str:
    return json.dumps(dict(zip(DEFAULT_COLUMNS, pair, strict=True)), ensure_ascii=False) + "\n"


def _normalised(pairs: Sequence[TextPair], tokenizer: Tokenizer) -> Iterator[tuple[str, str, TextPair]]:
    """Normalised source and target of the pairs with text on both sides, and the pair."""
    for pair in pairs:
        source, target = tokenizer.source.normalise(pair[0]), tokenizer.target.normalise(pair[1])
        if source and target:
            yield source, target, pair


def _hashes_of(pairs: Sequence[TextPair], tokenizer: Tokenizer) -> Hashes:
    """64-bit hashes of source and target of each pair with text; see `pair_hashes` for collisions."""
    digests = (
        blake2b(text.encode(), digest_size=8, key=KEY).digest()
        for source, target, _ in _normalised(pairs, tokenizer)
        for text in (source, target)
    )
    return np.frombuffer(b"".join(digests), HASHES)


def _texts(
    corpora: Sequence[Corpus], tokenizer: Tokenizer, hashes: Hashes, chosen: Hashes
) -> Iterator[TextPair]:
    """The texts of the chosen pairs, in their order; of different spellings of one text, the smallest."""
    found: dict[bytes, TextPair] = {}
    begin = 0
    for corpus in corpora if len(chosen) else ():
        for block in _blocks(corpus):
            pairs = [pair for *_, pair in _normalised(block, tokenizer)]
            part = np.asarray(hashes[begin : begin + len(pairs)])
            begin += len(pairs)
            for number in np.flatnonzero(np.isin(part["source"], chosen["source"])).tolist():
                key = part[number].tobytes()
                found[key] = min(found.get(key, pairs[number]), pairs[number])
    for each in chosen:
        yield found[each.tobytes()]


# Choosing


def choose(hashes: Hashes, wanted: int, *, candidates: int = CANDIDATES) -> Hashes:
    """At most `wanted` distinct pairs, whole components; those with the lowest ranks come first."""
    limit = min(wanted, max(10, wanted // 10))  # of one component: a dev set needs many different sentences
    count = candidates * wanted
    while True:
        pairs, components = _components(hashes, _lowest(hashes, count), limit)
        chosen = _fill(pairs, components, wanted)
        if len(chosen) == wanted or count >= min(len(hashes), MAX_CANDIDATES):
            return chosen
        count *= 8


def _fill(pairs: Hashes, components: NDArray[np.int64], wanted: int) -> Hashes:
    """The components that fit, in the order of their pairs; pairs are sorted by their ranks."""
    names, first, sizes = np.unique(components, return_index=True, return_counts=True)
    taken: list[int] = []
    left = wanted
    for at in np.argsort(first).tolist():
        if sizes[at] <= left:
            taken.append(int(names[at]))
            left -= int(sizes[at])
    return pairs[np.isin(components, taken)]


def _ranks(pairs: Hashes) -> NDArray[np.uint64]:
    """A hash of each pair."""
    mixed: NDArray[np.uint64] = pairs["source"] * np.uint64(0x9E3779B97F4A7C15) ^ pairs["target"]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _chunks(hashes: Hashes) -> Iterator[Hashes]:
    for begin in range(0, len(hashes), CHUNK):
        yield np.asarray(hashes[begin : begin + CHUNK])


def _lowest(hashes: Hashes, count: int) -> Hashes:
    """The distinct pairs with the lowest ranks."""
    best = np.zeros(0, HASHES)
    for chunk in _chunks(hashes):
        if len(best) == count:
            chunk = chunk[_ranks(chunk) < _ranks(best[-1:])]
        best = _distinct(np.concatenate([best, chunk]))[:count]
    return best


def _distinct(pairs: Hashes) -> Hashes:
    """The distinct pairs in the order of their ranks."""
    _, first = np.unique(_ranks(pairs), return_index=True)
    return pairs[first]


def _components(hashes: Hashes, seeds: Hashes, limit: int) -> tuple[Hashes, NDArray[np.int64]]:
    """The distinct pairs of the components of the seeds, but those above `limit`; and their components."""
    known = seeds
    for _ in range(MAX_ROUNDS):
        pairs = _connected_to(hashes, known, limit)
        components = _connect(pairs)
        grew = np.bincount(components, weights=~np.isin(_ranks(pairs), _ranks(known))) > 0
        small = np.bincount(components)[components] <= limit
        if not grew[components[small]].any():
            return pairs[small], components[small]
        known = pairs[small]
    settled = small & ~grew[components]
    return pairs[settled], components[settled]


def _connected_to(hashes: Hashes, known: Hashes, limit: int) -> Hashes:
    """The distinct pairs with a source or a target of the known ones, in the order of their ranks.

    Components above `limit` may be missing.
    """
    found = known
    for chunk in _chunks(hashes):
        sources, targets = np.unique(known["source"]), np.unique(known["target"])
        wanted = _is_in(chunk["source"], sources) | _is_in(chunk["target"], targets)
        found = _distinct(np.concatenate([found, chunk[wanted]]))
        if len(found) > MANY_PAIRS:
            components = _connect(found)
            found = found[np.bincount(components)[components] <= limit]
            known = known[np.isin(_ranks(known), _ranks(found))]
    return found


def _is_in(values: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which values are among the known ones, which are sorted."""
    if not len(known):
        return np.zeros(len(values), np.bool_)
    at = np.minimum(np.searchsorted(known, values), len(known) - 1)
    result: NDArray[np.bool_] = known[at] == values
    return result


def _connect(pairs: Hashes) -> NDArray[np.int64]:
    """The component of each pair: the number of one of its pairs (union-find on arrays)."""
    _, source = np.unique(pairs["source"], return_inverse=True)
    _, target = np.unique(pairs["target"], return_inverse=True)
    components = np.arange(len(pairs))
    while True:
        before = components
        for group in (source, target):
            lowest = np.full(len(pairs), len(pairs))
            np.minimum.at(lowest, group, components)
            components = lowest[group]
        components = components[components]
        if np.array_equal(before, components):
            return components
