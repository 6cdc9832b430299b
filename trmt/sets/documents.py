"""From documents in one language to a prepared set: their sentences, and which document each is of.

A file holds one sentence a line and a blank line between documents, as BERT's own data does. The set is one
to pretrain on: columns `text.ids` and `document`, without filters but the one for length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trmt import console
from trmt.errors import ConfigError, DataError
from trmt.sets import shards
from trmt.sets.preparing import check_replaceable, id_type, is_up_to_date, sweep
from trmt.sets.shards import Column, PreparedSet, Ragged, ShardWriter, describe_file
from trmt.storage.files import atomic_folder, checksum
from trmt.text.corpus import lines
from trmt.text.tokenizer import Side, Tokenizer

TOGETHER = 4096  # sentences that are encoded at a time


@dataclass(frozen=True)
class DocumentOptions:
    """What `prepare --documents` is asked for."""

    train: tuple[str, ...]
    """Files of documents."""
    dev: str | None = None
    """The file of the documents to validate on."""
    out: Path | None = None
    """The folder to write; by itself data/documents-LANGUAGE."""
    tokenizer: Path = Path("data/tokenizer")
    """The folder of the tokenizer."""
    language: str | None = None
    """The language of the documents; by itself the one translated from."""
    max_length: int = 250
    """The most pieces that a sentence may have."""
    force: bool = False
    """Whether to prepare again what is up to date."""


def prepare_documents(options: DocumentOptions) -> PreparedSet:
    """Prepare a set of documents, or find it up to date; the folder appears whole or stays as it was."""
    tokenizer = Tokenizer.load(options.tokenizer)
    side = _side(options, tokenizer)
    language = tokenizer.languages[side == "target"] or options.language or "text"
    out = options.out or Path("data", f"documents-{language}")
    made_from = _made_from(options, tokenizer, side)
    if not options.force and is_up_to_date(out, made_from):
        there = PreparedSet.open(out)
        console.say(f"{_summary(there)}; up to date, --force prepares it again")
        return there
    check_replaceable(out)
    sweep(out)
    with atomic_folder(out) as folder:
        _build(options, tokenizer, side, language, folder=folder, made_from=made_from)
    made = PreparedSet.open(out)
    console.say(f"wrote {_summary(made)}")
    return made


def _side(options: DocumentOptions, tokenizer: Tokenizer) -> str:
    """Whether documents are in the language translated from or in the one translated to."""
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
            f"--language {target} is what is written, {options.tokenizer} has a model for each language, "
            f"and an encoder reads the other one; give documents in {source}, or train a joint tokenizer"
        )
    return side


def _made_from(options: DocumentOptions, tokenizer: Tokenizer, side: str) -> dict[str, Any] | None:
    files = [*options.train, *([options.dev] if options.dev else [])]
    if "-" in files:
        return None
    for name in files:
        if not Path(name).is_file():
            raise DataError(f"there is no file {name}; check the path")
    return {
        "format": shards.FORMAT,
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
    half: Side = tokenizer.source if side == "source" else tokenizer.target
    splits: dict[str, Any] = {}
    files: dict[str, Any] = {}
    heads: dict[str, dict[str, int]] = {}
    if options.dev is None:
        console.warn("without --dev there will be nothing to validate on")
    for split, names in (("dev", [options.dev] if options.dev else []), ("train", options.train)):
        if not names:
            continue
        writer, heads[split] = _write(half, folder, split, names, max_length=options.max_length)
        splits[split] = writer.entry()
        files |= writer.files
        if not splits[split]["pairs"]:
            raise DataError(
                f"no sentence of {', '.join(names)} is left; check the text, or raise --max-length"
            )
    for path in sorted((folder / shards.TOKENIZER).rglob("*")):
        files[path.relative_to(folder).as_posix()] = describe_file(path)
    _show(heads)
    shards.write_index(
        folder,
        {
            "kind": shards.DOCUMENTS,
            "side": side,
            "languages": [language, language],
            "tokenizer": tokenizer.fingerprint,
            "vocabulary": [half.vocabulary, half.vocabulary],
            "corpora": [{"name": ", ".join(options.train), "weight": 1.0, **heads["train"]}],
            "dev": heads.get("dev"),
            "splits": splits,
            "made_from": made_from,
            "files": files,
        },
    )


Sentences = list[tuple[int, str]]  # with the number of the document


def _write(
    side: Side, folder: Path, split: str, names: Any, *, max_length: int
) -> tuple[ShardWriter, dict[str, int]]:
    """Write the sentences of some files; documents are counted through all of them."""
    columns = (Column("text.ids", id_type(side.vocabulary)), Column("document", "<u4", ragged=False))
    counts = {"documents": 0, "read": 0, "too long": 0, "kept": 0}
    with ShardWriter(folder, split, columns=columns) as writer:
        for block in _blocks(names, counts):
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
                writer.write({"text.ids": Ragged(flat, lengths), "document": document})
    return writer, counts


def _blocks(names: Any, counts: dict[str, int]) -> Iterator[Sentences]:
    """The sentences of all files with their documents' numbers, some at a time."""
    block: Sentences = []
    for name in names:
        inside = False
        for line in lines(name):
            if not line.strip():
                inside = False
                continue
            counts["documents"] += not inside
            counts["read"] += 1
            inside = True
            block.append((counts["documents"] - 1, line))
            if len(block) == TOGETHER:
                yield block
                block = []
    if block:
        yield block


def _show(heads: dict[str, dict[str, int]]) -> None:
    columns = list(heads["train"])
    rows = [[split, *(f"{heads[split][name]:,}" for name in columns)] for split in heads]
    console.table("Sentences of documents", ["set", *columns], rows)


def _summary(prepared: PreparedSet) -> str:
    train = prepared.index["splits"]["train"]
    dev = f"{len(prepared.split('dev')):,}" if "dev" in prepared.splits else "none"
    documents = prepared.index["corpora"][0]["documents"]
    return (
        f"{prepared.folder}: {documents:,} documents of {train['pairs']:,} sentences with "
        f"{train['values']['text.ids']:,} {prepared.languages[0]} pieces; dev sentences: {dev}"
    )
