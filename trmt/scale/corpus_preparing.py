"""Training pairs encoded in parts by workers that may be anywhere, and made into one prepared set here.

Workers do what takes the time: reading, encoding, judging. Each part's ids stand in a file in `SET.parts`,
beside the set to be, until the set is written; then that folder goes. Which pair is the first of its kind can
only be said by who sees all of them, so duplicates are dropped here, as ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trmt.errors import ConfigError, DataError, TrmtError
from trmt.scale.fleet import Fleets, work_through
from trmt.scale.partition import Input, begun, measured, missing, part_name
from trmt.sets.building import EncodedCorpora, PrepareJob, id_dtype
from trmt.sets.encoding import BLOCK_PAIRS, BlockEncoder, EncodedBlock, read_blocks
from trmt.sets.preparing import PrepareOptions, prepare
from trmt.sets.shards import PreparedSet, RaggedArray
from trmt.storage import files
from trmt.storage.locks import exclusive
from trmt.text.corpus import Corpus
from trmt.text.lines import STDIN
from trmt.text.pairs import resolve_columns
from trmt.text.ranges import FileSlice, LineRange, split_after_lines, split_by_size, whole_file

PART_BYTES = 32 << 20  # of source text: half a minute for a worker


@dataclass(frozen=True)
class PairPart:
    """Some pairs of a corpus, and where their ids go."""

    name: str
    number: int  # of the corpus
    corpus: Corpus
    out: str


@dataclass(frozen=True)
class EncodeJob:
    """What a worker begins with."""

    encoder: BlockEncoder

    def begun(self) -> Callable[[PairPart], dict[str, Any]]:
        """What encodes one part after the other."""
        return partial(_encode, self.encoder)


def prepare_in_parts(options: PrepareOptions, fleets: Fleets, *, part_bytes: int = PART_BYTES) -> PreparedSet:
    """Prepare a set as `prepare` does, its training pairs in parts; those that are there are left."""
    folders: list[Path] = []

    def encode(job: PrepareJob, encoder: BlockEncoder) -> EncodedCorpora:
        folders.append(job.out.absolute().with_name(f"{job.out.name}.parts"))
        return _encoded_in_parts(folders[0], job, encoder, fleets=fleets, part_bytes=part_bytes)

    made = prepare(options, encode=encode)
    for folder in folders:
        files.remove(str(folder))
    return made


def _encoded_in_parts(
    folder: Path, job: PrepareJob, encoder: BlockEncoder, *, fleets: Fleets, part_bytes: int
) -> EncodedCorpora:
    corpora = [_cuttable(corpus) for corpus in job.train]
    where = str(folder)
    with exclusive(where):
        files.remove_partials(where, recursive=True)
        partition = begun(
            where,
            "prepare",
            _decisive(job, encoder, part_bytes),
            names=[name for corpus in corpora for name in corpus.paths],
            cut=lambda: [each for corpus in corpora for each in _cut(corpus, part_bytes)],
        )
        parts = list(_parts(where, corpora, partition.inputs))
        wanted = set(missing(where, [part.name for part in parts]))
        todo = [part for part in parts if part.name in wanted]
        if todo:
            with fleets(EncodeJob(encoder)) as fleet:
                done = work_through(todo, fleet, title="encoding", before=len(parts) - len(todo))
            if done.failed:
                raise TrmtError(
                    f"{len(done.failed):,} of {len(parts):,} parts could not be encoded, the first because: "
                    f"{next(iter(done.failed.values()))}; the same command tries those again"
                )
    return EncodedCorpora("collecting", None, _collected(parts))


def _decisive(job: PrepareJob, encoder: BlockEncoder, part_bytes: int) -> dict[str, Any]:
    """All options that decide what the parts hold."""
    return {
        "tokenizer": job.tokenizer.fingerprint,
        "languages": list(job.languages),
        "columns": list(job.columns),
        "max length": encoder.limits.max_length,
        "max ratio": encoder.limits.max_ratio,
        "dev set": blake2b(encoder.dev_hashes.tobytes(), digest_size=8).hexdigest(),
        "part size": part_bytes,
    }


# Cutting


def _cuttable(corpus: Corpus) -> Corpus:
    if corpus.paths == (STDIN,) or corpus.format == "dataset":
        raise ConfigError(
            f"{corpus.name} is no file, which many could read; write it to one, or leave --ray out"
        )
    return resolve_columns(replace(corpus, paths=tuple(map(files.absolute, corpus.paths))))


def _cut(corpus: Corpus, size: int) -> list[Input]:
    """The files of a corpus in ranges that belong together."""
    if corpus.format == "parquet" or any(path.lower().endswith(".gz") for path in corpus.paths):
        return [measured(path, _whole) for path in corpus.paths]
    first, *others = corpus.paths
    # Blocks of pairs begin where they do when one process reads all, so what is written is the same.
    found = [measured(first, partial(_cut_by_size, size=size))]
    ends = [one.first + one.lines for one in found[0].ranges]
    found += [measured(path, partial(_cut_after, numbers=ends[:-1])) for path in others]
    for each in found[1:]:
        last = each.ranges[-1]
        if len(each.ranges) != len(ends) or last.first + last.lines != ends[-1]:
            raise DataError(
                f"{first} has {ends[-1]:,} lines but {each.name} has {last.first + last.lines:,}, so they "
                "are not translations line by line; find where they come apart"
            )
    return found


def _whole(name: str) -> list[LineRange]:
    with files.open_file(name) as stream:
        return [whole_file(stream)]


def _cut_by_size(name: str, *, size: int) -> list[LineRange]:
    with files.open_file(name) as stream:
        return split_by_size(stream, size=size, every=BLOCK_PAIRS)


def _cut_after(name: str, *, numbers: Sequence[int]) -> list[LineRange]:
    with files.open_file(name) as stream:
        return split_after_lines(stream, numbers)


def _parts(folder: str, corpora: Sequence[Corpus], inputs: Sequence[Input]) -> Iterator[PairPart]:
    left = iter(inputs)
    slices: list[tuple[int, tuple[FileSlice, ...]]] = []
    for number, corpus in enumerate(corpora):
        taken = [next(left) for _ in corpus.paths]
        for ranges in zip(*(each.ranges for each in taken), strict=True):
            pieces = zip(taken, ranges, strict=True)
            slices.append((number, tuple(FileSlice(each.name, one) for each, one in pieces)))
    for at, (number, some) in enumerate(slices):
        name = part_name(at, len(slices))
        yield PairPart(name, number, replace(corpora[number], slices=some), files.join(folder, name))


# What a part holds: for each block six arrays, one after the other, and at last an array of nothing


def _encode(encoder: BlockEncoder, part: PairPart) -> dict[str, Any]:
    began, worked, lines = time.perf_counter(), time.process_time(), 0
    with files.atomic_file(part.out) as stream:
        for block in read_blocks([part.corpus]):
            result = encoder(block)
            lines += len(result.dropped_by)
            for array in (result.dropped_by, result.hashes):
                np.save(stream, array)
            for side, run in (("source", result.source), ("target", result.target)):
                np.save(stream, run.values.astype(id_dtype(getattr(encoder.tokenizer, side).vocabulary)))
                np.save(stream, run.lengths.astype("<u4"))
        np.save(stream, np.zeros(0, np.uint8))
    return {
        "lines": lines,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - worked,
    }


def _collected(parts: Sequence[PairPart]) -> Iterator[EncodedBlock]:
    """The blocks of all parts, in order."""
    for part in parts:
        with files.open_file(part.out) as stream:
            try:
                yield from _blocks(part.number, stream)
            except (EOFError, OSError, ValueError) as error:
                raise DataError(
                    f"{part.out} cannot be read ({error}); remove it, and the same command makes it again"
                ) from error


def _blocks(corpus: int, stream: BinaryIO) -> Iterator[EncodedBlock]:
    while len(dropped_by := _array(stream)):
        hashes, *sides = (_array(stream) for _ in range(5))
        source, target = (
            RaggedArray(values, lengths.astype(np.int64))
            for values, lengths in zip(sides[::2], sides[1::2], strict=True)
        )
        yield EncodedBlock(corpus=corpus, dropped_by=dropped_by, source=source, target=target, hashes=hashes)


def _array(stream: BinaryIO) -> Any:
    return np.lib.format.read_array(stream, allow_pickle=False)
