from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.toy import write_documents
from trmt.errors import ConfigError, DataError
from trmt.sets.batches import BatchConfig, Batches
from trmt.sets.documents import DocumentOptions, prepare_documents
from trmt.sets.passages import Passages
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(toy_set: Path) -> Path:
    return PreparedSet.open(toy_set).tokenizer_folder


@pytest.fixture(scope="module")
def documents(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    folder = tmp_path_factory.mktemp("documents")
    train = write_documents(folder / "train.txt", count=30, seed=1)
    dev = write_documents(folder / "dev.txt", count=4, seed=2)
    options = DocumentOptions((train,), dev, folder / "set", tokenizer_folder)
    return prepare_documents(options)


def passages(
    data: PreparedSet, *, passage_tokens: int = 40, next_sentence: bool = True, seed: int = 3
) -> Passages:
    config = BatchConfig(tokens=200, passage_tokens=passage_tokens)
    return Passages(data, config, seed=seed, padding_free=True, next_sentence=next_sentence)


def test_a_set_of_documents_has_every_sentence(documents: PreparedSet, tokenizer_folder: Path) -> None:
    side = Tokenizer.load(tokenizer_folder).source
    text = Path(documents.index["corpora"][0]["name"]).read_text("utf-8")
    found = documents.split("train")
    numbers = found.scalars("document", np.arange(len(found)))
    ids, lengths = found.gather("text.ids", np.arange(len(found)))
    sentences = [side.decode(part) for part in np.split(ids.tolist(), np.cumsum(lengths)[:-1])]
    expected = [
        (number, line) for number, part in enumerate(text.strip().split("\n\n")) for line in part.split("\n")
    ]
    assert list(zip(numbers.tolist(), sentences, strict=True)) == expected
    documents.verify()


def test_preparing_again_does_nothing(documents: PreparedSet, tokenizer_folder: Path) -> None:
    name = documents.index["corpora"][0]["name"]
    dev = str(Path(name).with_name("dev.txt"))
    before = (documents.folder / "index.json").stat().st_mtime_ns
    prepare_documents(DocumentOptions((name,), dev, documents.folder, tokenizer_folder))
    assert (documents.folder / "index.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("next_sentence", [True, False])
def test_an_epoch_has_every_passage_once_and_they_fit(documents: PreparedSet, next_sentence: bool) -> None:
    found = passages(documents, next_sentence=next_sentence)
    taken = np.concatenate([batch for step in found.plan(0) for batch in step])
    assert sorted(taken.tolist()) == list(range(len(found.begins)))
    for step in found.plan(1):
        for batch in step:
            examples = found.load(batch, seed=(1, 0, 0))
            total = examples.columns["first.ids"].lengths + examples.columns["second.ids"].lengths
            assert (total <= found.max_pieces).all()
            assert (total + 3 <= found.lengths[batch] + 1).all()
            assert (examples.columns["first.ids"].lengths > 0).all()
            assert (examples.columns["second.ids"].lengths > 0).all() == next_sentence


def test_passages_of_one_segment_are_the_text(documents: PreparedSet) -> None:
    found = passages(documents, next_sentence=False)
    examples = found.load(np.arange(len(found.begins)))
    ids, _ = found.split.gather("text.ids", np.arange(len(found.split)))
    assert np.array_equal(examples.columns["first.ids"].values, ids)
    assert int(examples.columns["sizes"].values.sum()) == len(ids)


def test_the_second_segment_continues_the_first_or_is_of_another_document(documents: PreparedSet) -> None:
    found = passages(documents)
    segments = found.segments(0)
    document = found.document_ends  # different for different documents
    first, second = document[segments.first[0]], document[segments.second[0]]
    assert ((first == second) == segments.follows).all()
    assert (segments.second[0] == segments.first[1])[segments.follows].all()
    assert 0.25 < segments.follows.mean() < 0.75
    assert not np.array_equal(segments.follows, found.segments(1).follows)


def test_passages_depend_on_seed_epoch_and_number_alone(documents: PreparedSet) -> None:
    first, second = passages(documents), passages(documents)
    second.segments(5)  # another epoch in between
    some, all_of_them = np.array([4, 2, 7]), np.arange(10)
    one = first.load(some, seed=(1, 3, 0)).columns
    other = second.load(all_of_them, seed=(1, 9, 1)).columns
    assert one["key"].values.tolist() == other["key"].values[some].tolist()
    assert one["second.ids"].lengths.tolist() == other["second.ids"].lengths[some].tolist()
    assert one["key"].values.tolist() != passages(documents, seed=4).load(some).columns["key"].values.tolist()
    assert len(set(first.load(all_of_them).columns["key"].values.tolist())) == 10


def test_one_document_cannot_have_wrong_sentences(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("ka lomo\nti saru\n", encoding="utf-8")
    options = DocumentOptions((str(tmp_path / "one.txt"),), None, tmp_path / "set", tokenizer_folder)
    data = prepare_documents(options)
    with pytest.raises(ConfigError, match=r"loss\.next_sentence"):
        passages(data)
    assert len(passages(data, next_sentence=False).begins) == 1


def test_pairs_and_documents_are_not_confused(toy_set: Path, documents: PreparedSet) -> None:
    with pytest.raises(ConfigError, match="trmt pretrain"):
        Batches(documents, BatchConfig(), seed=1)
    with pytest.raises(ConfigError, match="--documents"):
        Passages(PreparedSet.open(toy_set), BatchConfig(), seed=1)


def test_documents_that_cannot_be_prepared_are_refused(
    tokenizer_folder: Path, separate_set: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("ka\n", encoding="utf-8")
    file = str(tmp_path / "text.txt")
    with pytest.raises(DataError, match="there is no file"):
        prepare_documents(DocumentOptions((str(tmp_path / "none"),), None, tmp_path / "a", tokenizer_folder))
    with pytest.raises(ConfigError, match="--language"):
        prepare_documents(DocumentOptions((file,), None, tmp_path / "a", tokenizer_folder, "fr"))
    separate = PreparedSet.open(separate_set).tokenizer_folder
    with pytest.raises(ConfigError, match="joint tokenizer"):
        prepare_documents(DocumentOptions((file,), None, tmp_path / "a", separate, "y"))
    assert not (tmp_path / "a").exists()
