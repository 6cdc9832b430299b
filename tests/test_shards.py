from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trmt.errors import DataError
from trmt.sets.shards import (
    ColumnSpec,
    PreparedSet,
    RaggedArray,
    ShardWriter,
    Split,
    describe_file,
    dev_file,
    write_index,
)

COLUMNS = (
    ColumnSpec("source.ids", "<u2"),
    ColumnSpec("target.ids", "<u4"),
    ColumnSpec("corpus", "<u2", ragged=False),
)
Pairs = list[tuple[list[int], list[int], int]]


def random_pairs(count: int, *, seed: int = 0) -> Pairs:
    chooser = np.random.default_rng(seed)

    def sentence(top: int) -> list[int]:
        # With sentences without pieces, and the highest ids of each dtype.
        return chooser.integers(0, top, chooser.integers(0, 9), endpoint=True).tolist()

    return [(sentence(2**16 - 1), sentence(2**32 - 1), int(chooser.integers(9))) for _ in range(count)]


def joined(sentences: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(sentences))


def ragged(sentences: list[list[int]], dtype: str) -> RaggedArray:
    lengths = np.array([len(sentence) for sentence in sentences])
    return RaggedArray(np.array(joined(sentences), dtype), lengths)


def block(some: Pairs) -> dict[str, Any]:
    sources, targets, corpora = (list(column) for column in zip(*some, strict=True)) if some else ([], [], [])
    return {
        "source.ids": ragged(sources, "<u4"),
        "target.ids": ragged(targets, "<u4"),
        "corpus": np.array(corpora, np.int64),
    }


def write(folder: Path, some: Pairs, *, shard_pairs: int = 100, shard_bytes: int = 1 << 30) -> ShardWriter:
    folder.mkdir(exist_ok=True)
    sizes = np.random.default_rng(1).integers(0, 40, len(some) + 1)
    with ShardWriter(
        folder, "train", columns=COLUMNS, shard_pairs=shard_pairs, shard_bytes=shard_bytes
    ) as writer:
        begin = 0
        for size in sizes.tolist():
            writer.write(block(some[begin : begin + size]))
            begin += size
    return writer


def opened(folder: Path, writer: ShardWriter) -> Split:
    return Split(folder, "train", entry=writer.entry())


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A set with three training shards and a dev set of two pairs."""
    folder = tmp_path / "set"
    writer = write(folder, random_pairs(250))
    with ShardWriter(folder, "dev", columns=COLUMNS[:1]) as dev:
        dev.write({"source.ids": ragged([[7], [8, 9]], "<u4")})
    texts = {dev_file("source"): "a\u2028b\r\n\x0b\n", dev_file("target"): "c\nd\n"}
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    index = {
        "languages": ["en", "de"],
        "corpora": [{"weight": 1.0}, {"weight": 2.5}],
        "splits": {"train": writer.entry(), "dev": dev.entry()},
        "files": writer.files | dev.files | {name: describe_file(folder / name) for name in texts},
    }
    write_index(folder, index)
    return folder


@pytest.mark.parametrize("limits", [{"shard_pairs": 1}, {"shard_pairs": 100}, {"shard_bytes": 500}, {}])
def test_the_values_that_were_written_are_read(tmp_path: Path, limits: dict[str, int]) -> None:
    some = random_pairs(500)
    split = opened(tmp_path, write(tmp_path, some, **limits))
    assert len(split) == 500
    everything = np.arange(500)
    for column, at in (("source.ids", 0), ("target.ids", 1)):
        values, lengths = split.gather(column, everything)
        assert values.tolist() == joined(pair[at] for pair in some)
        assert lengths.tolist() == split.lengths(column).tolist() == [len(pair[at]) for pair in some]
    assert split.scalars("corpus", everything).tolist() == [pair[2] for pair in some]


def test_gather_is_like_indexing_one_by_one(tmp_path: Path) -> None:
    some = random_pairs(500)
    split = opened(tmp_path, write(tmp_path, some, shard_pairs=60))
    chooser = np.random.default_rng(2)
    for size in (0, 1, 2, 50, 900):
        indices = chooser.integers(0, 500, size)  # unordered, repeated, from many shards
        values, lengths = split.gather("target.ids", indices)
        assert values.tolist() == joined(some[at][1] for at in indices)
        assert lengths.tolist() == [len(some[at][1]) for at in indices]
        assert values.dtype == np.dtype("<u4")
        assert split.scalars("corpus", indices).tolist() == [some[at][2] for at in indices]


@pytest.mark.parametrize("index", [-1, 50])
def test_indices_out_of_range_are_errors(tmp_path: Path, index: int) -> None:
    split = opened(tmp_path, write(tmp_path, random_pairs(50), shard_pairs=20))
    with pytest.raises(IndexError):
        split.gather("source.ids", np.array([3, index]))


@pytest.mark.parametrize("size", [1, 33, 1000])
def test_blocks_have_all_pairs_in_order(tmp_path: Path, size: int) -> None:
    some = random_pairs(200)
    split = opened(tmp_path, write(tmp_path, some, shard_pairs=70))
    copy = tmp_path / "copy"
    copy.mkdir()
    with ShardWriter(copy, "train", columns=COLUMNS) as writer:
        for part in split.blocks(size):
            writer.write(part)
    again = opened(copy, writer)
    values, _ = again.gather("source.ids", np.arange(200))
    assert values.tolist() == joined(pair[0] for pair in some)
    assert again.lengths("target.ids").tolist() == split.lengths("target.ids").tolist()


def test_an_empty_split(tmp_path: Path) -> None:
    split = opened(tmp_path, write(tmp_path, []))
    assert len(split) == 0
    assert split.lengths("source.ids").tolist() == []
    assert list(split.blocks(10)) == []
    assert split.gather("source.ids", np.zeros(0, np.int64))[0].tolist() == []


def test_shards_of_empty_sentences(tmp_path: Path) -> None:
    split = opened(tmp_path, write(tmp_path, [([], [], 4)] * 5))
    values, lengths = split.gather("source.ids", np.arange(5))
    assert (values.tolist(), lengths.tolist()) == ([], [0] * 5)


def test_select_and_split_keep_sequences() -> None:
    part = ragged([[1, 2], [], [3], [4, 5, 6]], "<u2").select(np.array([True, True, False, True]))
    assert (part.values.tolist(), part.lengths.tolist()) == ([1, 2, 4, 5, 6], [2, 0, 3])
    assert [each.tolist() for each in part.split()] == [[1, 2], [], [4, 5, 6]]


def test_a_split_is_pickled_without_its_data(tmp_path: Path) -> None:
    split = opened(tmp_path, write(tmp_path, random_pairs(5000), shard_pairs=5000))
    expected = split.gather("source.ids", np.arange(5000))[0].tolist()
    pickled = pickle.dumps(split)
    assert len(pickled) < 2000
    assert pickle.loads(pickled).gather("source.ids", np.arange(5000))[0].tolist() == expected


def test_a_prepared_set_has_what_its_index_says(prepared: Path) -> None:
    found = PreparedSet.open(prepared)
    found.verify()
    assert found.languages == ("en", "de")
    assert found.corpus_weights.tolist() == [1.0, 2.5]
    assert found.dev_text() == (["a\u2028b\r", "\x0b"], ["c", "d"])
    assert len(found.split("train")) == 250
    assert found.fingerprint == PreparedSet.open(prepared).fingerprint
    with pytest.raises(DataError, match="no column 'weight', only source"):
        found.split("dev").lengths("weight")
    with pytest.raises(DataError, match="no test set"):
        found.split("test")


def test_a_truncated_or_missing_file_is_an_error_on_opening(prepared: Path) -> None:
    for name in PreparedSet.open(prepared).index["files"]:
        broken = prepared.with_name("broken")
        shutil.copytree(prepared, broken)
        content = (broken / name).read_bytes()
        for damaged in (content[:-1], content + b"\0", b""):
            (broken / name).write_bytes(damaged)
            with pytest.raises(DataError, match=rf"{name} has .* run `trmt prepare` again"):
                PreparedSet.open(broken)
        (broken / name).unlink()
        with pytest.raises(DataError, match=f"{name} is missing"):
            PreparedSet.open(broken)
        shutil.rmtree(broken)


def test_a_flipped_bit_is_an_error_in_verify(prepared: Path) -> None:
    for name in PreparedSet.open(prepared).index["files"]:
        path = prepared / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError, match=f"{name} was altered"):
            PreparedSet.open(prepared).verify()
        path.write_bytes(content)
    PreparedSet.open(prepared).verify()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"format": 1}', b'{"format": 99}', b"\xff"])
def test_a_broken_index_is_an_error(prepared: Path, content: bytes) -> None:
    (prepared / "index.json").write_bytes(content)
    with pytest.raises(DataError, match=r"index\.json is not"):
        PreparedSet.open(prepared)


def test_a_folder_without_an_index_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a prepared set; make one"):
        PreparedSet.open(tmp_path / "nowhere")


def test_a_column_may_have_keys_of_a_later_version(tmp_path: Path) -> None:
    writer = write(tmp_path, random_pairs(3))
    entry = writer.entry()
    entry["columns"] = [{**column, "later": 1} for column in entry["columns"]]
    assert Split(tmp_path, "train", entry=entry).columns == opened(tmp_path, writer).columns
