"""A set whose pairs were encoded in parts is the same to the byte, whichever workers die."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.pools import Accident, FakePool
from tests.scripted import small_tokenizer
from tests.texts import ENGLISH, GERMAN
from tests.tree_mutations import flips
from trmt.errors import ConfigError, DataError, TrmtError
from trmt.scale import corpus_preparing
from trmt.scale.corpus_preparing import prepare_in_parts
from trmt.scale.partition import MANIFEST
from trmt.scale.pool import WorkerJob
from trmt.sets import encoding
from trmt.sets.preparing import PrepareOptions, prepare

SMALL = 2000  # bytes of source text in a part


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (encoding, corpus_preparing):
        monkeypatch.setattr(module, "BLOCK_PAIRS", 16)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer(folder / "text").save(folder / "made")
    return folder / "made"


def some_pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Pairs, some of them repeated, some without text, some of unequal lengths."""
    chooser = random.Random(seed)
    texts = [
        *zip(ENGLISH, GERMAN, strict=True),
        ("", "x"),
        ("\u2028", " "),
        ("a\rb", "c"),
        ("one", "1 " * 90),
    ]
    return [
        (f"{source} {chooser.randrange(20)}" if chooser.random() < 0.5 else source, target)
        for source, target in chooser.choices(texts, k=count)
    ]


@pytest.fixture
def options(tmp_path: Path, tokenizer: Path) -> PrepareOptions:
    """Corpora of all text formats, and a dev set that shares pairs with them."""
    one, other = zip(*some_pairs(300, 1), strict=True)
    (tmp_path / "train.en").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(one).encode())
    (tmp_path / "train.de").write_bytes("\n".join(other).encode() + b"\n")
    rows = some_pairs(200, 2)
    wide = "".join(f"{at}\t{b}\t{a}\n" for at, (a, b) in enumerate(rows))
    (tmp_path / "wide.tsv").write_bytes(wide.encode())
    objects = [json.dumps({"en": a, "de": b}) + "\n" * (1 + (len(a) % 5 == 0)) for a, b in some_pairs(150, 3)]
    (tmp_path / "pairs.jsonl").write_text("".join(objects))
    packed = "".join(f"{a}\t{b}\n" for a, b in some_pairs(90, 4))
    (tmp_path / "packed.tsv.gz").write_bytes(gzip.compress(packed.encode()))
    (tmp_path / "dev.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in some_pairs(20, 5)), newline="")
    names = ("train", "pairs.jsonl@2", "packed.tsv.gz")
    return PrepareOptions(
        train=tuple(str(tmp_path / name) for name in names),
        dev=str(tmp_path / "dev.tsv"),
        tokenizer=tokenizer,
        out=tmp_path / "set",
        workers=1,
    )


def in_parts(
    options: PrepareOptions, *, accident: Accident = lambda part: None, size: int = SMALL
) -> list[str]:
    """Prepare with fake workers; returns the names of the parts they did."""
    pools: list[FakePool] = []

    def make_pool(job: WorkerJob) -> FakePool:
        pools.append(FakePool(job, accident=accident))
        return pools[-1]

    prepare_in_parts(options, make_pool, part_bytes=size)
    return sorted(name for pool in pools for name in pool.done)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def alone(options: PrepareOptions) -> dict[str, bytes]:
    """The files of the set that one process prepares."""
    assert options.out
    out = options.out.with_name("alone")
    prepare(replace(options, out=out))
    return contents(out)


@pytest.mark.parametrize("keep_duplicates", [False, True])
def test_the_set_is_the_same(options: PrepareOptions, keep_duplicates: bool) -> None:
    options = replace(options, keep_duplicates=keep_duplicates)
    assert len(in_parts(options)) > 10
    assert options.out and contents(options.out) == alone(options)
    assert not options.out.with_name("set.parts").exists()
    # The ordinary command finds it up to date.
    before = (options.out / "index.json").stat().st_mtime_ns
    prepare(options)
    assert (options.out / "index.json").stat().st_mtime_ns == before
    assert in_parts(options) == []


def test_columns_are_found_in_every_part(options: PrepareOptions, tmp_path: Path) -> None:
    options = replace(options, train=(str(tmp_path / "wide.tsv"),), dev=None, columns=("2", "1"))
    assert len(in_parts(options)) > 3
    assert options.out and contents(options.out) == alone(options)


def test_a_row_that_differs_from_the_first_is_an_error_in_any_part(
    options: PrepareOptions, tmp_path: Path
) -> None:
    with (tmp_path / "wide.tsv").open("a") as stream:
        stream.write("4 columns\there\tare\ttoo many\n" * 40)
    options = replace(options, train=(str(tmp_path / "wide.tsv"),), dev=None, columns=("2", "1"))
    with pytest.raises(TrmtError, match=r"wide.tsv, line \d+: 4 tab-separated columns where 3 were expected"):
        in_parts(options)


def test_a_second_start_encodes_only_missing_parts(
    options: PrepareOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    def accident(part: Any) -> str | None:
        return "died" if part.name in ("part-00002", "part-00005") else None

    with pytest.raises(TrmtError, match=r"2 of \d+ parts could not be encoded, .* a worker died"):
        in_parts(options, accident=accident)
    assert options.out and not options.out.exists()
    (options.out.with_name("set.parts") / "part-00007").unlink()
    assert in_parts(options) == ["part-00002", "part-00005", "part-00007"]
    assert contents(options.out) == alone(options)


def test_parts_of_other_text_or_options_are_refused(options: PrepareOptions, tmp_path: Path) -> None:
    with pytest.raises(TrmtError):
        in_parts(options, accident=lambda part: "died")
    with pytest.raises(ConfigError, match="max length was 250 and is 20"):
        in_parts(replace(options, limits=replace(options.limits, max_length=20)))
    with pytest.raises(ConfigError, match=r'dev set was ".*" and is'):
        in_parts(replace(options, dev=str(tmp_path / "wide.tsv"), columns=("0", "1")))
    with (tmp_path / "train.de").open("r+b") as stream:
        stream.write(b"#")
    with pytest.raises(ConfigError, match=r"the contents of .*train.de have changed"):
        in_parts(options)


def test_a_damaged_part_is_named(options: PrepareOptions) -> None:
    assert options.out
    folder = options.out.with_name("set.parts")
    with pytest.raises(TrmtError):
        in_parts(options, accident=lambda part: "died" if part.name == "part-00001" else None)
    (folder / "part-00003").write_bytes((folder / "part-00003").read_bytes()[:200])
    with pytest.raises(DataError, match=r"part-00003 cannot be read .*; remove it"):
        in_parts(options)
    (folder / "part-00003").unlink()
    assert in_parts(options) == ["part-00003"] and (options.out / "index.json").exists()
    assert not (folder / MANIFEST).exists()


def test_bad_text_names_the_line_of_the_file(options: PrepareOptions, tmp_path: Path) -> None:
    lines = (tmp_path / "train.de").read_bytes().split(b"\n")
    lines[200] = b"\xff"
    (tmp_path / "train.de").write_bytes(b"\n".join(lines))
    with pytest.raises(TrmtError, match=r"train.de, line 201: not valid UTF-8"):
        in_parts(options)


def test_sides_of_different_length_are_refused(options: PrepareOptions, tmp_path: Path) -> None:
    with (tmp_path / "train.de").open("a") as stream:
        stream.write("one more\n")
    with pytest.raises(DataError, match=r"train.en has 300 lines but .*train.de has 301"):
        in_parts(options)


@pytest.mark.parametrize("corpus", ["-", "hf:."])
def test_a_corpus_that_is_not_a_file_is_refused(options: PrepareOptions, corpus: str) -> None:
    with pytest.raises(ConfigError, match="is not a file that all workers can read"):
        in_parts(replace(options, train=(corpus,)))


def test_a_corpus_in_a_store(options: PrepareOptions, tmp_path: Path) -> None:
    url = f"file://{tmp_path}"
    options = replace(options, train=(f"{url}/train.en,{url}/train.de", f"{url}/packed.tsv.gz"))
    assert len(in_parts(options)) > 3
    assert options.out and contents(options.out) == alone(options)


@pytest.mark.parametrize("count", [5, pytest.param(200, marks=pytest.mark.slow)])
def test_a_changed_byte_in_an_encoded_part_is_noticed(options: PrepareOptions, count: int) -> None:
    assert options.out
    expected, made = alone(options), options.out.with_name("set.parts")
    with pytest.raises(TrmtError):
        in_parts(options, accident=lambda part: "it fails" if part.name.startswith("part-00003") else None)
    kept = made.rename(made.with_name("kept"))
    for name in ("part-00000", MANIFEST):
        (path,) = kept.glob(f"{name}*")
        for content in flips(path, count):
            shutil.copytree(kept, made, dirs_exist_ok=True)
            (made / path.name).write_bytes(content)
            try:
                in_parts(options)
            except TrmtError as error:
                assert path.name in str(error) and "\n" not in str(error)
            else:  # a space of the manifest that became another one
                assert path.name == MANIFEST and contents(options.out) == expected
