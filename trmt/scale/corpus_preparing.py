"""Preparation of training pairs in parts, by workers on this machine or on a Ray cluster.

Workers read, encode and filter the pairs. They write the ids of each part to a file in `SET.parts`, a folder
beside the prepared set that is removed when the set is written. The main process reads all parts in order,
because only there duplicates can be found, and writes the set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trmt.errors import ConfigError, DataError, TrmtError
from trmt.scale.partition import InputFile, cut_input, missing_parts, open_partition, part_name
from trmt.scale.parts import process_parts
from trmt.scale.pool import PoolFactory
from trmt.sets.building import EncodedCorpora, PrepareJob, id_dtype
from trmt.sets.encoding import BLOCK_PAIRS, BlockEncoder, EncodedBlock, read_blocks
from trmt.sets.preparing import PrepareOptions, prepare
from trmt.sets.shards import PreparedSet, RaggedArray
from trmt.storage import files
from trmt.storage.compression import is_compressed
from trmt.storage.locks import exclusive
from trmt.text.corpus import DATASET_PREFIX, Corpus, is_stream
from trmt.text.lines import STDIN
from trmt.text.pairs import resolve_columns
from trmt.text.ranges import FileSlice, LineRange, split_after_lines, split_by_size, whole_file

_NOT_A_FILE = "{} is not a file that all workers can read; write it to a file, or leave --ray out"

MARK = b"sha256"  # before the checksum of a part
PART_BYTES = 32 << 20  # of source text: half a minute for a worker


@dataclass(frozen=True)
class PairPart:
    """Some pairs of a corpus, and the file for their ids."""

    name: str
    corpus_number: int
    corpus: Corpus
    out: str


@dataclass(frozen=True)
class EncodeParts:
    """The job of each worker: encode parts."""

    encoder: BlockEncoder

    def load(self) -> Callable[[PairPart], dict[str, Any]]:
        """The function that encodes a part."""
        return partial(_encode, self.encoder)


def prepare_in_parts(
    options: PrepareOptions, make_pool: PoolFactory, *, part_bytes: int = PART_BYTES
) -> PreparedSet:
    """Prepare the set that `prepare` makes, encoding pairs in parts; finished parts are reused."""
    folders: list[Path] = []
    for text in options.train:
        if text.partition("@")[0] == STDIN or text.startswith(DATASET_PREFIX):
            raise ConfigError(_NOT_A_FILE.format(text))

    def encode(job: PrepareJob, encoder: BlockEncoder) -> EncodedCorpora:
        folders.append(job.out.absolute().with_name(f"{job.out.name}.parts"))
        return _encode_in_parts(folders[0], job, encoder, make_pool=make_pool, part_bytes=part_bytes)

    made = prepare(options, encode=encode)
    for folder in folders:
        files.remove(str(folder))
    return made


def _encode_in_parts(
    path: Path, job: PrepareJob, encoder: BlockEncoder, *, make_pool: PoolFactory, part_bytes: int
) -> EncodedCorpora:
    corpora = [_check_files(corpus) for corpus in job.train]
    folder = str(path)
    with exclusive(folder):
        files.remove_partials(folder, recursive=True)
        partition = open_partition(
            folder,
            "prepare",
            _identity(job, encoder, part_bytes),
            names=[name for corpus in corpora for name in corpus.paths],
            cut=lambda: [each for corpus in corpora for each in _cut(corpus, part_bytes)],
        )
        parts = list(_parts(folder, corpora, partition.inputs))
        missing = set(missing_parts(folder, [part.name for part in parts]))
        todo = [part for part in parts if part.name in missing]
        if todo:
            with make_pool(EncodeParts(encoder)) as pool:
                outcome = process_parts(todo, pool, title="encoding", done_before=len(parts) - len(todo))
            if outcome.failed:
                raise TrmtError(
                    f"{len(outcome.failed):,} of {len(parts):,} parts could not be encoded, the first "
                    f"because: {next(iter(outcome.failed.values()))}; the same command tries them again"
                )
    return EncodedCorpora("collecting", None, _read_parts(parts))


def _identity(job: PrepareJob, encoder: BlockEncoder, part_bytes: int) -> dict[str, Any]:
    """All options that determine the contents of the parts."""
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


def _check_files(corpus: Corpus) -> Corpus:
    """The corpus with absolute paths; an error if it is not in files."""
    if any(map(is_stream, corpus.paths)):
        raise ConfigError(_NOT_A_FILE.format(corpus.name))
    return resolve_columns(replace(corpus, paths=tuple(map(files.absolute, corpus.paths))))


def _cut(corpus: Corpus, size: int) -> list[InputFile]:
    """Cut the files of a corpus into ranges; those of parallel files have the same lines."""
    if corpus.format == "parquet" or any(map(is_compressed, corpus.paths)):
        return [cut_input(path, _whole) for path in corpus.paths]
    first, *others = corpus.paths
    # Ranges end where blocks of pairs end when a single process reads everything, so the set is the same.
    found = [cut_input(first, partial(_cut_by_size, size=size))]
    ends = [one.first + one.lines for one in found[0].ranges]
    found += [cut_input(path, partial(_cut_after, numbers=ends[:-1])) for path in others]
    for each in found[1:]:
        last = each.ranges[-1]
        if len(each.ranges) != len(ends) or last.first + last.lines != ends[-1]:
            raise DataError(
                f"{first} has {ends[-1]:,} lines but {each.name} has {last.first + last.lines:,}, so they "
                "are not translations line by line; find where they diverge"
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


def _parts(folder: str, corpora: Sequence[Corpus], inputs: Sequence[InputFile]) -> Iterator[PairPart]:
    remaining = iter(inputs)
    slices: list[tuple[int, tuple[FileSlice, ...]]] = []
    for number, corpus in enumerate(corpora):
        inputs = [next(remaining) for _ in corpus.paths]
        for ranges in zip(*(each.ranges for each in inputs), strict=True):
            pieces = zip(inputs, ranges, strict=True)
            slices.append((number, tuple(FileSlice(each.name, one, one.lines < 0) for each, one in pieces)))
    for index, (number, some) in enumerate(slices):
        name = part_name(index, len(slices))
        yield PairPart(name, number, replace(corpora[number], slices=some), files.join(folder, name))


# The file of a part: six arrays for each block of pairs, an empty array at the end, and a checksum of all


class _Hashed:
    """A stream whose bytes are hashed as they are written."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.hash = stream, sha256()

    def write(self, raw: bytes) -> int:
        self.hash.update(raw)
        return self.stream.write(raw)


def _encode(encoder: BlockEncoder, part: PairPart) -> dict[str, Any]:
    started, cpu_started, lines = time.perf_counter(), time.process_time(), 0
    with files.atomic_file(part.out) as out:
        stream = _Hashed(out)
        for block in read_blocks([part.corpus]):
            result = encoder(block)
            lines += len(result.dropped_by)
            for array in (result.dropped_by, result.hashes):
                np.save(stream, array)
            for side, run in (("source", result.source), ("target", result.target)):
                np.save(stream, run.values.astype(id_dtype(getattr(encoder.tokenizer, side).vocabulary)))
                np.save(stream, run.lengths.astype("<u4"))
        np.save(stream, np.zeros(0, np.uint8))
        out.write(MARK + stream.hash.digest())
    return {
        "lines": lines,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }


def _read_parts(parts: Sequence[PairPart]) -> Iterator[EncodedBlock]:
    """The blocks of all parts, in order."""
    for part in parts:
        with files.open_file(part.out) as stream:
            try:
                tail = _verified_tail(stream)
                yield from _read_blocks(part.corpus_number, stream)
                if stream.read() != tail:
                    raise ValueError("something follows its end")
            except (EOFError, MemoryError, OSError, ValueError) as error:
                raise DataError(
                    f"{part.out} cannot be read ({error}); remove it and run the same command again"
                ) from error


def _verified_tail(stream: BinaryIO) -> bytes:
    """What follows the arrays: a checksum, which has to be theirs; older versions wrote none."""
    size = max(stream.seek(0, 2) - len(MARK) - 32, 0)
    stream.seek(size)
    tail = stream.read()
    if not tail.startswith(MARK):
        stream.seek(0)
        return b""
    stream.seek(0)
    found = sha256()
    while size:
        block = stream.read(min(size, 1 << 20))
        found.update(block)
        size -= len(block)
    if tail[len(MARK) :] != found.digest():
        raise ValueError("its checksum differs")
    stream.seek(0)
    return tail


def _read_blocks(corpus: int, stream: BinaryIO) -> Iterator[EncodedBlock]:
    while len(dropped_by := _read_array(stream)):
        hashes, *sides = (_read_array(stream) for _ in range(5))
        source, target = (
            RaggedArray(values, lengths.astype(np.int64))
            for values, lengths in zip(sides[::2], sides[1::2], strict=True)
        )
        yield EncodedBlock(corpus=corpus, dropped_by=dropped_by, source=source, target=target, hashes=hashes)


def _read_array(stream: BinaryIO) -> Any:
    return np.lib.format.read_array(stream, allow_pickle=False)
