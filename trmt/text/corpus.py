"""Where sentence pairs come from: two files, TSV, JSONL, Parquet, standard input, Hugging Face datasets.

Plain text goes through `lines` and nothing else: `\\n` alone ends a line, a tab splits a TSV row, quotes mean
nothing. Parquet files and data sets of the hub are streamed through `datasets`. This file knows nothing of
tokenizers or of filtering; whatever it cannot read is an error that names the file and the line.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, Literal

from trmt.errors import ConfigError, DataError
from trmt.storage import remote
from trmt.storage.remote import checksum
from trmt.text.ranges import Slice, reading

Kind = Literal["two files", "tsv", "jsonl", "parquet", "dataset"]
Pair = tuple[str, str]

STDIN = "-"
DATASET = "hf:"
DEFAULT_COLUMNS = ("source", "target")
BOM = b"\xef\xbb\xbf"

FORMS = (
    "a corpus is SOURCE,TARGET (two files), one .tsv, .jsonl or .parquet file, a prefix such as data/train "
    "that stands for one file per language, hf:NAME, or - for TSV on standard input"
)


@dataclass(frozen=True)
class Corpus:
    """One corpus as the user named it, with what is needed to read it."""

    name: str  # as typed, without the weight
    kind: Kind
    paths: tuple[str, ...]  # files in reading order; for a data set its name or folder
    languages: Pair
    columns: tuple[str, str] | None = None  # None: found by the rules of the kind
    weight: float = 1.0
    config: str | None = None  # of a data set
    split: str = "train"  # of a data set
    slices: tuple[Slice, ...] | None = None  # what to read of each file; None: all of it
    cells: int | None = None  # that a row of a TSV file has; None: as many as the first


# Naming a corpus


def parse_corpus(
    text: str,
    source_language: str,
    target_language: str,
    *,
    source_column: str | None = None,
    target_column: str | None = None,
) -> Corpus:
    """The corpus that `text` stands for; its files are looked for at once, so a typing error dies early."""
    name, weight = _split_weight(text)
    languages = (source_language, target_language)
    kind, paths = _find(name, languages)
    config, split = None, "train"
    if kind == "dataset":
        dataset, config, split = _split_dataset(name)
        paths = (dataset,)
    return Corpus(
        name=name,
        kind=kind,
        paths=paths,
        languages=languages,
        columns=_parse_columns(kind, source_column, target_column),
        weight=weight,
        config=config,
        split=split,
    )


def _split_weight(text: str) -> tuple[str, float]:
    match = re.fullmatch(r"(.+)@(\d+\.?\d*|\.\d+)", text, re.DOTALL)
    if match is None:
        return text, 1.0
    weight = float(match[2])
    if weight == 0:
        raise ConfigError(f"the corpus {text!r} has weight 0 and would never be seen; leave it out instead")
    return match[1], weight


def _find(name: str, languages: Pair) -> tuple[Kind, tuple[str, ...]]:
    if name == STDIN:
        return "tsv", (STDIN,)
    if name.startswith(DATASET):
        return "dataset", ()
    kind = _kind_of_file(name)
    if kind is not None:
        return kind, (_existing(name),)
    if "," in name:
        return "two files", _two_files(name)
    if remote.is_file(name):
        raise DataError(f"{name} alone is one side of a corpus, or of a type that cannot be read; {FORMS}")
    return "two files", _with_prefix(name, languages)


def _kind_of_file(name: str) -> Kind | None:
    # A comma is allowed inside the name of a file that is there; otherwise a.tsv,b.tsv are two files.
    if "," in name and not remote.is_file(name):
        return None
    plain = name.lower().removesuffix(".gz")
    if plain.endswith(".tsv"):
        return "tsv"
    if plain.endswith(".jsonl"):
        return "jsonl"
    return "parquet" if name.lower().endswith(".parquet") else None


def _existing(name: str) -> str:
    if not remote.is_file(name):
        raise DataError(f"there is no file {name}; check the path")
    return name


def _two_files(name: str) -> tuple[str, str]:
    source, _, target = name.partition(",")
    if not source or not target or "," in target:
        raise ConfigError(
            f"cannot tell the two files in {name!r}; write SOURCE,TARGET with one comma between"
        )
    return _existing(source), _existing(target)


def _with_prefix(prefix: str, languages: Pair) -> tuple[str, str]:
    found = []
    for language in languages:
        wanted = (f"{prefix}.{language}", f"{prefix}.{language}.gz")
        there = [name for name in wanted if remote.is_file(name)]
        if len(there) > 1:
            raise DataError(f"there are both {wanted[0]} and {wanted[1]}; name the two files you mean")
        if not there:
            raise DataError(f"the corpus {prefix!r} needs {wanted[0]} or {wanted[1]}, not found; {FORMS}")
        found.append(there[0])
    return found[0], found[1]


def _split_dataset(name: str) -> tuple[str, str | None, str]:
    """The data set (or its folder), its configuration, and its split."""
    rest, split = name.removeprefix(DATASET), "train"
    match = re.fullmatch(r"(.+):([\w.-]+)", rest)
    if match is not None:
        rest, split = match[1], match[2]
    if not rest.strip("/"):
        raise ConfigError(
            f"{name!r} names no data set; write hf:NAME or hf:NAME/CONFIG, then :SPLIT if not train"
        )
    if Path(rest).is_dir():
        return rest, None, split
    parent, _, last = rest.rpartition("/")
    if parent and Path(parent).is_dir():
        return parent, last, split
    if rest.count("/") > 1:
        owner, dataset, config = rest.split("/", 2)
        return f"{owner}/{dataset}", config, split
    return rest, None, split


def _parse_columns(kind: Kind, source: str | None, target: str | None) -> tuple[str, str] | None:
    if (source is None) != (target is None):
        raise ConfigError("--source-column and --target-column go together; give both")
    if source is None or target is None or kind == "two files":
        return None
    if kind == "tsv" and not (_is_index(source) and _is_index(target)):
        raise ConfigError(
            f"a TSV file has numbered columns, so --source-column {source} --target-column {target} "
            "cannot be found; count from 0"
        )
    return source, target


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit()


# Reading


def pairs(corpus: Corpus) -> Iterator[Pair]:
    """The pairs of a corpus in order; no text holds a `\\n`, and all of it can be written as UTF-8.

    A newline inside a JSON, Parquet or data set text becomes a space, a null an empty text.
    """
    files: Sequence[str | Slice] = corpus.slices or corpus.paths
    if corpus.kind == "two files":
        return _pairs_of_two_files(files[0], files[1])
    if corpus.kind == "tsv":
        return _pairs_of_tsv(files[0], corpus.columns, corpus.cells)
    if corpus.kind == "jsonl":
        return _pairs_of_rows(corpus, _json_rows(files[0]))
    return _pairs_of_rows(corpus, _dataset_rows(corpus))


def lines(path: str | Path | Slice) -> Iterator[str]:
    """The lines of a UTF-8 file or of a part of it, plain or .gz, or of standard input for `-`.

    `\\n` alone ends a line, a `\\r` right before it is dropped with it; every other character, a lone CR or
    U+2028 included, is text. The last line needs no newline.
    """
    shown = _shown(path)
    before = number = _before(path)
    with ExitStack() as stack:
        stream = _open(path, stack)
        try:
            for number, raw in enumerate(stream, start=before + 1):
                if number == 1:
                    raw = raw.removeprefix(BOM)
                    if not raw:  # the file holds a byte order mark and nothing else
                        return
                if raw.endswith(b"\n"):
                    raw = raw[:-2] if raw.endswith(b"\r\n") else raw[:-1]
                yield raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{shown}, line {number}: not valid UTF-8 (byte 0x{error.object[error.start]:02x} at "
                f"position {error.start + 1} of the line); convert the file to UTF-8, for example with iconv"
            ) from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{shown} is damaged after line {number} ({error}); fetch or pack it again"
            ) from error
        except OSError as error:
            raise _unreadable(shown, error) from error


def _before(path: str | Path | Slice) -> int:
    """How many lines of the file stand before the first one that is read."""
    return path.range.first if isinstance(path, Slice) else 0


def _open(path: str | Path | Slice, stack: ExitStack) -> BinaryIO:
    if str(path) == STDIN:
        return sys.stdin.buffer
    name = path.file if isinstance(path, Slice) else str(path)
    stream = stack.enter_context(remote.opened(name))
    if isinstance(path, Slice):
        stream = stack.enter_context(reading(stream, path))
    if name.lower().endswith(".gz"):
        return stack.enter_context(gzip.open(stream, "rb"))  # type: ignore[return-value]
    return stream


def _unreadable(shown: str, error: OSError) -> DataError:
    return DataError(f"cannot read {shown}: {error.strerror or error}; check the path and its permissions")


def _shown(path: str | Path | Slice) -> str:
    if isinstance(path, Slice):
        return path.file
    return "standard input" if str(path) == STDIN else str(path)


def _pairs_of_two_files(source: str | Slice, target: str | Slice) -> Iterator[Pair]:
    sources, targets = lines(source), lines(target)
    for number, (one, other) in enumerate(zip_longest(sources, targets), start=_before(source) + 1):
        if one is None or other is None:
            rest = 1 + sum(1 for _ in (targets if one is None else sources))
            counts = (number - 1, number - 1 + rest) if one is None else (number - 1 + rest, number - 1)
            raise DataError(
                f"{_shown(source)} has {counts[0]:,} lines but {_shown(target)} has {counts[1]:,}, so "
                "they are not translations line by line; find where they come apart"
            )
        yield one, other


def _pairs_of_tsv(path: str | Slice, columns: tuple[str, str] | None, expected: int | None) -> Iterator[Pair]:
    source, target = (int(columns[0]), int(columns[1])) if columns else (0, 1)
    expected = 2 if columns is None else expected
    for number, line in enumerate(lines(path), start=_before(path) + 1):
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
                else "mend the line"
            )
            raise DataError(
                f"{_shown(path)}, line {number}: {len(cells)} tab-separated columns where {expected} were "
                f"expected; {hint}"
            )
        yield cells[source], cells[target]


Row = tuple[str, Mapping[str, Any]]  # where it stands, for messages, and what it holds


def _json_rows(path: str | Slice) -> Iterator[Row]:
    for number, line in enumerate(lines(path), start=_before(path) + 1):
        where = f"{_shown(path)}, line {number}"
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


def _pairs_of_rows(corpus: Corpus, rows: Iterator[Row]) -> Iterator[Pair]:
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
    """The row, with the texts of the hub's `{"translation": {"en": ..., "de": ...}}` beside its own."""
    nested = row.get("translation")
    return {**nested, **row} if isinstance(nested, dict) else row


def _default_columns(where: str, cells: Mapping[str, Any], languages: Pair) -> Pair:
    for wanted in (languages, DEFAULT_COLUMNS):
        if all(name in cells for name in wanted):
            return wanted
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
            raise DataError(f"{where}: column {column!r} holds a broken character; mend the text") from error
    return text.replace("\n", " ")


def _dataset_rows(corpus: Corpus) -> Iterator[Row]:
    shown = corpus.name
    number = 0
    try:
        for number, row in enumerate(_open_dataset(corpus), start=1):
            yield f"{shown}, row {number}", row
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # `datasets` promises nothing about what it raises
        reason = " ".join(str(error).split())
        place = f"after row {number}" if number else "at all"
        raise DataError(
            f"cannot read {shown} {place} ({type(error).__name__}: {reason}); "
            "check its name, configuration and split, and the network"
        ) from error


def _open_dataset(corpus: Corpus) -> Any:
    import datasets

    datasets.disable_progress_bars()
    (path,) = corpus.paths
    if corpus.kind == "parquet":
        # A glob character in the file's name must not be taken for a pattern.
        whole = path if remote.is_remote(path) else str(Path(path).resolve())
        found = re.sub(r"([\[\]*?])", r"[\1]", whole)
        return datasets.load_dataset("parquet", data_files=found, split="train", streaming=True)
    if Path(path, "state.json").is_file() or Path(path, "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(path)
        return saved[corpus.split] if isinstance(saved, datasets.DatasetDict) else saved
    builder = _dataset_builder(datasets.load_dataset_builder, corpus)
    # Their readers lose rows without a word: csv at a stray quote, text at a lone carriage return.
    if builder.name in ("csv", "text"):
        raise DataError(
            f"{corpus.name} is stored as {builder.name}, which `datasets` does not read faithfully; "
            "download its files and name them as TSV or plain text"
        )
    return builder.as_streaming_dataset(split=corpus.split)


def _dataset_builder(load: Callable[..., Any], corpus: Corpus) -> Any:
    from datasets.exceptions import DatasetNotFoundError

    (path,) = corpus.paths
    try:
        return load(path, corpus.config)
    except DatasetNotFoundError:
        # `hf:wmt16/de-en` may be owner/name as well as name/configuration; the hub alone knows.
        name, _, config = path.partition("/")
        if corpus.config is not None or not config or Path(path).exists():
            raise
        return load(name, config)


def settled(corpus: Corpus) -> Corpus:
    """The corpus with all that its first row decides, so that any part of it is read as the whole is."""
    if corpus.kind == "tsv" and corpus.columns:
        first = next(lines(corpus.paths[0]), "")
        wanted = max(map(int, corpus.columns)) + 1
        return replace(corpus, cells=max(first.count("\t") + 1, wanted) if first else None)
    if corpus.kind == "jsonl" and corpus.columns is None:
        for where, row in _json_rows(corpus.paths[0]):
            if row:
                return replace(corpus, columns=_default_columns(where, _cells(row), corpus.languages))
    return corpus


# Knowing a corpus again


def fingerprint(corpus: Corpus) -> list[str] | None:
    """What tells whether a corpus has changed: checksums of its files; None for standard input.

    A data set of the hub is taken to be the same as long as its name, configuration and split are.
    """
    if corpus.paths == (STDIN,):
        return None
    if corpus.kind != "dataset":
        return [checksum(path) for path in corpus.paths]
    folder = Path(corpus.paths[0])
    if not folder.is_dir():
        return [f"{corpus.paths[0]} {corpus.config} {corpus.split}"]
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [f"{file.relative_to(folder).as_posix()} {checksum(str(file))}" for file in files]


def count(corpus: Corpus) -> int | None:
    """How many pairs there should be, where that is cheap to tell: a total for progress, no promise."""
    if corpus.kind == "dataset" or corpus.paths == (STDIN,):
        return None
    if corpus.kind == "parquet":
        from pyarrow import ArrowException
        from pyarrow.parquet import read_metadata

        try:
            return int(read_metadata(corpus.paths[0]).num_rows)
        except (ArrowException, OSError):
            return None  # reading it will say what is wrong
    with ExitStack() as stack:
        stream = _open(corpus.paths[0], stack)
        try:
            return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
        except (OSError, EOFError, zlib.error):
            return None
