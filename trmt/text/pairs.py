"""The sentence pairs of a corpus; its fingerprint and size.

A tab splits a row of a TSV file, and quotes have no meaning. Datasets of the Hugging Face hub are streamed
through `datasets`. Nothing here knows tokenizers or filters. Text that cannot be read is an
error with the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from trmt.errors import DataError
from trmt.storage.files import checksum, open_file
from trmt.storage.urls import is_url, read_errors
from trmt.text.corpus import Corpus, TextPair, is_stream
from trmt.text.lines import display_name, lines_before, open_text, read_lines
from trmt.text.parquet import parquet_rows
from trmt.text.ranges import FileSlice

MAX_FILES = 10_000  # of a dataset in a folder
DEFAULT_COLUMNS = ("source", "target")

Row = tuple[str, Mapping[str, Any]]  # where it is, for error messages, and its values


def read_corpus(corpus: Corpus) -> Iterator[TextPair]:
    """The pairs of a corpus in order; no text has a `\\n`, and every text can be encoded as UTF-8.

    A newline inside a JSON, Parquet or dataset text becomes a space, a null an empty text.
    """
    files: Sequence[str | FileSlice] = corpus.slices or corpus.paths
    if corpus.format == "two files":
        return _pairs_of_two_files(files[0], files[1])
    if corpus.format == "tsv":
        return _pairs_of_tsv(files[0], corpus.columns, corpus.cells)
    if corpus.format == "jsonl":
        return _pairs_of_rows(corpus, _json_rows(files[0]))
    return _pairs_of_rows(corpus, _dataset_rows(corpus))


def _pairs_of_two_files(source: str | FileSlice, target: str | FileSlice) -> Iterator[TextPair]:
    sources, targets = read_lines(source), read_lines(target)
    for number, (one, other) in enumerate(zip_longest(sources, targets), start=lines_before(source) + 1):
        if one is None or other is None:
            rest = 1 + sum(1 for _ in (targets if one is None else sources))
            counts = (number - 1, number - 1 + rest) if one is None else (number - 1 + rest, number - 1)
            raise DataError(
                f"{display_name(source)} has {counts[0]:,} lines but {display_name(target)} has "
                f"{counts[1]:,}, so they are not translations line by line; find the line where they diverge"
            )
        yield one, other


def _pairs_of_tsv(
    file: str | FileSlice, columns: tuple[str, str] | None, expected: int | None
) -> Iterator[TextPair]:
    source, target = (int(columns[0]), int(columns[1])) if columns else (0, 1)
    expected = 2 if columns is None else expected
    for number, line in enumerate(read_lines(file), start=lines_before(file) + 1):
        if not line:
            yield "", ""
            continue
        cells = line.split("\t")
        if expected is None:
            expected = max(len(cells), source + 1, target + 1)
        if len(cells) != expected:
            hint = (
                "choose columns with --source-column and --target-column"
                if columns is None and len(cells) > 2
                else "correct the line"
            )
            raise DataError(
                f"{display_name(file)}, line {number}: {len(cells)} tab-separated columns where {expected} "
                f"were expected; {hint}"
            )
        yield cells[source], cells[target]


def _json_rows(file: str | FileSlice) -> Iterator[Row]:
    for number, line in enumerate(read_lines(file), start=lines_before(file) + 1):
        where = f"{display_name(file)}, line {number}"
        if not line.strip():
            yield where, {}
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({error}); each line holds one object") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON {type(row).__name__} where an object was expected")
        yield where, row


def _pairs_of_rows(corpus: Corpus, rows: Iterator[Row]) -> Iterator[TextPair]:
    columns = corpus.columns
    for where, row in rows:
        if not row:  # a blank line
            yield "", ""
            continue
        cells = _cells(row)
        if columns is None:
            columns = _default_columns(where, cells, corpus.languages)
        yield _text(where, cells, columns[0]), _text(where, cells, columns[1])


def _cells(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of a row, with those of the hub's nested `{"translation": {"en": ..., "de": ...}}`."""
    nested = row.get("translation")
    return {**nested, **row} if isinstance(nested, dict) else row


def _default_columns(where: str, cells: Mapping[str, Any], languages: tuple[str, str]) -> tuple[str, str]:
    for columns in (languages, DEFAULT_COLUMNS):
        if all(name in cells for name in columns):
            return columns
    raise DataError(
        f"{where}: neither {languages[0]!r} and {languages[1]!r} nor 'source' and 'target' among the columns "
        f"{', '.join(map(repr, cells))}; choose with --source-column and --target-column"
    )


def _text(where: str, cells: Mapping[str, Any], column: str) -> str:
    if column not in cells:
        raise DataError(f"{where}: no column {column!r}; there are {', '.join(map(repr, cells))}")
    text = cells[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise DataError(f"{where}: column {column!r} holds a {type(text).__name__}, not text")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise DataError(
                f"{where}: column {column!r} holds a broken character; correct the text"
            ) from error
    return text.replace("\n", " ")


# Datasets


def _dataset_rows(corpus: Corpus) -> Iterator[Row]:
    number = 0
    try:
        for number, row in enumerate(_open_dataset(corpus), start=1):
            yield f"{corpus.name}, row {number}", row
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # `datasets` documents no exceptions
        reason = " ".join(str(error).split())
        progress = f"after row {number}" if number else "at all"
        raise DataError(
            f"cannot read {corpus.name} {progress} ({type(error).__name__}: {reason}); "
            "check its name, configuration and split, and the network"
        ) from error


def _open_dataset(corpus: Corpus) -> Any:
    (path,) = corpus.paths
    wanted = corpus.columns or (*corpus.languages, *DEFAULT_COLUMNS)
    if corpus.format == "parquet":
        return parquet_rows(path, wanted)
    import datasets

    datasets.disable_progress_bars()
    if Path(path, "state.json").is_file() or Path(path, "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(path)
        return saved[corpus.split] if isinstance(saved, datasets.DatasetDict) else saved
    builder = _dataset_builder(datasets.load_dataset_builder, corpus)
    # These readers silently lose rows: csv at a stray quote, text at a lone carriage return.
    if builder.name in ("csv", "text"):
        raise DataError(
            f"{corpus.name} is stored as {builder.name}, which `datasets` does not read faithfully; "
            "download its files and name them as TSV or plain text"
        )
    files = (builder.config.data_files or {}).get(corpus.split, []) if builder.name == "parquet" else []
    if files and not any(map(is_url, files)):
        return chain.from_iterable(parquet_rows(file, wanted) for file in files)
    return builder.as_streaming_dataset(split=corpus.split)


def _dataset_builder(load: Callable[..., Any], corpus: Corpus) -> Any:
    from datasets.exceptions import DatasetNotFoundError

    (path,) = corpus.paths
    try:
        return load(path, corpus.config)
    except DatasetNotFoundError:
        # `hf:wmt16/de-en` may be owner/name as well as name/configuration; only the hub knows.
        name, _, config = path.partition("/")
        if corpus.config is not None or not config or Path(path).exists():
            raise
        return load(name, config)


# The corpus as a whole


def resolve_columns(corpus: Corpus) -> Corpus:
    """The corpus with everything that its first row decides, so that any slice is read as the whole is."""
    if corpus.format == "tsv" and corpus.columns:
        first = next(read_lines(corpus.paths[0]), "")
        needed = max(map(int, corpus.columns)) + 1
        return replace(corpus, cells=max(first.count("\t") + 1, needed) if first else None)
    if corpus.format == "jsonl" and corpus.columns is None:
        for where, row in _json_rows(corpus.paths[0]):
            if row:
                return replace(corpus, columns=_default_columns(where, _cells(row), corpus.languages))
    return corpus


def corpus_fingerprint(corpus: Corpus) -> list[str] | None:
    """The checksums of a corpus's files, which tell whether it has changed; None for streams.

    A dataset of the hub is considered unchanged while its name, configuration and split are the same.
    """
    if any(map(is_stream, corpus.paths)):
        return None
    if corpus.format != "dataset":
        return [_checksum(path) for path in corpus.paths]
    folder = Path(corpus.paths[0])
    if not folder.is_dir():
        return [f"{corpus.paths[0]} {corpus.config} {corpus.split}"]
    with read_errors(str(folder)):
        files = list(islice((file for file in folder.rglob("*") if file.is_file()), MAX_FILES + 1))
    if len(files) > MAX_FILES:
        raise DataError(
            f"{folder} has more than {MAX_FILES:,} files, which is the limit of a dataset; name its "
            "own folder"
        )
    return [f"{file.relative_to(folder).as_posix()} {_checksum(str(file))}" for file in sorted(files)]


def _checksum(path: str) -> str:
    with open_file(path) as stream, read_errors(path):
        return checksum(stream)


def count_pairs(corpus: Corpus) -> int | None:
    """The approximate number of pairs, as a total for progress bars; None where counting is slow."""
    if corpus.format == "dataset" or any(map(is_stream, corpus.paths)):
        return None
    if corpus.format == "parquet":
        from pyarrow import ArrowException
        from pyarrow.parquet import read_metadata

        try:
            return int(read_metadata(corpus.paths[0]).num_rows)
        except (ArrowException, OSError):
            return None  # reading it will report the error
    with ExitStack() as stack:
        stream = open_text(corpus.paths[0], stack)
        try:
            return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
        except (OSError, DataError):
            return None  # reading it will report the error
