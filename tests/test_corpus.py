from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trmt.errors import ConfigError, DataError, TrmtError
from trmt.text.corpus import Corpus, parse_corpus
from trmt.text.lines import read_lines
from trmt.text.pairs import corpus_fingerprint, count_pairs, read_corpus

# Characters that some programs take for the end of a line or of a field, and parts of UTF-8.
NASTY = [b"\r", b"\r\n", b"\n", b"\n", b"\0", b"\x0b", b"\x0c", b"\x1c", b"\x1a", b'"', b"\\", b",", b" "]
NASTY += ["\u2028".encode(), "\u0085".encode(), "\ufeff".encode(), "é".encode(), "😀".encode(), b"a", b"Zug"]


def corpus(name: object, **options: Any) -> Corpus:
    return parse_corpus(str(name), "en", "de", **options)


def read(name: object, **options: Any) -> list[tuple[str, str]]:
    return list(read_corpus(corpus(name, **options)))


def write(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.write_bytes(content)
    return path


def naive_lines(content: bytes) -> list[str]:
    *complete, last = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    texts = [line.removesuffix(b"\r") for line in complete] + ([last] if last else [])
    return [text.decode() for text in texts]


def fuzzed(seed: int, alphabet: Iterable[bytes] = tuple(NASTY)) -> bytes:
    chooser = random.Random(seed)
    return b"".join(chooser.choices(list(alphabet), k=chooser.randrange(60)))


@pytest.mark.parametrize("suffix", [".txt", ".gz"])
def test_only_newlines_end_a_line(tmp_path: Path, suffix: str) -> None:
    for seed in range(300):
        content = fuzzed(seed)
        assert list(read_lines(write(tmp_path / f"x{suffix}", content))) == naive_lines(content), content


def test_every_byte_is_decoded_or_is_an_error(tmp_path: Path) -> None:
    chooser = random.Random(5)
    path = tmp_path / "x"
    refused = 0
    for _ in range(300):
        content = bytes(chooser.choices(range(256), k=chooser.randrange(12)))
        path.write_bytes(content)
        try:
            expected = naive_lines(content)
        except UnicodeDecodeError:
            refused += 1
            with pytest.raises(DataError, match="not valid UTF-8"):
                list(read_lines(path))
        else:
            assert list(read_lines(path)) == expected
    assert 0 < refused < 300


def test_errors_in_decoding_name_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x", b"good\nalso\r good\nba\xffd\n")
    with pytest.raises(DataError, match=r"x, line 3: .* \(byte 0xff at position 3 of the line\)"):
        list(read_lines(path))


def test_read_lines_reads_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\r\nb\rc"), encoding="ascii"))
    assert list(read_lines("-")) == ["a", "b\rc"]


def test_damaged_gzip_is_an_error(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(map(str, range(5000))).encode())
    path = tmp_path / "x.gz"
    for content in (whole[:-20], whole[:2000] + b"\0\1\2" + whole[2003:], b"no gzip at all"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.gz is damaged"):
            list(read_lines(path))


@pytest.mark.parametrize("name", ["", "missing", "folder"])
def test_unreadable_files_are_errors(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="check the path"):
        list(read_lines(tmp_path / name))


# Two files


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_two_files_and_a_prefix_give_the_same_pairs(tmp_path: Path, suffix: str) -> None:
    sides = [b"".join(fuzzed(seed).replace(b"\n", b"") + b"\n" for seed in range(99)) for _ in range(2)]
    source, target = (
        write(tmp_path / f"t.{language}{suffix}", side)
        for language, side in zip(("en", "de"), sides, strict=True)
    )
    expected = list(zip(*map(naive_lines, sides), strict=True))
    assert read(f"{source},{target}") == read(tmp_path / "t") == expected


@pytest.mark.parametrize(("english", "german"), [(3, 5), (5, 3), (0, 1)])
def test_unequal_line_counts_name_both_files(tmp_path: Path, english: int, german: int) -> None:
    write(tmp_path / "t.en", b"x\n" * english)
    write(tmp_path / "t.de", b"x\n" * german)
    with pytest.raises(DataError, match=rf"t\.en has {english} lines but .*t\.de has {german}"):
        read(tmp_path / "t")


def test_errors_about_missing_files_name_them(tmp_path: Path) -> None:
    write(tmp_path / "t.en", b"x\n")
    with pytest.raises(DataError, match=r"t\.de, plain or compressed \(\.gz, .*\), which is not there"):
        corpus(tmp_path / "t")
    write(tmp_path / "t.en.gz", b"x\n")
    with pytest.raises(DataError, match=r"both .*t\.en and .*t\.en\.gz"):
        corpus(tmp_path / "t")
    with pytest.raises(DataError, match="no file nowhere"):
        corpus(f"nowhere,{tmp_path / 't.en'}")
    with pytest.raises(DataError, match="is one side of a corpus, or of an unknown format"):
        corpus(tmp_path / "t.en")
    with pytest.raises(ConfigError, match="one comma"):
        corpus("a,b,c")


# Files of pairs


@pytest.mark.parametrize("name", ["t.tsv", "t.tsv.gz"])
def test_only_tabs_split_a_row_of_tsv(tmp_path: Path, name: str) -> None:
    for seed in range(200):
        one, other = (fuzzed(seed + add).replace(b"\n", b"") for add in (0, 1000))
        content = b"a\tb\n" + one + b"\t" + other + b"\nc\td"
        expected = [tuple(line.split("\t")) for line in naive_lines(content)]
        assert read(write(tmp_path / name, content)) == expected


def test_tsv_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'"a\tb\n\n')))
    assert read("-") == [('"a', "b"), ("", "")]
    assert corpus_fingerprint(corpus("-")) is None


def test_tsv_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", b"1\tHund\tdog\n2\tKatze\tcat\n")
    assert read(path, source_column="2", target_column="1") == [("dog", "Hund"), ("cat", "Katze")]
    with pytest.raises(DataError, match=r"t\.tsv, line 1: 3 tab-separated columns where 2 .*--source-column"):
        read(path)
    with pytest.raises(DataError, match=r"t\.tsv, line 1: 3 .* where 6 were"):
        read(path, source_column="5", target_column="1")
    with pytest.raises(ConfigError, match="numbered columns"):
        corpus(path, source_column="en", target_column="de")
    with pytest.raises(ConfigError, match="go together"):
        corpus(path, source_column="1")


@pytest.mark.parametrize("line", [b"one\n", b"a\tb\tc\n"])
def test_tsv_with_another_number_of_columns(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path / "t.tsv", b"a\tb\n" + line)
    with pytest.raises(DataError, match=r"t\.tsv, line 2: \d tab-separated columns where 2"):
        read(path)


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([{"en": "a", "de": "b", "source": "x", "target": "y"}], {}),
        ([{"source": "a", "target": "b"}], {}),
        ([{"translation": {"en": "a", "de": "b"}, "id": 1}], {}),
        ([{"q": "a", "r": "b", "en": "x", "de": "y"}], {"source_column": "q", "target_column": "r"}),
    ],
)
def test_the_columns_of_a_row_are_chosen_by_name(
    tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, str]
) -> None:
    text = "\n".join(map(json.dumps, rows))
    assert read(write(tmp_path / "t.jsonl", text.encode()), **options) == [("a", "b")]
    assert read(write(tmp_path / "t.jsonl.gz", text.encode()), **options) == [("a", "b")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet", **options) == [("a", "b")]


def test_newlines_in_the_text_of_a_row_become_spaces(tmp_path: Path) -> None:
    texts = ["a\nb", "c\r\nd", "\u2028\0\x0b\r", ' "quotes", \t', "", None]
    rows = [{"en": text, "de": "x"} for text in texts]
    expected = [((text or "").replace("\n", " "), "x") for text in texts]
    write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)).encode())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t[1].parquet")
    assert read(tmp_path / "t.jsonl") == expected
    assert read(tmp_path / "t[1].parquet") == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"en": "a"}', "no column 'de'"),
        ('{"en": "a", "de": 3}', "column 'de' holds a int"),
        ('{"en": "a", "de": "\\ud83d"}', "broken character"),
        ('{"en": "a", "de": "b"', "not valid JSON"),
        ('["a", "b"]', "JSON list where an object"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_json_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "t.jsonl", f'{{"en": "a", "de": "b"}}\n\n{line}\n'.encode())
    with pytest.raises(DataError, match=rf"t\.jsonl, line 3: .*{message}"):
        read(path)


def test_rows_without_known_columns_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", b'{"fr": "a", "de": "b"}')
    with pytest.raises(DataError, match=r"neither 'en' and 'de' nor 'source' and 'target' .*'fr', 'de'"):
        read(path)


def test_broken_parquet_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", b"PAR1 nothing PAR1")
    assert count_pairs(corpus(path)) is None
    with pytest.raises(DataError, match=r"cannot read .*t\.parquet at all"):
        read(path)


# Datasets


def test_folders_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    Path("plain").mkdir()
    for split, word in (("train", "a"), ("validation", "b")):
        rows = [{"translation": {"en": word, "de": word}}]
        pq.write_table(pa.Table.from_pylist(rows), f"plain/{split}-00000-of-00001.parquet")
    datasets.Dataset.from_dict({"en": ["a"], "de": ["a"]}).save_to_disk("saved")
    assert read("hf:plain") == read("hf:saved@3") == [("a", "a")]
    assert read("hf:plain:validation") == [("b", "b")]
    with pytest.raises(DataError, match="cannot read hf:plain:test"):
        read("hf:plain:test")
    before = corpus_fingerprint(corpus("hf:plain"))
    Path("plain/more").write_bytes(b"x")
    assert corpus_fingerprint(corpus("hf:plain")) != before


@pytest.mark.parametrize("name", ["train.csv", "train.txt"])
def test_datasets_readers_that_lose_rows_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("en,de\na,b\n", encoding="utf-8")
    with pytest.raises(DataError, match="does not read faithfully"):
        read(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "dataset", "config", "split"),
    [
        ("hf:owner/name", "owner/name", None, "train"),
        ("hf:owner/name/de-en", "owner/name", "de-en", "train"),
        ("hf:owner/name/de-en:validation", "owner/name", "de-en", "validation"),
        ("hf:name:test-2.b", "name", None, "test-2.b"),
    ],
)
def test_names_on_the_hub(name: str, dataset: str, config: str | None, split: str) -> None:
    parsed = corpus(name)
    assert (parsed.paths, parsed.config, parsed.split) == ((dataset,), config, split)


# Weights and counts


def test_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "a@b.tsv", b"a\tb\n")
    assert corpus(path).weight == 1
    weighted = corpus(f"{path}@2.5")
    assert (weighted.weight, weighted.name) == (2.5, str(path))
    with pytest.raises(ConfigError, match="weight 0"):
        corpus(f"{path}@0")
    with pytest.raises(TrmtError):
        corpus(f"{path}@much")


def test_count_and_fingerprint_follow_the_content(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv.gz", b"a\tb\n" * 7)
    assert count_pairs(corpus(path)) == 7
    first = corpus_fingerprint(corpus(path))
    path.touch()
    assert corpus_fingerprint(corpus(path)) == first
    write(path, b"a\tb\n" * 8)
    assert corpus_fingerprint(corpus(path)) != first
    pq.write_table(pa.table({"en": ["a"] * 5, "de": ["b"] * 5}), tmp_path / "t.parquet")
    assert count_pairs(corpus(tmp_path / "t.parquet")) == 5
