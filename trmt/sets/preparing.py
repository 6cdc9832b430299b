"""From text to a prepared set: read, encode and filter on all cores, drop duplicates, write shards.

Two passes over the pairs, so that memory does not grow with their number. The first writes the pairs that
keep to every rule but the last, and a hash of each; the second copies those whose hash is there for the first
time.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trmt import console
from trmt.errors import ConfigError, DataError
from trmt.sets import shards
from trmt.sets.encoding import Encoded, Encoder, available_cores, blocks, encoded
from trmt.sets.shards import Column, PreparedSet, Ragged, ShardWriter, Split, describe_file, dev_file
from trmt.storage.files import PARTIAL, atomic_folder, checksum
from trmt.text.corpus import STDIN, Corpus, count, fingerprint, parse_corpus
from trmt.text.filters import KEPT, RULES, Limits, first_occurrences
from trmt.text.tokenizer import Tokenizer

COPIED = 1 << 16  # pairs in memory while duplicates are dropped
STACKED = 4  # corpora that stand side by side in the table, with room for millions; more stand in rows
FEW_PAIRS = 50_000  # a worker process takes a second to start, and is not worth it for fewer
STALE = 3600  # seconds after which an unfinished folder that nobody writes to was left by a killed command

DUPLICATE = RULES.index("duplicate")
ANY_SIZE = Limits(max_length=sys.maxsize, max_ratio=0)

Head = Mapping[str, Any]  # what the index says of a corpus
Tally = NDArray[np.int64]  # pairs, by corpus and by the rule that took them; kept ones last


@dataclass(frozen=True)
class PrepareOptions:
    """What `prepare` is asked for."""

    train: tuple[str, ...]
    """Corpus strings of the training pairs."""
    dev: str | None = None
    """The corpus string of the pairs to validate on."""
    out: Path | None = None
    """The folder to write; by itself data/SOURCE-TARGET."""
    tokenizer: Path = Path("data/tokenizer")
    """The folder of the tokenizer."""
    languages: tuple[str | None, str | None] = (None, None)
    """The languages translated from and to; by themselves those of the tokenizer."""
    columns: tuple[str | None, str | None] = (None, None)
    """The columns of the source and the target text, for corpora that have columns."""
    limits: Limits = field(default_factory=Limits)
    """How long and how unequal the sides of a training pair may be."""
    keep_duplicates: bool = False
    """Whether a training pair may come more than once."""
    alignments: tuple[str, ...] = ()
    """Files of links of words, one for each training corpus: what guides attention."""
    workers: int | None = None
    """Worker processes; by themselves as many as there are cores, and fewer for little text."""
    force: bool = False
    """Whether to prepare again what is up to date."""

    def __post_init__(self) -> None:
        if not self.train:
            raise ConfigError("there is nothing to prepare; name a corpus with --train")
        if self.alignments and len(self.alignments) != len(self.train):
            raise ConfigError(
                f"there are {len(self.alignments)} files of --alignments and {len(self.train)} of --train; "
                "name one for each, in the same order"
            )
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers {self.workers} leaves nobody to work; choose at least 1")


@dataclass(frozen=True)
class Job:
    """The options with every name looked up."""

    options: PrepareOptions
    out: Path
    languages: tuple[str, str]
    tokenizer: Tokenizer
    train: tuple[Corpus, ...]
    dev: Corpus | None

    @property
    def corpora(self) -> tuple[Corpus, ...]:
        return self.train if self.dev is None else (*self.train, self.dev)


@dataclass(frozen=True)
class Results:
    """The training pairs encoded, block after block in order."""

    title: str  # of the progress through them
    total: int | None  # pairs there should be
    blocks: Iterable[Encoded]


Encode = Callable[[Job, Encoder], Results]


def prepare(options: PrepareOptions, *, encode: Encode | None = None) -> PreparedSet:
    """Prepare a set, or find it up to date; the folder appears whole or stays as it was.

    The same inputs and options give the same bytes for any number of workers. With more than one, the calling
    script needs the usual `if __name__ == "__main__":`, because workers import it. `encode` is who else does
    what those would do.
    """
    job = _plan(options)
    made_from = _made_from(job)
    there = _up_to_date(job, made_from)
    if there is not None:
        console.say(f"{_summary(there)}; up to date, --force prepares it again")
        return there
    check_replaceable(job.out)
    sweep(job.out)
    with atomic_folder(job.out) as folder:
        _build(job, folder, made_from, encode or _encoded_here)
    made = PreparedSet.open(job.out)
    console.say(f"wrote {_summary(made)}")
    return made


# What is asked for


def _plan(options: PrepareOptions) -> Job:
    tokenizer = Tokenizer.load(options.tokenizer)
    languages = _languages(options, tokenizer)
    source, target = options.columns

    def parsed(text: str) -> Corpus:
        return parse_corpus(text, *languages, source_column=source, target_column=target)

    job = Job(
        options=options,
        out=options.out or Path("data", f"{languages[0]}-{languages[1]}"),
        languages=languages,
        tokenizer=tokenizer,
        train=tuple(map(parsed, options.train)),
        dev=parsed(options.dev) if options.dev is not None else None,
    )
    if sum(STDIN in corpus.paths for corpus in job.corpora) > 1:
        raise ConfigError("standard input can be read only once; give - to one corpus")
    if job.out.name in ("", ".."):
        raise ConfigError(f"{job.out} cannot be replaced as a whole; name a folder of its own for the set")
    return job


def _languages(options: PrepareOptions, tokenizer: Tokenizer) -> tuple[str, str]:
    source, target = (
        told or known for told, known in zip(options.languages, tokenizer.languages, strict=True)
    )
    if not source or not target:
        raise ConfigError("the tokenizer does not say its languages; name them with --from and --to")
    if all(tokenizer.languages) and (source, target) != tokenizer.languages:
        raise ConfigError(
            f"the tokenizer in {options.tokenizer} was trained for {' to '.join(tokenizer.languages)}, not "
            f"{source} to {target}; train one for this direction or change --from and --to"
        )
    return source, target


def _made_from(job: Job) -> dict[str, Any] | None:
    """All that decides what the set holds; None where that cannot be told and nothing is ever up to date."""
    options = job.options
    inputs = []
    for corpus in job.corpora:
        content = fingerprint(corpus)
        if content is None:
            return None
        inputs.append({"name": corpus.name, "weight": corpus.weight, "content": content})
    return {
        "format": shards.FORMAT,
        "tokenizer": job.tokenizer.fingerprint,
        "languages": list(job.languages),
        "columns": list(options.columns),
        "max_length": options.limits.max_length,
        "max_ratio": options.limits.max_ratio,
        "keep_duplicates": options.keep_duplicates,
        "dev": job.dev is not None,
        "inputs": inputs,
        **_alignments(options.alignments),
    }


def _alignments(paths: Sequence[str]) -> dict[str, Any]:
    """What they add to all that; nothing where there are none, so that older sets stay up to date."""
    for path in paths:
        if not Path(path).is_file():
            raise DataError(f"there is no file {path} for --alignments; check the path")
    return {"alignments": [checksum(Path(path)) for path in paths]} if paths else {}


def _up_to_date(job: Job, made_from: dict[str, Any] | None) -> PreparedSet | None:
    if job.options.force or not is_up_to_date(job.out, made_from):
        return None
    return PreparedSet.open(job.out)


def is_up_to_date(out: Path, made_from: dict[str, Any] | None) -> bool:
    """Whether the set there was made from just this."""
    if made_from is None:
        return False
    try:
        return PreparedSet.open(out).index.get("made_from") == made_from
    except DataError:
        return False


def check_replaceable(out: Path) -> None:
    """Refuse to replace a folder that holds anything but what an earlier run wrote."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is a file; choose another name for the prepared set")
    try:
        known = set(json.loads((out / shards.INDEX).read_bytes())["files"]) | {shards.INDEX}
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    found = (path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir())
    foreign = next((name for name in found if name not in known), None)
    if foreign is not None:
        raise ConfigError(
            f"{out} holds {foreign}, which is not of a prepared set and would be lost; "
            "move it away or choose another folder"
        )


def sweep(out: Path) -> None:
    """Remove what earlier runs for `out` left when they were killed, but not what another one is writing."""
    ours = re.compile(re.escape(f"{PARTIAL}{out.name}") + r"-\d+-[0-9a-f]{8}")
    for left in out.parent.glob(f"{PARTIAL}*"):
        if ours.fullmatch(left.name) and time.time() - _last_touched(left) > STALE:
            shutil.rmtree(left, ignore_errors=True)


def _last_touched(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in [folder, *folder.rglob("*")])
    except OSError:  # something went away just now, so somebody is at work
        return time.time()


# Building it


def _build(job: Job, folder: Path, made_from: dict[str, Any] | None, encode: Encode) -> None:
    job.tokenizer.save(folder / shards.TOKENIZER)
    splits, files = {}, {}
    dev_hashes = np.zeros(0, np.uint64)
    dev_head = None
    if job.dev is not None:
        writer, dev_hashes, dev_head = _write_dev(job, job.dev, folder)
        splits["dev"], files = writer.entry(), writer.files
    else:
        console.warn("without --dev there will be nothing to validate on")
    encoder = Encoder(job.tokenizer, job.options.limits, dev_hashes)
    writer, tally = _write_train(job, lambda: encode(job, encoder), folder)
    splits["train"], files = writer.entry(), files | writer.files
    heads = [_head(corpus, counts) for corpus, counts in zip(job.train, tally.tolist(), strict=True)]
    _show(heads, dev_head)
    if not splits["train"]["pairs"]:
        raise DataError(
            f"no pair of {', '.join(job.options.train)} is left to train on; the table says which rules took "
            "them, so check the text or loosen the rules"
        )
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in files:
            files[name] = describe_file(path)
    index = {
        "languages": list(job.languages),
        "tokenizer": job.tokenizer.fingerprint,
        "vocabulary": [job.tokenizer.source.vocabulary, job.tokenizer.target.vocabulary],
        "corpora": heads,
        "dev": dev_head,
        "splits": splits,
        "made_from": made_from,
        "files": files,
    }
    shards.write_index(folder, index)


def _head(corpus: Corpus, counts: Sequence[int]) -> Head:
    """What the index says of a corpus; `counts` has its pairs by the rule that took them, kept ones last."""
    return {
        "name": corpus.name,
        "weight": corpus.weight,
        "read": sum(counts),
        "dropped": dict(zip(RULES, counts, strict=False)),
        "kept": counts[KEPT],
    }


def _id_columns(tokenizer: Tokenizer) -> tuple[Column, Column]:
    return (
        Column("source.ids", id_type(tokenizer.source.vocabulary)),
        Column("target.ids", id_type(tokenizer.target.vocabulary)),
    )


def id_type(vocabulary: int) -> str:
    """The narrowest type of numbers that ids fit into."""
    return "<u2" if vocabulary <= 1 << 16 else "<u4"


def _write_dev(job: Job, corpus: Corpus, folder: Path) -> tuple[ShardWriter, NDArray[np.uint64], Head]:
    """Write ids and text of the dev set, which loses its empty pairs only: a score has to be of all of it."""
    counts = np.zeros(KEPT + 1, np.int64)
    hashes = [np.zeros(0, np.uint64)]
    encoder = Encoder(job.tokenizer, ANY_SIZE)
    with ExitStack() as stack:
        writer = stack.enter_context(ShardWriter(folder, "dev", columns=_id_columns(job.tokenizer)))
        source_file, target_file = (
            stack.enter_context((folder / dev_file(side)).open("wb")) for side in shards.SIDES
        )
        for block in blocks([corpus]):
            result = encoder(block)
            counts += result.counts
            hashes.append(result.hashes)
            writer.write({"source.ids": result.source, "target.ids": result.target})
            for at in np.flatnonzero(result.verdicts == KEPT).tolist():
                source_file.write(block.sources[at].encode() + b"\n")
                target_file.write(block.targets[at].encode() + b"\n")
    if not counts[KEPT]:
        raise DataError(f"the dev set {corpus.name} has no pair with text on both sides; check the file")
    return writer, np.unique(np.concatenate(hashes)), _head(corpus, counts.tolist())


def _write_train(job: Job, results: Callable[[], Results], folder: Path) -> tuple[ShardWriter, Tally]:
    tally = np.zeros((len(job.train), KEPT + 1), np.int64)
    columns: tuple[Column, ...] = (*_id_columns(job.tokenizer), Column("corpus", "<u2", ragged=False))
    if job.options.alignments:
        columns = (*columns, Column("alignment", id_type(job.options.limits.max_length)))
    work = folder / "first-pass"
    work.mkdir()
    last_pass = job.options.keep_duplicates
    writer = ShardWriter(folder if last_pass else work, "train", columns=columns)
    _write_all(results(), writer, hashes=work / "hashes", tally=tally)
    if not last_pass:
        first = Split(work, "train", entry=writer.entry())
        mask = first_occurrences(work / "hashes", work / "mask")
        writer = ShardWriter(folder, "train", columns=columns)
        _copy_without_duplicates(first, mask, writer, tally=tally)
        del mask  # on Windows a file cannot be removed while it is mapped
    shutil.rmtree(work)
    return writer, tally


def _write_all(results: Results, writer: ShardWriter, *, hashes: Path, tally: Tally) -> None:
    """The first pass: write what keeps to the rules for single pairs, and the hash of each."""
    with (
        writer,
        hashes.open("wb") as hash_file,
        console.progress(results.title, results.total, unit="pairs") as progress,
    ):
        for result in results.blocks:
            tally[result.corpus] += result.counts
            numbers = np.full(len(result.hashes), result.corpus, np.uint16)
            links = {"alignment": result.alignment} if result.alignment is not None else {}
            sides = {"source.ids": result.source, "target.ids": result.target}
            writer.write({**sides, "corpus": numbers, **links})
            hash_file.write(result.hashes.tobytes())
            progress.advance(len(result.verdicts))


def _encoded_here(job: Job, encoder: Encoder) -> Results:
    sizes = [count(corpus) for corpus in job.train]
    total = None if None in sizes else sum(filter(None, sizes))
    workers = _workers(job.options.workers, total)
    found = encoded(blocks(job.train, job.options.alignments), encoder, workers=workers)
    return Results(f"encoding, {workers} at work", total, found)


def _workers(wanted: int | None, total: int | None) -> int:
    if wanted is not None:
        return wanted
    return available_cores() if total is None else min(available_cores(), -(-total // FEW_PAIRS) or 1)


def _copy_without_duplicates(
    first: Split, mask: NDArray[np.bool_], writer: ShardWriter, *, tally: Tally
) -> None:
    """The second pass: copy the pairs in `mask`, and count the others as duplicates of earlier ones."""
    begin = 0
    with writer, console.progress("dropping duplicates", len(first), unit="pairs") as progress:
        for block in first.blocks(COPIED):
            corpora = block["corpus"]
            assert not isinstance(corpora, Ragged)
            wanted = np.array(mask[begin : begin + len(corpora)])
            dropped = np.bincount(corpora[~wanted], minlength=len(tally))
            tally[:, DUPLICATE] += dropped
            tally[:, KEPT] -= dropped
            writer.write(
                {
                    name: part.select(wanted) if isinstance(part, Ragged) else part[wanted]
                    for name, part in block.items()
                }
            )
            begin += len(corpora)
            progress.advance(len(corpora))


# What is said of it


def _show(train: Sequence[Head], dev: Head | None) -> None:
    names = [_short(head["name"]) for head in train]
    if len(set(names)) < len(names):
        names = [head["name"] for head in train]
    rows = [_row(name, head) for name, head in zip(names, train, strict=True)]
    if len(train) > 1:
        rows.append(_row("total", _sum(train)))
    if dev is not None:
        rows.append(_row(f"dev: {_short(dev['name'])}", dev))
    heads = ["corpus", "read", *RULES, "kept"]
    if len(rows) <= STACKED:
        heads, *rows = (list(column) for column in zip(heads, *rows, strict=True))
    console.table("Pairs by the rule that dropped them", heads, rows)
    if dev is not None:
        console.say("of the dev set only empty pairs are dropped")


def _short(name: str) -> str:
    """A corpus name without folders, so that the table fits a terminal."""
    return ",".join(part.rpartition("/")[2] for part in name.split(","))


def _row(name: str, head: Head) -> list[str]:
    return [name, f"{head['read']:,}", *(f"{head['dropped'][rule]:,}" for rule in RULES), f"{head['kept']:,}"]


def _sum(heads: Sequence[Head]) -> Head:
    dropped = {rule: sum(head["dropped"][rule] for head in heads) for rule in RULES}
    return {key: sum(head[key] for head in heads) for key in ("read", "kept")} | {"dropped": dropped}


def _summary(prepared: PreparedSet) -> str:
    train = prepared.index["splits"]["train"]
    source, target = prepared.languages
    dev = f"{len(prepared.split('dev')):,}" if "dev" in prepared.splits else "none"
    return (
        f"{prepared.folder}: {train['pairs']:,} training pairs with "
        f"{train['values']['source.ids']:,} {source} and {train['values']['target.ids']:,} {target} pieces; "
        f"dev pairs: {dev}"
    )
