"""From text to a prepared set: resolve the options, check whether the set is up to date, build it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trmt import console
from trmt.config import Options, check_type
from trmt.errors import ConfigError, DataError
from trmt.sets.building import EncodeCorpora, EncodedCorpora, PrepareJob, build_set
from trmt.sets.encoding import BlockEncoder, available_cores, encode_blocks, read_blocks
from trmt.sets.index import FORMAT, INDEX
from trmt.sets.shards import PreparedSet
from trmt.storage.files import atomic_folder, checksum, remove_stale_partials
from trmt.text.corpus import Corpus, find_languages, parse_corpus, unknown_languages
from trmt.text.filters import LengthLimits
from trmt.text.lines import STDIN
from trmt.text.pairs import corpus_fingerprint, count_pairs
from trmt.text.tokenizer import Tokenizer
from trmt.text.tokenizer_folders import find_tokenizer
from trmt.trees import TreeError, read_json

PAIRS_PER_WORKER = 50_000  # at least: a worker process takes a second to start


@dataclass(frozen=True)
class PrepareOptions(Options):
    """The options of `trmt prepare` for pairs."""

    train: Sequence[str]  # corpora of the training pairs, as `parse_corpus` takes them
    dev: str | None = None  # the corpus to validate on
    out: Path | None = None  # the folder to write; None: data/SOURCE-TARGET
    dev_size: int | None = None  # pairs to take for validation without `dev`; None: 5 %, at most 500
    tokenizer: Path | None = None  # the folder of the tokenizer; None: the one in data/ for the languages
    languages: tuple[str | None, str | None] = (None, None)  # source and target; None: those of the tokenizer
    columns: tuple[str | None, str | None] = (
        None,
        None,
    )  # of source and target text, for corpora with columns
    limits: LengthLimits = field(default_factory=LengthLimits)  # of the length filters
    keep_duplicates: bool = False  # whether a training pair may occur more than once
    alignments: Sequence[str] = ()  # files of word alignments, one for each training corpus
    workers: int | None = None  # worker processes; None: one per core, fewer for little text
    force: bool = False  # whether to prepare a set again that is up to date

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train:
            raise ConfigError("there is nothing to prepare; name a corpus with --train")
        if self.alignments and len(self.alignments) != len(self.train):
            raise ConfigError(
                f"there are {len(self.alignments)} files of --alignments and {len(self.train)} of --train; "
                "name one for each, in the same order"
            )
        if self.dev_size is not None and self.dev_size < 0:
            raise ConfigError(f"--dev-size {self.dev_size} is no number of pairs; choose 0 or more")
        if self.dev_size and self.dev is not None:
            raise ConfigError(
                "--dev names the dev set, and --dev-size takes one from --train; give one of them"
            )
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers {self.workers} is not enough; choose at least 1")


def prepare(options: PrepareOptions, *, encode: EncodeCorpora | None = None) -> PreparedSet:
    """Prepare a set unless it is up to date; it is replaced atomically.

    The same inputs and options give the same bytes for any number of workers. With more than one, the calling
    script needs the usual `if __name__ == "__main__":`, because workers import it. `encode` replaces the
    local workers.
    """
    check_type(options, PrepareOptions, "options")
    job = _resolve(options)
    made_from = _made_from(job)
    if not options.force and (existing := _existing(job, made_from)):
        return existing
    check_replaceable(job.out, job.languages)
    remove_stale_partials(job.out)
    if job.out.exists() and made_from is not None and not is_up_to_date(job.out, made_from):
        console.say(f"replacing {job.out}, which was made from other text or with other options")
    with atomic_folder(job.out) as folder:
        build_set(job, folder, made_from=made_from, encode=encode or _encode_locally)
    prepared = PreparedSet.open(job.out)
    console.say(f"wrote {_summary(prepared)}")
    return prepared


def _existing(job: PrepareJob, made_from: dict[str, Any] | None) -> PreparedSet | None:
    """The set in the folder, if it is up to date."""
    if made_from is None:
        return None
    without = {key: value for key, value in made_from.items() if key != "dev_size"}
    by_default = job.dev is None and job.dev_size is None
    if not (is_up_to_date(job.out, made_from) or (by_default and is_up_to_date(job.out, without))):
        return None
    found = PreparedSet.open(job.out)
    # A run may have been started on a set without dev set, so the default does not replace it.
    hint = ", with a dev set" if by_default and "dev" not in found.splits else ""
    console.say(f"{_summary(found)}; up to date, --force prepares it again{hint}")
    return found


def _summary(prepared: PreparedSet) -> str:
    train = prepared.index["splits"]["train"]
    source, target = prepared.languages
    dev = f"{len(prepared.split('dev')):,}" if "dev" in prepared.splits else "none"
    return (
        f"{prepared.folder}: {train['pairs']:,} training pairs with "
        f"{train['values']['source.ids']:,} {source} and {train['values']['target.ids']:,} {target} pieces; "
        f"dev pairs: {dev}"
    )


# The job


def _resolve(options: PrepareOptions) -> PrepareJob:
    named = find_languages(options.train, *options.languages)
    folder = options.tokenizer or find_tokenizer(*named)
    tokenizer = Tokenizer.load(folder)
    languages = _languages(options, named, tokenizer, folder)
    source, target = options.columns

    def parse(text: str) -> Corpus:
        return parse_corpus(text, *languages, source_column=source, target_column=target)

    job = PrepareJob(
        out=options.out or Path("data", f"{languages[0]}-{languages[1]}"),
        languages=languages,
        columns=options.columns,
        tokenizer=tokenizer,
        train=tuple(map(parse, options.train)),
        dev=parse(options.dev) if options.dev is not None else None,
        dev_size=options.dev_size,
        limits=options.limits,
        keep_duplicates=options.keep_duplicates,
        alignments=tuple(options.alignments),
        workers=options.workers,
    )
    if sum(STDIN in corpus.paths for corpus in job.corpora) > 1:
        raise ConfigError("standard input can be read only once; give - to one corpus")
    if job.out.name in ("", ".."):
        raise ConfigError(f"{job.out} cannot be replaced as a whole; name a folder of its own for the set")
    return job


def _languages(
    options: PrepareOptions, named: tuple[str | None, str | None], tokenizer: Tokenizer, folder: Path
) -> tuple[str, str]:
    """The languages: those given, else those of the tokenizer, else those that files are named after."""
    source, target = (
        given or known or name
        for given, known, name in zip(options.languages, tokenizer.languages, named, strict=True)
    )
    if not source or not target:
        raise unknown_languages(options.train)
    if all(tokenizer.languages) and (source, target) != tokenizer.languages:
        raise ConfigError(
            f"the tokenizer in {folder} was trained for {' to '.join(tokenizer.languages)}, not "
            f"{source} to {target}; train one for this direction or change --from and --to"
        )
    if all(named) and named != (source, target):
        console.warn(
            f"the corpus is named {named[0]} to {named[1]}, but the tokenizer in {folder} is for {source} to "
            f"{target}"
        )
    return source, target


def _made_from(job: PrepareJob) -> dict[str, Any] | None:
    """Everything that decides the contents of the set; None if an input cannot be compared."""
    inputs = []
    for corpus in job.corpora:
        content = corpus_fingerprint(corpus)
        if content is None:
            return None
        inputs.append({"name": corpus.name, "weight": corpus.weight, "content": content})
    return {
        "format": FORMAT,
        "tokenizer": job.tokenizer.fingerprint,
        "languages": list(job.languages),
        "columns": list(job.columns),
        "max_length": job.limits.max_length,
        "max_ratio": job.limits.max_ratio,
        "keep_duplicates": job.keep_duplicates,
        "dev": job.dev is not None,
        "inputs": inputs,
        **_alignment_checksums(job.alignments),
        **({"dev_size": job.dev_size or "default"} if job.dev is None and job.dev_size != 0 else {}),
    }


def _alignment_checksums(paths: Sequence[str]) -> dict[str, Any]:
    """An entry for alignments; none without any, so that sets of older versions stay up to date."""
    for path in paths:
        if not Path(path).is_file():
            raise DataError(f"there is no file {path} for --alignments; check the path")
    return {"alignments": [checksum(Path(path)) for path in paths]} if paths else {}


def _encode_locally(job: PrepareJob, encoder: BlockEncoder) -> EncodedCorpora:
    sizes = [count_pairs(corpus) for corpus in job.train]
    total = None if None in sizes else sum(filter(None, sizes))
    workers = job.workers or _default_workers(total)
    encoded = encode_blocks(read_blocks(job.train, job.alignments), encoder, workers=workers)
    return EncodedCorpora(f"encoding with {workers} worker{'s' * (workers > 1)}", total, encoded)


def _default_workers(total: int | None) -> int:
    cores = available_cores()
    return cores if total is None else min(cores, -(-total // PAIRS_PER_WORKER) or 1)


# The folder


def is_up_to_date(out: Path, made_from: dict[str, Any] | None) -> bool:
    """Whether the folder has a set that was made from the same inputs and options."""
    if made_from is None:
        return False
    try:
        return PreparedSet.open(out).index.get("made_from") == made_from
    except DataError:
        return False


def check_replaceable(out: Path, languages: tuple[str, str]) -> None:
    """Refuse to replace a folder with files that are not of a prepared set, or a set for other languages."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError(f"{out} is a file; choose another name for the prepared set")
    try:
        index = read_json(out / INDEX)
        known, before = set(index["files"]) | {INDEX}, tuple(index["languages"])
    except (OSError, TreeError, KeyError, TypeError):
        known, before = set(), languages
    if before != languages:
        raise ConfigError(
            f"{out} holds the prepared set for {' to '.join(before)}, which would be lost; choose another "
            f"folder for {' to '.join(languages)}"
        )
    found = (path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir())
    other = next((name for name in found if name not in known), None)
    if other is not None:
        raise ConfigError(
            f"{out} holds {other}, which is not of a prepared set and would be lost; "
            "move it away or choose another folder"
        )
