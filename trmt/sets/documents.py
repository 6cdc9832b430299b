"""From documents in one language to a prepared set for pretraining.

A file has one sentence per line and a blank line between documents, like the data of BERT. The set has the
columns `text.ids` and `document`; sentences that are too long are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trmt import console
from trmt.config import Options
from trmt.errors import ConfigError, DataError
from trmt.sets import shards
from trmt.sets.building import id_dtype
from trmt.sets.index import FORMAT
from trmt.sets.preparing import check_replaceable, is_up_to_date
from trmt.sets.shards import ColumnSpec, PreparedSet, RaggedArray, ShardWriter, describe_file
from trmt.storage.files import atomic_folder, checksum, remove_stale_partials
from trmt.text.corpus import named_language
from trmt.text.lines import STDIN, read_lines
from trmt.text.tokenizer import Side, Tokenizer
from trmt.text.tokenizer_folders import find_tokenizer

BLOCK_SENTENCES = 4096  # encoded at a time

NumberedSentence = tuple[int, str]  # the number of the document, and the text


@dataclass(frozen=True)
class DocumentOptions(Options):
    """The options of `trmt prepare --documents`."""

    train: tuple[str, ...]  # files of documents
    dev: str | None = None  # the file of the documents to validate on
    out: Path | None = None  # the folder to write; None: data/documents-LANGUAGE
    tokenizer: Path | None = None  # the folder of the tokenizer; None: the one in data/ for the language
    language: str | None = None  # of the documents; None: the files' ending, else the tokenizer's source
    max_length: int = 250  # pieces of a sentence
    force: bool = False  # whether to prepare a set again that is up to date


def prepare_documents(options: DocumentOptions) -> PreparedSet:
    """Prepare a set of documents unless it is up to date; it is replaced atomically."""
    named = named_language(options.train)
    folder = options.tokenizer or find_tokenizer(options.language or named)
    tokenizer = Tokenizer.load(folder)
    if options.language is None and named in tokenizer.languages:
        options = replace(options, language=named)
    options = replace(options, tokenizer=folder)
    side = _side(options, tokenizer)
    language = tokenizer.languages[side == "target"] or options.language or "text"
    out = options.out or Path("data", f"documents-{language}")
    made_from = _made_from(options, tokenizer, side)
    if not options.force and is_up_to_date(out, made_from):
        existing = PreparedSet.open(out)
        console.say(f"{_summary(existing)}; up to date, --force prepares it again")
        return existing
    check_replaceable(out, (language, language))
    remove_stale_partials(out)
    with atomic_folder(out) as folder:
        _build(options, tokenizer, side, language, folder=folder, made_from=made_from)
    prepared = PreparedSet.open(out)
    console.say(f"wrote {_summary(prepared)}")
    return prepared


def _side(options: DocumentOptions, tokenizer: Tokenizer) -> str:
    """The side of the tokenizer for the language of the documents: "source" or "target"."""
    source, target = tokenizer.languages
    known = options.language in (None, source, target) or not any(tokenizer.languages)
    if not known:
        raise ConfigError(
            f"the tokenizer in {options.tokenizer} was trained for {source} and {target}, not for "
            f"{options.language}; change --language, or train another tokenizer"
        )
    side = "target" if options.language is not None and options.language == target != source else "source"
    if side == "target" and not tokenizer.joint:
        raise ConfigError(
            f"{options.tokenizer} has a model for each language, and an encoder needs that of {source}, not "
            f"of --language {target}; use documents in {source}, or train a joint tokenizer"
        )
    return side


def _made_from(options: DocumentOptions, tokenizer: Tokenizer, side: str) -> dict[str, Any] | None:
    files = [*options.train, *([options.dev] if options.dev else [])]
    if STDIN in files:
        return None
    for name in files:
        if not Path(name).is_file():
            raise DataError(f"there is no file {name}; check the path")
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "side": side,
        "max_length": options.max_length,
        "dev": options.dev is not None,
        "inputs": [{"name": name, "content": checksum(Path(name))} for name in files],
    }


def _build(
    options: DocumentOptions,
    tokenizer: Tokenizer,
    side: str,
    language: str,
    *,
    folder: Path,
    made_from: dict[str, Any] | None,
) -> None:
    tokenizer.save(folder / shards.TOKENIZER)
    tokenizer_side = tokenizer.source if side == "source" else tokenizer.target
    splits: dict[str, Any] = {}
    files: dict[str, Any] = {}
    counts: dict[str, dict[str, int]] = {}
    if options.dev is None:
        console.warn("there is no --dev set, so training cannot validate")
    for split, names in (("dev", [options.dev] if options.dev else []), ("train", options.train)):
        if not names:
            continue
        writer, counts[split] = _write_split(
            tokenizer_side, folder, split, names, max_length=options.max_length
        )
        splits[split] = writer.entry()
        files |= writer.files
        if not splits[split]["pairs"]:
            raise DataError(
                f"no sentence of {', '.join(names)} is left; check the text, or raise --max-length"
            )
    for path in sorted((folder / shards.TOKENIZER).rglob("*")):
        files[path.relative_to(folder).as_posix()] = describe_file(path)
    _print_report(counts)
    shards.write_index(
        folder,
        {
            "kind": shards.DOCUMENTS,
            "side": side,
            "languages": [language, language],
            "tokenizer": tokenizer.fingerprint,
            "vocabulary": [tokenizer_side.vocabulary, tokenizer_side.vocabulary],
            "corpora": [{"name": ", ".join(options.train), "weight": 1.0, **counts["train"]}],
            "dev": counts.get("dev"),
            "splits": splits,
            "made_from": made_from,
            "files": files,
        },
    )


def _write_split(
    side: Side, folder: Path, split: str, names: Sequence[str], *, max_length: int
) -> tuple[ShardWriter, dict[str, int]]:
    """Write the sentences of some files; documents are numbered across all of them."""
    columns = (
        ColumnSpec("text.ids", id_dtype(side.vocabulary)),
        ColumnSpec("document", "<u4", ragged=False),
    )
    counts = {"documents": 0, "read": 0, "too long": 0, "kept": 0}
    with ShardWriter(folder, split, columns=columns) as writer:
        for block in _read_blocks(names, counts):
            encoded = side.encode([text for _, text in block])
            kept = [
                (number, ids)
                for (number, _), ids in zip(block, encoded, strict=True)
                if len(ids) <= max_length
            ]
            counts["too long"] += len(block) - len(kept)
            kept = [(number, ids) for number, ids in kept if ids]
            counts["kept"] += len(kept)
            lengths = np.array([len(ids) for _, ids in kept], np.int64)
            flat = np.array([token for _, ids in kept for token in ids], np.uint32)
            if kept:
                document = np.array([number for number, _ in kept], np.uint32)
                writer.write({"text.ids": RaggedArray(flat, lengths), "document": document})
    return writer, counts


def _read_blocks(names: Sequence[str], counts: dict[str, int]) -> Iterator[list[NumberedSentence]]:
    """The sentences of all files in blocks; documents and sentences are added to `counts`."""
    block: list[NumberedSentence] = []
    for name in names:
        inside = False
        for line in read_lines(name):
            if not line.strip():
                inside = False
                continue
            counts["documents"] += not inside
            counts["read"] += 1
            inside = True
            block.append((counts["documents"] - 1, line))
            if len(block) == BLOCK_SENTENCES:
                yield block
                block = []
    if block:
        yield block


def _print_report(counts: dict[str, dict[str, int]]) -> None:
    columns = list(counts["train"])
    rows = [[split, *(f"{counts[split][name]:,}" for name in columns)] for split in counts]
    console.table("Sentences of documents", ["set", *columns], rows)


def _summary(prepared: PreparedSet) -> str:
    train = prepared.index["splits"]["train"]
    dev = f"{len(prepared.split('dev')):,}" if "dev" in prepared.splits else "none"
    documents = prepared.index["corpora"][0]["documents"]
    return (
        f"{prepared.folder}: {documents:,} documents of {train['pairs']:,} sentences with "
        f"{train['values']['text.ids']:,} {prepared.languages[0]} pieces; dev sentences: {dev}"
    )
