"""Blocks of pairs on their way through worker processes: normalised, encoded, judged, and in order again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from trmt.errors import DataError, TrmtError
from trmt.sets.shards import Ragged
from trmt.text.corpus import Corpus, lines, pairs
from trmt.text.filters import KEPT, RULES, Limits, judge, pair_hashes
from trmt.text.links import check_range, parsed
from trmt.text.tokenizer import Tokenizer
from trmt.text.wording import linked_pieces, words_of_pieces

BLOCK_PAIRS = 4096
BLOCK_CHARACTERS = 1 << 21  # a block ends here too, so that memory is bounded whatever the lines are like
AHEAD = 3  # blocks under way for each worker


@dataclass(frozen=True)
class Block:
    """Some pairs of one corpus, as they were read."""

    corpus: int
    sources: list[str]
    targets: list[str]
    links: LinkLines | None = None


@dataclass(frozen=True)
class LinkLines:
    """The lines of links that belong to a block's pairs, as they were read."""

    lines: list[str]
    name: str  # of their file
    first: int  # the number of the first line


@dataclass(frozen=True)
class Encoded:
    """What became of a block: which rule took which pair, and the others in order."""

    corpus: int
    verdicts: NDArray[np.uint8]  # for each pair the number of the rule that took it, or KEPT
    source: Ragged
    target: Ragged
    hashes: NDArray[np.uint64]
    alignment: Ragged | None = None  # source piece, target piece, source piece, ... of each link

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many pairs each rule took, and at last how many were kept."""
        return np.bincount(self.verdicts, minlength=KEPT + 1)


@dataclass(frozen=True)
class Encoder:
    """Turns blocks into ids; it can be pickled."""

    tokenizer: Tokenizer
    limits: Limits
    dev_hashes: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))

    def __call__(self, block: Block) -> Encoded:
        source = _ragged(self.tokenizer.source.encode(block.sources))
        target = _ragged(self.tokenizer.target.encode(block.targets))
        hashes = self.hashes(block.sources, block.targets)
        verdicts = judge(source.lengths, target.lengths, limits=self.limits)
        verdicts[(verdicts == KEPT) & np.isin(hashes, self.dev_hashes)] = RULES.index("in dev set")
        kept = verdicts == KEPT
        sides = source.select(kept), target.select(kept)
        return Encoded(
            corpus=block.corpus,
            verdicts=verdicts,
            source=sides[0],
            target=sides[1],
            hashes=hashes[kept],
            alignment=self._alignment(block, np.flatnonzero(kept), sides) if block.links else None,
        )

    def _alignment(self, block: Block, kept: NDArray[np.int64], sides: tuple[Ragged, Ragged]) -> Ragged:
        """The links of the pieces of these pairs, from those of their words."""
        assert block.links is not None, "only asked for where there are links"
        ids = [np.split(side.values, np.cumsum(side.lengths)[:-1]) for side in sides]
        found: list[list[int]] = []
        for place, source, target in zip(kept.tolist(), *ids, strict=False):
            where = f"{block.links.name}, line {block.links.first + place}"
            pair = block.sources[place], block.targets[place]
            links = parsed(block.links.lines[place], where=where)
            check_range(links, pair, where=where)
            words = (
                words_of_pieces(self.tokenizer.source, pair[0], source.tolist()),
                words_of_pieces(self.tokenizer.target, pair[1], target.tolist()),
            )
            found.append([number for link in linked_pieces(links, *words) for number in link])
        return _ragged(found)

    def hashes(self, sources: Sequence[str], targets: Sequence[str]) -> NDArray[np.uint64]:
        """What tells whether two pairs are the same after normalisation."""
        return pair_hashes(
            [self.tokenizer.source.normalise(text) for text in sources],
            [self.tokenizer.target.normalise(text) for text in targets],
        )


def _ragged(sentences: Sequence[Sequence[int]]) -> Ragged:
    lengths = np.fromiter(map(len, sentences), np.int64, len(sentences))
    values = np.fromiter(chain.from_iterable(sentences), np.uint32, int(lengths.sum()))
    return Ragged(values, lengths)


def blocks(corpora: Iterable[Corpus], alignments: Sequence[str] = ()) -> Iterator[Block]:
    """All pairs of the corpora in order; where blocks end depends on nothing but the pairs.

    `alignments` are files with a line of links for each pair, one file for each corpus.
    """
    for number, corpus in enumerate(corpora):
        reader = _Links(alignments[number], corpus) if alignments else None
        sources: list[str] = []
        targets: list[str] = []
        characters = 0
        for source, target in pairs(corpus):
            sources.append(source)
            targets.append(target)
            characters += len(source) + len(target)
            if len(sources) == BLOCK_PAIRS or characters >= BLOCK_CHARACTERS:
                yield Block(number, sources, targets, reader.next(len(sources)) if reader else None)
                sources, targets, characters = [], [], 0
        if sources:
            yield Block(number, sources, targets, reader.next(len(sources)) if reader else None)
        if reader:
            reader.end()


class _Links:
    """A file of links, read in step with the pairs of a corpus."""

    def __init__(self, path: str, corpus: Corpus) -> None:
        self.path, self.corpus, self.done = path, corpus, 0
        self.lines = lines(path)

    def next(self, count: int) -> LinkLines:
        """The lines of the next pairs."""
        found = list(islice(self.lines, count))
        if len(found) < count:
            raise DataError(
                f"{self.path} has {self.done + len(found):,} lines and {self.corpus.name} more pairs; each "
                "line has the links of a pair"
            )
        self.done += count
        return LinkLines(found, self.path, self.done - count + 1)

    def end(self) -> None:
        """Make sure that there are no more lines than pairs."""
        if next(self.lines, None) is not None:
            raise DataError(
                f"{self.path} has more lines than the {self.done:,} pairs of {self.corpus.name}; each line "
                "has the links of a pair"
            )


def encoded(work: Iterable[Block], encoder: Callable[[Block], Encoded], *, workers: int) -> Iterator[Encoded]:
    """What becomes of each block, in order, with only so many blocks in memory as keep the workers busy."""
    if workers == 1:
        yield from map(encoder, work)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=(encoder,)
    )
    try:
        under_way: deque[Future[Encoded]] = deque()
        for block in work:
            under_way.append(pool.submit(_encode, block))
            if len(under_way) >= AHEAD * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise TrmtError(
            "a worker process died, probably for lack of memory; try again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Callable[[Block], Encoded]  # in a worker process: sent once, not with every block


def _begin_worker(encoder: Callable[[Block], Encoded]) -> None:
    global _encoder
    _encoder = encoder
    # Ctrl-C goes to every process of the terminal; the main process alone answers it, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_with_parent()


def leave_with_parent() -> None:
    """Have this worker process end when its parent does, even if that is killed and cannot say goodbye."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _encode(block: Block) -> Encoded:
    return _encoder(block)


def available_cores() -> int:
    """The processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
