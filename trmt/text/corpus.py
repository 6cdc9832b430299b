"""Corpora as users name them: two files, TSV, JSONL, Parquet, standard input, Hugging Face datasets.

The files are looked up when a corpus is parsed, so that a wrong name is an error at once. trmt/text/pairs.py
reads the pairs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from trmt.errors import ConfigError, DataError
from trmt.storage.compression import SUFFIXES, without_suffix
from trmt.storage.files import is_file
from trmt.storage.urls import is_url, read_errors
from trmt.text.lines import STDIN
from trmt.text.ranges import FileSlice
from trmt.trees import shown

CorpusFormat = Literal["two files", "tsv", "jsonl", "parquet", "dataset"]
TextPair = tuple[str, str]

DATASET_PREFIX = "hf:"

# Endings of file names: a language code such as en, eng, zh-CN or eng_Latn, and compression.
LANGUAGE_CODE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]{2,8})*")
NO_LANGUAGES = re.compile(
    r"bpe|csv|dat|doc|hyp|lc|low|out|raw|ref|sgm|spm|src|tab|tc|tgt|tok|trg|tsv|txt|xml"
)
COMPRESSED = re.compile(r"\.(gz|bz2|xz|zst)$", re.IGNORECASE)

SYNTAX = (
    "a corpus is SOURCE,TARGET (two files), one .tsv, .jsonl or .parquet file, a prefix such as data/train "
    "that stands for one file per language, hf:NAME, or - for TSV on standard input"
)


@dataclass(frozen=True)
class Corpus:
    """One corpus as the user named it, with what is needed to read it."""

    name: str  # as typed, without the weight
    format: CorpusFormat
    paths: tuple[str, ...]  # files in reading order; the name or folder of a dataset
    languages: tuple[str, str]
    columns: tuple[str, str] | None = None  # of source and target; None: the default columns of the format
    weight: float = 1.0
    config: str | None = None  # of a dataset
    split: str = "train"  # of a dataset
    slices: tuple[FileSlice, ...] | None = None  # the part of each file to read; None: all of it
    cells: int | None = None  # expected in each row of a TSV file; None: as many as in the first row


def parse_corpus(
    text: str,
    source_language: str,
    target_language: str,
    *,
    source_column: str | None = None,
    target_column: str | None = None,
) -> Corpus:
    """The corpus that `text` names; a missing file is an error."""
    name, weight = _split_weight(text)
    languages = (source_language, target_language)
    format, paths = _find(name, languages)
    config, split = None, "train"
    if format == "dataset":
        dataset, config, split = _split_dataset(name)
        paths = (dataset,)
    return Corpus(
        name=name,
        format=format,
        paths=paths,
        languages=languages,
        columns=_parse_columns(format, source_column, target_column),
        weight=weight,
        config=config,
        split=split,
    )


def find_languages(
    texts: Sequence[str], source: str | None, target: str | None
) -> tuple[str | None, str | None]:
    """The languages of some corpora: those given, else those that the names of their files end in.

    None stands for a language that is neither given nor named. A file with one side alone is an error.
    """
    for text in texts:
        name = _split_weight(text)[0]
        if not is_url(name) and _is_one_side(name):
            raise _one_side(name)
    if source and target:
        return source, target
    named = {text: found for text in texts if (found := named_languages(_split_weight(text)[0]))}
    if len({*named.values()}) > 1:
        (one, first), (other, second) = next(
            pair for pair in pairwise(named.items()) if pair[0][1] != pair[1][1]
        )
        raise ConfigError(
            f"{one} is named {' to '.join(first)} but {other} is named {' to '.join(second)}; name the "
            "languages with --from and --to, or give corpora of one direction"
        )
    for first_named, second_named in named.values():
        return source or first_named, target or second_named
    return source, target


def named_languages(name: str) -> tuple[str, str] | None:
    """The languages that the files of a corpus are named after: x.en,x.de; x.en-de.tsv; en-de.jsonl."""
    if name == STDIN or name.startswith(DATASET_PREFIX):
        return None
    if _format_of_file(name) is not None:
        words = COMPRESSED.sub("", name).rpartition("/")[2].split(".")[:-1]
        source, _, target = words[-1].partition("-") if words else ("", "", "")
        return _language_pair(source, target)
    source, comma, target = name.partition(",")
    if not comma:
        return None
    return _language_pair(*(COMPRESSED.sub("", each).rpartition(".")[2] for each in (source, target)))


def named_language(names: Sequence[str]) -> str | None:
    """The language that files of text are all named after."""
    endings = {COMPRESSED.sub("", name).rpartition("/")[2].rpartition(".")[2] for name in names}
    return next(iter(endings)) if len(endings) == 1 and all(map(_is_code, endings)) else None


def _language_pair(source: str, target: str) -> tuple[str, str] | None:
    return (source, target) if _is_code(source) and _is_code(target) and source != target else None


def _is_code(ending: str) -> bool:
    return bool(LANGUAGE_CODE.fullmatch(ending)) and not NO_LANGUAGES.fullmatch(ending)


def languages_of_prefix(prefix: str) -> list[str]:
    """The endings of the files that begin with a prefix and look like languages."""
    path = Path(prefix)
    if is_url(prefix) or not path.parent.is_dir():
        return []
    names = [COMPRESSED.sub("", each.name) for each in path.parent.iterdir()]
    endings = {each.removeprefix(f"{path.name}.") for each in names if each.startswith(f"{path.name}.")}
    return sorted(filter(_is_code, endings))


def unknown_languages(texts: Sequence[str]) -> ConfigError:
    """The error for corpora whose languages are neither given nor named."""
    for text in texts:
        known = languages_of_prefix(_split_weight(text)[0])
        if len(known) > 1:
            shown = f"{text} stands for {', '.join(f'{text}.{each}' for each in known[:4])}"
            example = f"--from {known[0]} --to {known[1]}"
            return ConfigError(f"{shown}, in no order; name the direction, for example {example}")
    names = " ".join(texts) or "the text"
    return ConfigError(f"the names of {names} do not tell the languages; name them with --from and --to")


def _split_weight(text: str) -> tuple[str, float]:
    match = re.fullmatch(r"(.+)@(\d+\.?\d*|\.\d+)", text, re.DOTALL)
    if match is None:
        return text, 1.0
    weight = float(match[2])
    if weight == 0:
        raise ConfigError(f"the corpus {text!r} has weight 0 and would never be used; leave it out instead")
    return match[1], weight


def _find(name: str, languages: tuple[str, str]) -> tuple[CorpusFormat, tuple[str, ...]]:
    if name == STDIN:
        return "tsv", (STDIN,)
    if name.startswith(DATASET_PREFIX):
        return "dataset", ()
    format = _format_of_file(name)
    if format is not None:
        return format, (_existing(name),)
    if "," in name:
        return "two files", _two_files(name, languages)
    if is_file(name):
        raise _one_side(name)
    return "two files", _with_prefix(name, languages)


def _is_one_side(name: str) -> bool:
    is_other = name == STDIN or name.startswith(DATASET_PREFIX) or "," in name or is_table(name)
    return not is_other and is_file(name)


def _one_side(name: str) -> DataError:
    """The error for a single file, with the other side if its name can be told."""
    suffix = found[0] if (found := COMPRESSED.search(name)) else ""
    prefix, _, language = name.removesuffix(suffix).rpartition(".")
    others = languages_of_prefix(prefix) if prefix and _is_code(language) else []
    sides = [f"{prefix}.{each}{suffix}" for each in others if each != language]
    if len(sides) == 1 and is_file(sides[0]):
        return DataError(f"{name} is one side of a corpus; name both sides: {name},{sides[0]}")
    return DataError(f"{name} is one side of a corpus, or of an unknown format; {SYNTAX}")


def _format_of_file(name: str) -> CorpusFormat | None:
    # A comma is allowed inside the name of an existing file; otherwise a.tsv,b.tsv are two files.
    if "," in name and not is_file(name):
        return None
    uncompressed = without_suffix(name).lower()
    if uncompressed.endswith(".tsv"):
        return "tsv"
    if uncompressed.endswith(".jsonl"):
        return "jsonl"
    return "parquet" if name.lower().endswith(".parquet") else None


def is_table(name: str) -> bool:
    """Whether a file is a corpus alone, by its name."""
    return _format_of_file(name) is not None


def is_stream(path: str) -> bool:
    """Whether a file can be read only once: standard input, or a pipe with a name."""
    return path == STDIN or (not is_url(path) and Path(path).is_fifo())


def _existing(name: str) -> str:
    if not is_file(name) and not is_stream(name):
        raise DataError(f"there is no file {name}; check the path")
    return name


def _two_files(name: str, languages: tuple[str, str]) -> tuple[str, str]:
    source, _, target = name.partition(",")
    if not source or not target or "," in target:
        raise ConfigError(
            f"cannot tell the two files in {name!r}; write SOURCE,TARGET with one comma between"
        )
    named = named_languages(name)
    if named is not None and named == languages[::-1]:
        raise ConfigError(
            f"{name} names {named[0]} first, but the direction is {languages[0]} to {languages[1]}; write "
            f"{target},{source}, or swap the languages"
        )
    return _existing(source), _existing(target)


def _with_prefix(prefix: str, languages: tuple[str, str]) -> tuple[str, str]:
    found = []
    for language in languages:
        plain = f"{prefix}.{language}"
        candidates = [plain, *(plain + suffix for suffix in SUFFIXES)]
        existing = [name for name in candidates if is_file(name)]
        if len(existing) > 1:
            raise DataError(f"there are both {existing[0]} and {existing[1]}; name the two files you mean")
        if not existing and Path(prefix).is_dir():
            raise DataError(
                f"the corpus {prefix!r} is a folder; name its files, such as {prefix.rstrip('/')}/train for "
                f"train.{languages[0]} and train.{languages[1]}"
            )
        if not existing:
            raise DataError(
                f"the corpus {prefix!r} needs {plain}, plain or compressed ({', '.join(SUFFIXES)}), which is "
                f"not there; {SYNTAX}"
            )
        found.append(existing[0])
    return found[0], found[1]


def _split_dataset(name: str) -> tuple[str, str | None, str]:
    """The name of the dataset (or its folder), its configuration, and its split."""
    rest, split = name.removeprefix(DATASET_PREFIX), "train"
    match = re.fullmatch(r"(.+):([\w.-]+)", rest)
    if match is not None:
        rest, split = match[1], match[2]
    if not rest.strip("/"):
        raise ConfigError(
            f"{name!r} names no dataset; write hf:NAME or hf:NAME/CONFIG, then :SPLIT if not train"
        )
    parent, _, last = rest.rpartition("/")
    with read_errors(rest):
        if Path(rest).is_dir():
            return rest, None, split
        if parent and Path(parent).is_dir():
            return parent, last, split
    if rest.count("/") > 1:
        owner, dataset, config = rest.split("/", 2)
        return f"{owner}/{dataset}", config, split
    return rest, None, split


def _parse_columns(format: CorpusFormat, source: str | None, target: str | None) -> tuple[str, str] | None:
    if (source is None) != (target is None):
        raise ConfigError("--source-column and --target-column go together; give both")
    if source is None or target is None or format == "two files":
        return None
    if format == "tsv" and not (_is_index(source) and _is_index(target)):
        raise ConfigError(
            f"a TSV file has numbered columns, so --source-column {shown(source)} --target-column "
            f"{shown(target)} cannot be found; count from 0, up to 999999"
        )
    return source, target


def _is_index(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,6}", text) is not None
