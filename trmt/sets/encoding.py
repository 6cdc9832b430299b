"""Blocks of pairs, which worker processes encode and filter; the results are in the order of the corpora."""

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
from trmt.sets.shards import RaggedArray
from trmt.text.corpus import Corpus
from trmt.text.filters import FILTERS, KEPT, LengthLimits, filter_by_length, pair_hashes
from trmt.text.lines import read_lines
from trmt.text.links import check_range, parse_links
from trmt.text.pairs import read_corpus
from trmt.text.tokenizer import Tokenizer
from trmt.text.words import link_pieces, word_indices

BLOCK_PAIRS = 4096
BLOCK_CHARACTERS = 1 << 21  # bounds the memory of a block of long lines
QUEUED_BLOCKS = 3  # for each worker


@dataclass(frozen=True)
class TextBlock:
    """Some consecutive pairs of one corpus."""

    corpus: int
    sources: list[str]
    targets: list[str]
    links: AlignmentLines | None = None


@dataclass(frozen=True)
class AlignmentLines:
    """The lines of an alignment file for the pairs of a block."""

    lines: list[str]
    file: str
    first: int  # the number of the first line


@dataclass(frozen=True)
class EncodedBlock:
    """The result for a block: which filter dropped which pair, and the ids of the others in order."""

    corpus: int
    dropped_by: NDArray[np.uint8]  # for each pair the index of the filter that dropped it, or KEPT
    source: RaggedArray
    target: RaggedArray
    hashes: NDArray[np.uint64]
    alignment: RaggedArray | None = None  # source piece, target piece, source piece, ... of each link

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many pairs each filter dropped, and last how many were kept."""
        return np.bincount(self.dropped_by, minlength=KEPT + 1)


@dataclass(frozen=True)
class BlockEncoder:
    """Encodes and filters blocks; it can be pickled."""

    tokenizer: Tokenizer
    limits: LengthLimits
    dev_hashes: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))

    def __call__(self, block: TextBlock) -> EncodedBlock:
        source = _ragged(self.tokenizer.source.encode(block.sources))
        target = _ragged(self.tokenizer.target.encode(block.targets))
        hashes = pair_hashes(
            [self.tokenizer.source.normalise(text) for text in block.sources],
            [self.tokenizer.target.normalise(text) for text in block.targets],
        )
        dropped_by = filter_by_length(source.lengths, target.lengths, limits=self.limits)
        dropped_by[(dropped_by == KEPT) & np.isin(hashes, self.dev_hashes)] = FILTERS.index("in dev set")
        kept = dropped_by == KEPT
        sides = source.select(kept), target.select(kept)
        return EncodedBlock(
            corpus=block.corpus,
            dropped_by=dropped_by,
            source=sides[0],
            target=sides[1],
            hashes=hashes[kept],
            alignment=self._alignment(block, np.flatnonzero(kept), sides) if block.links else None,
        )

    def _alignment(
        self, block: TextBlock, kept: NDArray[np.int64], sides: tuple[RaggedArray, RaggedArray]
    ) -> RaggedArray:
        """The links between the pieces of the pairs that are kept."""
        assert block.links is not None, "only called for blocks with links"
        ids = [side.split() for side in sides]
        found: list[list[int]] = []
        for number, source, target in zip(kept.tolist(), *ids, strict=False):
            where = f"{block.links.file}, line {block.links.first + number}"
            pair = block.sources[number], block.targets[number]
            links = parse_links(block.links.lines[number], where=where)
            check_range(links, pair, where=where)
            words = (
                word_indices(self.tokenizer.source, pair[0], source.tolist()),
                word_indices(self.tokenizer.target, pair[1], target.tolist()),
            )
            found.append([number for link in link_pieces(links, *words) for number in link])
        return _ragged(found)


def _ragged(sentences: Sequence[Sequence[int]]) -> RaggedArray:
    lengths = np.fromiter(map(len, sentences), np.int64, len(sentences))
    values = np.fromiter(chain.from_iterable(sentences), np.uint32, int(lengths.sum()))
    return RaggedArray(values, lengths)


def read_blocks(corpora: Iterable[Corpus], alignments: Sequence[str] = ()) -> Iterator[TextBlock]:
    """All pairs of the corpora in order; where blocks end depends on the pairs alone.

    `alignments` are files with a line of links for each pair, one file for each corpus.
    """
    for number, corpus in enumerate(corpora):
        reader = _AlignmentReader(alignments[number], corpus) if alignments else None
        sources: list[str] = []
        targets: list[str] = []
        characters = 0
        for source, target in read_corpus(corpus):
            sources.append(source)
            targets.append(target)
            characters += len(source) + len(target)
            if len(sources) == BLOCK_PAIRS or characters >= BLOCK_CHARACTERS:
                yield TextBlock(number, sources, targets, reader.read(len(sources)) if reader else None)
                sources, targets, characters = [], [], 0
        if sources:
            yield TextBlock(number, sources, targets, reader.read(len(sources)) if reader else None)
        if reader:
            reader.check_end()


class _AlignmentReader:
    """An alignment file that is read together with its corpus."""

    def __init__(self, path: str, corpus: Corpus) -> None:
        self.path, self.corpus, self.done = path, corpus, 0
        self.lines = read_lines(path)

    def read(self, count: int) -> AlignmentLines:
        """The lines of the next `count` pairs."""
        found = list(islice(self.lines, count))
        if len(found) < count:
            raise DataError(
                f"{self.path} has {self.done + len(found):,} lines but {self.corpus.name} has more pairs; "
                "each line has the links of a pair"
            )
        self.done += count
        return AlignmentLines(found, self.path, self.done - count + 1)

    def check_end(self) -> None:
        """Refuse a file with more lines than pairs."""
        if next(self.lines, None) is not None:
            raise DataError(
                f"{self.path} has more lines than the {self.done:,} pairs of {self.corpus.name}; each line "
                "has the links of a pair"
            )


def encode_blocks(
    blocks: Iterable[TextBlock], encoder: Callable[[TextBlock], EncodedBlock], *, workers: int
) -> Iterator[EncodedBlock]:
    """The results of the blocks in order; at most QUEUED_BLOCKS per worker are in memory."""
    if workers == 1:
        yield from map(encoder, blocks)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_init_worker, initargs=(encoder,)
    )
    try:
        pending: deque[Future[EncodedBlock]] = deque()
        for block in blocks:
            pending.append(pool.submit(_encode, block))
            if len(pending) >= QUEUED_BLOCKS * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise TrmtError(
            "a worker process died, probably out of memory; try again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Callable[[TextBlock], EncodedBlock]  # of a worker process, which gets it once and not per block


def _init_worker(encoder: Callable[[TextBlock], EncodedBlock]) -> None:
    global _encoder
    _encoder = encoder
    # Ctrl-C goes to every process of the terminal; only the main process handles it, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()


def exit_with_parent() -> None:
    """End this worker process when its parent ends, even if the parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _encode(block: TextBlock) -> EncodedBlock:
    return _encoder(block)


def available_cores() -> int:
    """The processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
