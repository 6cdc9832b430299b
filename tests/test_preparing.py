from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.texts import CHINESE, ENGLISH, GERMAN
from trmt.errors import ConfigError, DataError, TrmtError
from trmt.sets import building
from trmt.sets.encoding import BLOCK_CHARACTERS, BlockEncoder, encode_blocks, read_blocks
from trmt.sets.preparing import PrepareOptions, prepare
from trmt.sets.shards import PreparedSet
from trmt.storage.files import PARTIAL
from trmt.text.corpus import parse_corpus
from trmt.text.filters import (
    FILTERS,
    KEPT,
    RATIO_SLACK,
    LengthLimits,
    filter_by_length,
    first_occurrences,
    pair_hashes,
)
from trmt.text.tokenizer import Tokenizer
from trmt.text.tokenizer_training import TokenizerOptions, train_tokenizer

Pair = tuple[str, str]
WORDS = ["the", "train", "to", "Berlin", "leaves", "at", "Zug", "nach", "fährt", "ab", "12", "10²", "Straße"]


def write_tsv(path: Path, some: Sequence[Pair]) -> str:
    path.write_bytes("".join(f"{source}\t{target}\n" for source, target in some).encode())
    return str(path)


def random_pairs(count: int, *, seed: int = 0) -> list[Pair]:
    """Pairs of words, some of them more than once and some without text."""
    chooser = random.Random(seed)
    short = [[chooser.choice(WORDS) for _ in range(chooser.randrange(4))] for _ in range(2 * count)]
    return [
        (" ".join(source), " ".join(target)) for source, target in zip(short[::2], short[1::2], strict=True)
    ]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = write_tsv(
        folder / "t.tsv", [*zip(ENGLISH, GERMAN, strict=True), *zip(CHINESE, GERMAN, strict=True)]
    )
    train_tokenizer(
        TokenizerOptions(corpora=(corpus,), languages=("en", "de"), size=800), out=folder / "tokenizer"
    )
    return folder / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture
def options(tmp_path: Path, tokenizer_folder: Path) -> PrepareOptions:
    train = write_tsv(tmp_path / "train.tsv", random_pairs(2000))
    dev = write_tsv(tmp_path / "dev.tsv", list(zip(ENGLISH, GERMAN, strict=True)))
    return PrepareOptions(
        train=(train,),
        dev=dev,
        out=tmp_path / "set",
        tokenizer=tokenizer_folder,
        limits=LengthLimits(max_ratio=0),
        workers=1,
    )


def decoded(prepared: PreparedSet, split: str) -> list[Pair]:
    """The pairs of a split as the tokenizer in the set spells them."""
    tokenizer = Tokenizer.load(prepared.tokenizer_folder)
    pairs = prepared.split(split)
    sides = []
    for name, side in (("source.ids", tokenizer.source), ("target.ids", tokenizer.target)):
        values, lengths = pairs.gather(name, np.arange(len(pairs)))
        sides.append([side.decode(part.tolist()) for part in np.split(values, np.cumsum(lengths)[:-1])])
    return list(zip(*sides, strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dropped(prepared: PreparedSet, corpus: int = 0) -> dict[str, int]:
    return {rule: n for rule, n in prepared.index["corpora"][corpus]["dropped"].items() if n}


# What is in the set


def test_the_first_of_equal_pairs_is_kept_in_order(options: PrepareOptions) -> None:
    prepared = prepare(options)
    prepared.verify()
    pairs = random_pairs(2000)
    with_text = [pair for pair in pairs if all(pair)]
    expected = list(dict.fromkeys(with_text))
    assert decoded(prepared, "train") == expected
    assert decoded(prepared, "dev") == list(zip(*prepared.dev_text(), strict=True))
    assert prepared.dev_text() == (ENGLISH, GERMAN)
    (entry,) = prepared.index["corpora"]
    assert dropped(prepared) == {
        "empty": len(pairs) - len(with_text),
        "duplicate": len(with_text) - len(expected),
    }
    assert (entry["read"], entry["kept"]) == (len(pairs), len(expected))
    assert prepared.languages == ("en", "de")


def test_duplicates_are_found_across_corpora(options: PrepareOptions, tmp_path: Path) -> None:
    first, second = [("a", "b"), ("a", "c")], [("a", "c"), ("a", "d"), ("a ", " d")]
    paths = (
        write_tsv(tmp_path / "1.tsv", first),
        write_tsv(tmp_path / "2.tsv", second),
    )
    prepared = prepare(dataclasses.replace(options, train=(paths[0], f"{paths[1]}@2.5")))
    assert decoded(prepared, "train") == [("a", "b"), ("a", "c"), ("a", "d")]
    assert prepared.split("train").scalars("corpus", np.arange(3)).tolist() == [0, 0, 1]
    assert prepared.corpus_weights.tolist() == [1.0, 2.5]
    assert (dropped(prepared, 0), dropped(prepared, 1)) == ({}, {"duplicate": 2})
    kept = prepare(dataclasses.replace(options, train=paths, keep_duplicates=True))
    assert decoded(kept, "train") == [*first, *second[:2], ("a", "d")]
    assert not list(kept.folder.glob("first-pass*"))


def test_every_filter_counts_what_it_drops(options: PrepareOptions, tmp_path: Path) -> None:
    long = " ".join(["12"] * 40)
    train = [
        ("Zug", "train"),
        ("", "train"),
        (" \t".strip(), ""),
        ("\u200a", "train"),  # nothing but white space, as the tokenizer sees it
        (long, long),
        ("Zug Zug", "12 " * 12),
        (ENGLISH[3], GERMAN[3]),
        (f" {ENGLISH[4]}", GERMAN[4]),
        ("Zug", "train"),
    ]
    source = write_tsv(tmp_path / "t.tsv", train)
    prepared = prepare(dataclasses.replace(options, train=(source,), limits=LengthLimits(70, 1.5)))
    assert dropped(prepared) == {"empty": 3, "too long": 1, "ratio": 1, "in dev set": 2, "duplicate": 1}
    assert decoded(prepared, "train") == [("Zug", "train")]
    assert prepared.index["corpora"][0]["read"] == len(train)


def test_the_report_has_every_filter(options: PrepareOptions, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = prepare(options)
    shown = capsys.readouterr()
    assert shown.out == ""
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in shown.err.splitlines() if "│" in line
    ]
    counts = {row[0]: int(row[1].replace(",", "")) for row in cells}
    entry = prepared.index["corpora"][0]
    assert counts == {"read": entry["read"], **entry["dropped"], "kept": entry["kept"]}


def test_many_corpora_are_rows_of_the_report(
    options: PrepareOptions,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    names = [f"{letter}.tsv" for letter in "abcde"]
    train = [write_tsv(tmp_path / name, [("a", name), ("a", name)]) for name in names]
    prepare(dataclasses.replace(options, train=tuple(train)))
    rows = [line.split("│") for line in capsys.readouterr().err.splitlines() if "│" in line]
    shown = {row[1].strip(): [int(cell) for cell in row[2:-1]] for row in rows}
    assert shown == {name: [2, 0, 0, 0, 0, 1, 1] for name in names} | {
        "total": [10, 0, 0, 0, 0, 5, 5],
        "dev: dev.tsv": [30, 0, 0, 0, 0, 0, 30],
    }


def test_dev_text_keeps_its_bytes_and_loses_empty_pairs_only(options: PrepareOptions, tmp_path: Path) -> None:
    dev = [("a\u2028 b", "\x0bc\x0cc\r c"), ("", "x"), ("12 " * 400, "x"), ("e\u0301", "x"), ("y", " ")]
    prepared = prepare(dataclasses.replace(options, dev=write_tsv(tmp_path / "d.tsv", dev)))
    kept = [dev[0], dev[2], dev[3]]
    assert list(zip(*prepared.dev_text(), strict=True)) == kept
    assert len(prepared.split("dev")) == 3
    assert prepared.index["dev"]["dropped"]["empty"] == 2


@pytest.mark.parametrize("text", ["", "\tx\n"])
def test_a_set_without_pairs_is_an_error(options: PrepareOptions, tmp_path: Path, text: str) -> None:
    (tmp_path / "e.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"no pair of .*e\.tsv is left"):
        prepare(dataclasses.replace(options, train=(str(tmp_path / "e.tsv"),)))
    with pytest.raises(DataError, match="no pair with text"):
        prepare(dataclasses.replace(options, dev=str(tmp_path / "e.tsv")))
    assert not options.out or not options.out.exists()


def test_no_dev_set(options: PrepareOptions) -> None:
    prepared = prepare(dataclasses.replace(options, dev=None, dev_size=0))
    assert prepared.splits == ("train",)
    with pytest.raises(DataError, match="has no dev set"):
        prepared.dev_text()


# Filters


def test_filter_by_length_is_like_filtering_one_pair_at_a_time() -> None:
    chooser = np.random.default_rng(1)
    source, target = chooser.integers(0, 60, (2, 3000))
    limits = LengthLimits(max_length=50, max_ratio=2.0)

    def slow(one: int, other: int) -> str | None:
        if one == 0 or other == 0:
            return "empty"
        if one > 50 or other > 50:
            return "too long"
        if max(one, other) > 2.0 * min(one, other) + RATIO_SLACK:
            return "ratio"
        return None

    expected = [slow(one, other) for one, other in zip(source.tolist(), target.tolist(), strict=True)]
    found = [(*FILTERS, None)[index] for index in filter_by_length(source, target, limits=limits)]
    assert found == expected
    assert {"empty", "too long", "ratio", None} == set(expected)


def test_real_translations_pass_the_ratio(tokenizer: Tokenizer) -> None:
    for sources in (CHINESE, GERMAN, [text[:20] for text in CHINESE]):
        lengths = [
            np.array([len(ids) for ids in side.encode(texts)])
            for side, texts in ((tokenizer.source, sources), (tokenizer.target, ENGLISH))
        ]
        assert (filter_by_length(*lengths, limits=LengthLimits()) == KEPT).all()
    short = filter_by_length(np.array([1, 2, 1]), np.array([6, 9, 30]), limits=LengthLimits())
    assert short.tolist() == [KEPT, KEPT, FILTERS.index("ratio")]
    assert filter_by_length(np.array([1]), np.array([200]), limits=LengthLimits(max_ratio=0)).tolist() == [
        KEPT
    ]


@pytest.mark.parametrize("bad", [{"max_length": 0}, {"max_ratio": 0.5}, {"max_ratio": float("nan")}])
def test_limits_that_would_drop_everything(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="would drop every pair"):
        LengthLimits(**bad)


@pytest.mark.parametrize(("chunk", "bucket"), [(1, 1), (7, 5), (64, 100), (1 << 20, 1 << 22)])
def test_first_occurrences_are_those_of_a_set(tmp_path: Path, chunk: int, bucket: int) -> None:
    chooser = np.random.default_rng(3)
    extremes = np.array([0, 2**64 - 1, 2**63, 2**63 - 1], np.uint64)
    for count in (0, 1, 500):
        pool = np.concatenate([extremes, chooser.integers(0, 2**64, 99, np.uint64, endpoint=False)])
        hashes = chooser.choice(pool, count)
        hashes[count // 3 : count // 2] = 5  # one hash that is very frequent
        path = tmp_path / f"hashes-{count}"
        path.write_bytes(hashes.astype("<u8").tobytes())
        seen: set[int] = set()
        expected = [not (value in seen or seen.add(value)) for value in hashes.tolist()]
        found = first_occurrences(path, tmp_path / f"mask-{count}", chunk=chunk, bucket=bucket)
        assert found.tolist() == expected
    left = {path.name.partition("-")[0] for path in tmp_path.iterdir()}
    assert left == {"hashes", "mask"}


def test_hashes_differ_for_different_pairs() -> None:
    some = [("a b", "c"), ("a", "b c"), ("a", "b"), ("b", "a"), ("", "ab"), ("ab", "")]
    hashes = pair_hashes(*zip(*some, strict=True))
    assert len(set(hashes.tolist())) == len(some)
    assert pair_hashes(*zip(*some[::-1], strict=True)).tolist() == hashes[::-1].tolist()


# Processes


def test_any_number_of_workers_writes_the_same_bytes(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = write_tsv(tmp_path / "more.tsv", random_pairs(9000, seed=4))
    one, two = (
        prepare(dataclasses.replace(options, train=(train,), out=tmp_path / str(workers), workers=workers))
        for workers in (1, 2)
    )
    assert contents(one.folder) == contents(two.folder)
    assert one.fingerprint == two.fingerprint


def test_blocks_are_in_order_and_bounded(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = parse_corpus(write_tsv(tmp_path / "t.tsv", random_pairs(10_000)), "en", "de")
    taken = 0

    def counted() -> Iterator[Any]:
        nonlocal taken
        for block in read_blocks([corpus] * 9):
            taken += 1
            yield block

    results = encode_blocks(counted(), BlockEncoder(tokenizer, LengthLimits()), workers=2)
    first = next(results)
    assert taken <= 6, "blocks are not read long before they are encoded"
    corpora = [first.corpus, *(result.corpus for result in results)]
    assert corpora == sorted(corpora)
    assert taken == len(corpora) == 27


def test_blocks_of_long_lines_have_few_pairs(tmp_path: Path) -> None:
    line = "x" * (BLOCK_CHARACTERS // 4)
    corpus = parse_corpus(write_tsv(tmp_path / "t.tsv", [(line, line)] * 5), "en", "de")
    assert [len(block.sources) for block in read_blocks([corpus])] == [2, 2, 1]


def test_errors_in_the_text_are_raised_with_workers(options: PrepareOptions, tmp_path: Path) -> None:
    path = tmp_path / "bad.tsv"
    path.write_bytes(b"a\tb\n" * 5000 + b"only one\n")
    with pytest.raises(DataError, match=r"bad\.tsv, line 5001"):
        prepare(dataclasses.replace(options, train=(str(path),), workers=2))


class _Dies:
    def __call__(self, block: Any) -> Any:
        os._exit(3)


def test_a_worker_that_dies_is_an_error(tmp_path: Path) -> None:
    corpus = parse_corpus(write_tsv(tmp_path / "t.tsv", [("a", "b")]), "en", "de")
    with pytest.raises(TrmtError, match="a worker process died"):
        list(encode_blocks(read_blocks([corpus]), _Dies(), workers=2))


# Prepared again, changed, killed


def test_a_set_that_is_up_to_date_is_not_prepared_again(
    options: PrepareOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare(options)
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    Path(options.train[0]).touch()
    capsys.readouterr()
    again = prepare(options)
    assert "up to date" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in again.folder.rglob("*")} == before
    forced = prepare(dataclasses.replace(options, force=True))
    assert forced.fingerprint == first.fingerprint
    assert (forced.folder / "index.json").stat().st_mtime_ns != before[first.folder / "index.json"]


def test_any_change_of_inputs_or_options_prepares_the_set_again(
    options: PrepareOptions, tmp_path: Path
) -> None:
    seen = {prepare(options).fingerprint}
    variants = [
        dataclasses.replace(options, limits=LengthLimits(max_length=7)),
        dataclasses.replace(options, keep_duplicates=True),
        dataclasses.replace(options, train=(f"{options.train[0]}@2",)),
        dataclasses.replace(options, train=options.train * 2),
        dataclasses.replace(options, dev=None),
    ]
    for variant in variants:
        seen.add(prepare(variant).fingerprint)
    write_tsv(Path(options.train[0]), random_pairs(50, seed=8))
    seen.add(prepare(options).fingerprint)
    assert len(seen) == len(variants) + 2


def test_a_damaged_set_is_prepared_again(options: PrepareOptions) -> None:
    first = prepare(options)
    (first.folder / "train-00000.source.ids").write_bytes(b"")
    again = prepare(options)
    assert again.fingerprint == first.fingerprint
    again.verify()


def test_an_error_during_preparation_leaves_the_old_set(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = contents(prepare(options).folder)

    def broken(*_: Any) -> None:
        raise RuntimeError("halfway")

    monkeypatch.setattr(building, "first_occurrences", broken)
    with pytest.raises(RuntimeError, match="halfway"):
        prepare(dataclasses.replace(options, force=True))
    assert options.out is not None
    assert contents(options.out) == old
    assert not list(tmp_path.glob(f"{PARTIAL}*"))


KILLED = """
import sys
from pathlib import Path
from trmt.sets.preparing import PrepareOptions, prepare

if __name__ == "__main__":
    out, tokenizer = map(Path, sys.argv[1:])
    prepare(PrepareOptions(train=("-",), out=out, tokenizer=tokenizer, dev_size=0, workers=2))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_kill_during_preparation_leaves_the_old_set_and_no_processes(
    options: PrepareOptions, tmp_path: Path
) -> None:
    old = contents(prepare(options).folder)
    script = tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    root = Path(building.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, script, str(options.out), options.tokenizer],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdin is not None
    with process:
        process.stdin.write(b"a\tb\n" * 100_000)
        process.stdin.flush()
        _wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob(f"{PARTIAL}*/first-pass/train*")))
        os.kill(process.pid, signal.SIGKILL)
        # Workers have the other end of this pipe: it ends when the last of them has ended.
        process.communicate(timeout=60)
    assert options.out is not None
    assert contents(options.out) == old
    (left,) = tmp_path.glob(f"{PARTIAL}*")
    prepare(dataclasses.replace(options, force=True))
    assert left.exists(), "another command might be writing it"
    for path in [left, *left.rglob("*")]:
        os.utime(path, (1, 1))
    prepare(dataclasses.replace(options, force=True))
    assert not left.exists()


def _wait_for(condition: Any) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("timed out")


# Errors


def test_a_folder_with_other_files_is_not_replaced(options: PrepareOptions) -> None:
    assert options.out is not None
    options.out.mkdir()
    (options.out / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex"):
        prepare(options)
    (options.out / "thesis.tex").unlink()
    prepare(options)
    (options.out / "notes").write_text("precious", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds notes"):
        prepare(dataclasses.replace(options, force=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ()}, "name a corpus"),
        ({"workers": 0}, "choose at least 1"),
        ({"train": ("-", "-")}, "only once"),
        ({"languages": ("de", "en")}, "trained for en to de"),
        ({"out": Path()}, "cannot be replaced"),
        ({"train": ("nowhere",)}, r"nowhere\.en"),
        ({"tokenizer": Path("nowhere")}, "no tokenizer in nowhere"),
    ],
)
def test_options_that_cannot_work(options: PrepareOptions, change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrmtError, match=message):
        prepare(dataclasses.replace(options, **change))


def test_the_folder_is_named_after_the_languages(
    options: PrepareOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepare(dataclasses.replace(options, out=None)).folder == Path("data/en-de")


def test_the_command(options: PrepareOptions, tmp_path: Path) -> None:
    import typer
    from typer.testing import CliRunner

    from trmt.cli.prepare import command

    app = typer.Typer()
    app.command()(command)
    out = tmp_path / "named"
    flags = (
        f"{out} --tokenizer {options.tokenizer} --train {options.train[0]}@2 --dev {options.dev} --from en"
    )
    result = CliRunner().invoke(app, [*flags.split(), "--to", "de", "--max-ratio", "0"])
    assert (result.exit_code, result.stdout) == (0, "")
    prepared = PreparedSet.open(out)
    assert prepared.corpus_weights.tolist() == [2.0]
    assert decoded(prepared, "train") == decoded(prepare(options), "train")
    assert "hf:NAME/CONFIG" in "".join(CliRunner().invoke(app, ["--help"]).stdout.split())
