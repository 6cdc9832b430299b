"""Building of a prepared set: encode and filter the pairs, drop duplicates, write shards and index.

The training pairs are read in two passes, so that memory does not grow with their number. The first pass
writes the pairs that pass the filters for single pairs, and a hash of each; the second copies those whose
hash occurs for the first time.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trmt import console
from trmt.errors import DataError
from trmt.sets import shards
from trmt.sets.dev_split import take_dev_set
from trmt.sets.encoding import BlockEncoder, EncodedBlock, read_blocks
from trmt.sets.shards import ColumnSpec, RaggedArray, ShardWriter, Split, describe_file, dev_file
from trmt.text.corpus import Corpus
from trmt.text.filters import FILTERS, KEPT, LengthLimits, first_occurrences
from trmt.text.tokenizer import Tokenizer

BLOCK = 1 << 16  # pairs in memory while duplicates are dropped
MAX_COLUMNS = 4  # corpora that are columns of the report; more are rows

DUPLICATE = FILTERS.index("duplicate")
ANY_LENGTH = LengthLimits(max_length=sys.maxsize, max_ratio=0)

CorpusEntry = Mapping[str, Any]  # the entry of a corpus in the index
FilterCounts = NDArray[np.int64]  # pairs by corpus and by the filter that dropped them; kept pairs last


@dataclass(frozen=True)
class PrepareJob:
    """The inputs and settings of a prepared set."""

    out: Path
    languages: tuple[str, str]
    columns: tuple[str | None, str | None]
    tokenizer: Tokenizer
    train: tuple[Corpus, ...]
    dev: Corpus | None
    dev_size: int | None  # pairs to take from the training pairs if there is no dev set; None: the default
    limits: LengthLimits
    keep_duplicates: bool
    alignments: tuple[str, ...]
    workers: int | None

    @property
    def corpora(self) -> tuple[Corpus, ...]:
        return self.train if self.dev is None else (*self.train, self.dev)


@dataclass(frozen=True)
class EncodedCorpora:
    """The blocks of the encoded training pairs, in order."""

    title: str  # of the progress bar
    total: int | None  # pairs, if known
    blocks: Iterable[EncodedBlock]


EncodeCorpora = Callable[[PrepareJob, BlockEncoder], EncodedCorpora]


def build_set(
    job: PrepareJob, folder: Path, *, made_from: dict[str, Any] | None, encode: EncodeCorpora
) -> None:
    """Write the set into an empty folder."""
    work = folder / "dev-split"
    taken = job.dev is None and job.dev_size != 0
    if taken:
        work.mkdir()
        train, dev = take_dev_set(job.train, job.tokenizer, job.limits, size=job.dev_size, work=work)
        job = replace(job, train=train, dev=dev)
    job.tokenizer.save(folder / shards.TOKENIZER)
    splits, files = {}, {}
    dev_hashes = np.zeros(0, np.uint64)
    dev_entry = None
    if job.dev is not None:
        writer, dev_hashes, dev_entry = _write_dev(job.tokenizer, job.dev, folder)
        splits["dev"], files = writer.entry(), writer.files
    encoder = BlockEncoder(job.tokenizer, job.limits, dev_hashes)
    writer, counts = _write_train(job, lambda: encode(job, encoder), folder)
    splits["train"], files = writer.entry(), files | writer.files
    entries = [_corpus_entry(corpus, row) for corpus, row in zip(job.train, counts.tolist(), strict=True)]
    _print_report(entries, dev_entry, taken=taken)
    if taken:
        shutil.rmtree(work)
    if not splits["train"]["pairs"]:
        raise DataError(
            f"no pair of {', '.join(corpus.name for corpus in job.train)} is left to train on; the table "
            "shows which filters dropped them, so check the text or relax the filters"
        )
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in files:
            files[name] = describe_file(path)
    index = {
        "languages": list(job.languages),
        "tokenizer": job.tokenizer.fingerprint,
        "vocabulary": [job.tokenizer.source.vocabulary, job.tokenizer.target.vocabulary],
        "corpora": entries,
        "dev": dev_entry,
        "splits": splits,
        "made_from": made_from,
        "files": files,
    }
    shards.write_index(folder, index)


def _corpus_entry(corpus: Corpus, counts: Sequence[int]) -> CorpusEntry:
    """The entry of a corpus in the index, given its pairs by the filter that dropped them, kept ones last."""
    return {
        "name": corpus.name,
        "weight": corpus.weight,
        "read": sum(counts),
        "dropped": dict(zip(FILTERS, counts, strict=False)),
        "kept": counts[KEPT],
    }


def id_dtype(size: int) -> str:
    """The narrowest dtype of ids below `size`."""
    return "<u2" if size <= 1 << 16 else "<u4"


def _id_columns(tokenizer: Tokenizer) -> tuple[ColumnSpec, ColumnSpec]:
    return (
        ColumnSpec("source.ids", id_dtype(tokenizer.source.vocabulary)),
        ColumnSpec("target.ids", id_dtype(tokenizer.target.vocabulary)),
    )


def _write_dev(
    tokenizer: Tokenizer, corpus: Corpus, folder: Path
) -> tuple[ShardWriter, NDArray[np.uint64], CorpusEntry]:
    """Write ids and text of the dev set without its empty pairs; a score has to be of all others."""
    counts = np.zeros(KEPT + 1, np.int64)
    hashes = [np.zeros(0, np.uint64)]
    encoder = BlockEncoder(tokenizer, ANY_LENGTH)
    with ExitStack() as stack:
        writer = stack.enter_context(ShardWriter(folder, "dev", columns=_id_columns(tokenizer)))
        source_file, target_file = (
            stack.enter_context((folder / dev_file(side)).open("wb")) for side in shards.SIDES
        )
        for block in read_blocks([corpus]):
            result = encoder(block)
            counts += result.counts
            hashes.append(result.hashes)
            writer.write({"source.ids": result.source, "target.ids": result.target})
            for number in np.flatnonzero(result.dropped_by == KEPT).tolist():
                source_file.write(block.sources[number].encode() + b"\n")
                target_file.write(block.targets[number].encode() + b"\n")
    if not counts[KEPT]:
        raise DataError(f"the dev set {corpus.name} has no pair with text on both sides; check the file")
    return writer, np.unique(np.concatenate(hashes)), _corpus_entry(corpus, counts.tolist())


def _write_train(
    job: PrepareJob, encode: Callable[[], EncodedCorpora], folder: Path
) -> tuple[ShardWriter, FilterCounts]:
    counts = np.zeros((len(job.train), KEPT + 1), np.int64)
    columns: tuple[ColumnSpec, ...] = (
        *_id_columns(job.tokenizer),
        ColumnSpec("corpus", "<u2", ragged=False),
    )
    if job.alignments:
        columns = (*columns, ColumnSpec("alignment", id_dtype(job.limits.max_length)))
    work = folder / "first-pass"
    work.mkdir()
    writer = ShardWriter(folder if job.keep_duplicates else work, "train", columns=columns)
    _write_encoded(encode(), writer, hashes=work / "hashes", counts=counts)
    if not job.keep_duplicates:
        first = Split(work, "train", entry=writer.entry())
        mask = first_occurrences(work / "hashes", work / "mask")
        writer = ShardWriter(folder, "train", columns=columns)
        _copy_without_duplicates(first, mask, writer, counts=counts)
        del mask  # on Windows a file cannot be removed while it is mapped
    shutil.rmtree(work)
    return writer, counts


def _write_encoded(
    encoded: EncodedCorpora, writer: ShardWriter, *, hashes: Path, counts: FilterCounts
) -> None:
    """The first pass: write the pairs that pass the filters for single pairs, and the hash of each."""
    with (
        writer,
        hashes.open("wb") as hash_file,
        console.progress(encoded.title, encoded.total, unit="pairs") as progress,
    ):
        for block in encoded.blocks:
            counts[block.corpus] += block.counts
            corpora = np.full(len(block.hashes), block.corpus, np.uint16)
            links = {"alignment": block.alignment} if block.alignment is not None else {}
            sides = {"source.ids": block.source, "target.ids": block.target}
            writer.write({**sides, "corpus": corpora, **links})
            hash_file.write(block.hashes.tobytes())
            progress.advance(len(block.dropped_by))


def _copy_without_duplicates(
    first: Split, mask: NDArray[np.bool_], writer: ShardWriter, *, counts: FilterCounts
) -> None:
    """The second pass: copy the pairs in `mask`, and count the others as duplicates of earlier ones."""
    begin = 0
    with writer, console.progress("dropping duplicates", len(first), unit="pairs") as progress:
        for block in first.blocks(BLOCK):
            corpora = block["corpus"]
            assert not isinstance(corpora, RaggedArray)
            wanted = np.array(mask[begin : begin + len(corpora)])
            dropped = np.bincount(corpora[~wanted], minlength=len(counts))
            counts[:, DUPLICATE] += dropped
            counts[:, KEPT] -= dropped
            writer.write(
                {
                    name: values.select(wanted) if isinstance(values, RaggedArray) else values[wanted]
                    for name, values in block.items()
                }
            )
            begin += len(corpora)
            progress.advance(len(corpora))


# The report


def _print_report(train: Sequence[CorpusEntry], dev: CorpusEntry | None, *, taken: bool) -> None:
    names = [_short_name(entry["name"]) for entry in train]
    if len(set(names)) < len(names):
        names = [entry["name"] for entry in train]
    rows = [_report_row(name, entry) for name, entry in zip(names, train, strict=True)]
    if len(train) > 1:
        rows.append(_report_row("total", _total(train)))
    if dev is not None:
        rows.append(_report_row(f"dev: {_short_name(dev['name'])}", dev))
    heads = ["corpus", "read", *FILTERS, "kept"]
    if len(rows) <= MAX_COLUMNS:
        heads, *rows = (list(column) for column in zip(heads, *rows, strict=True))
    console.table("Pairs dropped by each filter", heads, rows)
    if dev is not None and not taken:
        console.say("only empty pairs of the dev set are dropped")


def _short_name(name: str) -> str:
    """A corpus name without folders, so that the table fits a terminal."""
    return ",".join(part.rpartition("/")[2] for part in name.split(","))


def _report_row(name: str, entry: CorpusEntry) -> list[str]:
    dropped = (f"{entry['dropped'][each]:,}" for each in FILTERS)
    return [name, f"{entry['read']:,}", *dropped, f"{entry['kept']:,}"]


def _total(entries: Sequence[CorpusEntry]) -> CorpusEntry:
    dropped = {each: sum(entry["dropped"][each] for entry in entries) for each in FILTERS}
    return {key: sum(entry[key] for entry in entries) for key in ("read", "kept")} | {"dropped": dropped}
