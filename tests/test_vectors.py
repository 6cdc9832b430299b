from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import toy
from tests.toy import options
from trmt.bundles import bundles, checkpoints
from trmt.errors import ConfigError, DataError
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer
from trmt.training.run import train
from trmt.training.word_vectors import (
    TextPieces,
    WordVectors,
    read_vectors,
    set_rows,
    train_vectors,
    write_vectors,
)

gensim: Any = pytest.importorskip("gensim")

TOKENS = "encoder.embedding.tokens.weight"
WORDS = ("the", "Haus", "naïve", "日本", "x")


@pytest.fixture
def vectors() -> WordVectors:
    return WordVectors(WORDS, np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32))


def same(one: WordVectors, other: WordVectors) -> None:
    assert one.words == other.words
    np.testing.assert_allclose(one.rows, other.rows, rtol=1e-5, atol=1e-6)


def saved_by_gensim(vectors: WordVectors, path: Path, **how: Any) -> Path:
    keyed = gensim.models.KeyedVectors(vectors.rows.shape[1])
    keyed.add_vectors(list(vectors.words), vectors.rows)
    keyed.save_word2vec_format(str(path), **how)
    return path


@pytest.mark.parametrize("how", [{"binary": True}, {"binary": False}, {"write_header": False}])
def test_files_of_gensim_can_be_read(vectors: WordVectors, how: dict[str, Any], tmp_path: Path) -> None:
    """The two formats of word2vec, and the one of GloVe, which is without a header."""
    same(read_vectors(saved_by_gensim(vectors, tmp_path / "vectors", **how)), vectors)


def test_gensim_can_read_our_files(vectors: WordVectors, tmp_path: Path) -> None:
    write_vectors(tmp_path / "vectors.txt", vectors)
    keyed = gensim.models.KeyedVectors.load_word2vec_format(str(tmp_path / "vectors.txt"))
    same(WordVectors(tuple(keyed.index_to_key), keyed.vectors), vectors)
    same(read_vectors(tmp_path / "vectors.txt"), vectors)


def test_line_ends_in_binary_files_and_spaces_in_words_are_accepted(
    vectors: WordVectors, tmp_path: Path
) -> None:
    with (tmp_path / "old.bin").open("wb") as stream:
        stream.write(b"5 16\n")
        for word, row in zip(vectors.words, vectors.rows, strict=True):
            stream.write(word.encode() + b" " + row.tobytes() + b"\n")
    same(read_vectors(tmp_path / "old.bin"), vectors)
    (tmp_path / "glove.txt").write_text("a 1 2\n. . . 3 4\n", encoding="utf-8")
    found = read_vectors(tmp_path / "glove.txt")
    assert (found.words, found.rows.tolist()) == (("a", ". . ."), [[1, 2], [3, 4]])


def test_only_the_wanted_words_are_read(vectors: WordVectors, tmp_path: Path) -> None:
    found = read_vectors(saved_by_gensim(vectors, tmp_path / "v", binary=True), {"Haus", "none"})
    assert found.words == ("Haus",)
    np.testing.assert_array_equal(found.rows[0], vectors.rows[1])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "no vectors"),
        (b"a 1 2\nb 1\n", "line 2"),
        (b"a 1 nan\n", "not finite"),
        (b"2 9\na \0\0", "ends in vector 1"),
    ],
)
def test_damaged_files_are_errors(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "vectors").write_bytes(content)
    with pytest.raises(DataError, match=expected):
        read_vectors(tmp_path / "vectors")


def test_words_in_the_same_contexts_get_similar_vectors() -> None:
    """Words that are interchangeable become similar, and training again gives the same vectors."""
    generator = np.random.default_rng(1)
    groups = [(["red", "blue"], ["a", "b", "e"]), (["one", "two"], ["c", "d", "f"])]
    sentences = []
    for _ in range(2000):
        similar, context = groups[generator.integers(2)]
        sentences.append([str(generator.choice(similar)), *map(str, generator.permutation(context))])
    vectors = train_vectors(sentences, size=12, epochs=20)
    rows = dict(
        zip(vectors.words, vectors.rows / np.linalg.norm(vectors.rows, axis=1, keepdims=True), strict=True)
    )
    assert rows["red"] @ rows["blue"] > rows["red"] @ rows["one"] + 0.2
    np.testing.assert_array_equal(vectors.rows, train_vectors(sentences, size=12, epochs=20).rows)


def tokenizer_of(data: Path) -> Tokenizer:
    return Tokenizer.load(PreparedSet.open(data).tokenizer_folder)


def test_pieces_that_are_words_get_the_vector_of_the_word(toy_set: Path) -> None:
    side = tokenizer_of(toy_set).source
    pieces = side.pieces(range(side.vocabulary))
    index = next(n for n, piece in enumerate(pieces) if piece.startswith("▁") and len(piece) > 2)
    weight = torch.randn(side.vocabulary, 4)
    before, deviation = weight.clone(), float(weight.std())
    rows = np.array([[1, 2, 3, 4], [9, 9, 9, 9]], np.float32)
    assert set_rows(weight, WordVectors((pieces[index][1:], "other"), rows), side, where="here") == 1
    changed = (weight != before).any(1).nonzero().flatten().tolist()
    assert changed == [index]
    assert float(weight[index].std()) == pytest.approx(deviation)
    assert weight[index].argsort().tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match="another language"):
        set_rows(weight, WordVectors(("zzz",), rows[:1]), side, where="here")


def vectors_file(data: Path, folder: Path, size: int) -> str:
    side = tokenizer_of(data).source
    text = folder / "text.txt"
    text.write_text("\n".join(source for source, _ in toy.pairs(100, seed=3)), encoding="utf-8")
    write_vectors(folder / "vectors.txt", train_vectors(TextPieces([str(text)], side), size=size))
    return str(folder / "vectors.txt")


@pytest.mark.parametrize("frozen", [True, False])
def test_training_starts_with_word_vectors_and_keeps_frozen_ones(
    frozen: bool, toy_set: Path, tmp_path: Path
) -> None:
    file = vectors_file(toy_set, tmp_path, 16)
    settings = [f"vectors.source={file}", f"vectors.frozen={str(frozen).lower()}", "network.tied=target"]
    recipe = toy.recipe(tmp_path)

    def embeddings(run: Path, *more: str) -> tuple[torch.Tensor, torch.Tensor]:
        train(options(run, toy_set, recipe, *settings, "optim.weight_decay=0.1", *more))
        checkpoint = checkpoints.list_checkpoints(run)[-1]
        weights = bundles.read_weights(checkpoint.folder, checkpoint.manifest)
        return weights[TOKENS], weights["encoder.layers.0.self_qkv.weight"]

    early, early_other = embeddings(tmp_path / "run", "training.steps=3")
    late, late_other = embeddings(tmp_path / "run", "training.steps=6")
    assert torch.equal(early, late) == frozen
    assert not torch.equal(early_other, late_other)
    uninterrupted = embeddings(tmp_path / "uninterrupted", "training.steps=6")
    assert torch.equal(uninterrupted[0], late) and torch.equal(uninterrupted[1], late_other)
    plain = [s for s in settings if not s.startswith("vectors")]
    train(options(tmp_path / "plain", toy_set, recipe, *plain, "training.steps=3"))
    checkpoint = checkpoints.list_checkpoints(tmp_path / "plain")[-1]
    other = bundles.read_weights(checkpoint.folder, checkpoint.manifest)[TOKENS]
    assert not torch.allclose(other, early, atol=0.1)


def test_vectors_can_be_trained_on_the_prepared_set(toy_set: Path, tmp_path: Path, capsys: Any) -> None:
    train(options(tmp_path / "run", toy_set, toy.recipe(tmp_path), "vectors.target=train"))
    assert "pieces start with a word vector" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["vectors.frozen=true"], "vectors.source"),
        (["vectors.source=train", "vectors.frozen=true"], 'network.tied = "none"'),
        (["vectors.source=train", "vectors.target=train"], 'network.tied = "all"'),
        (["vectors.source=FILE"], "network.d_model is 16"),
        (["vectors.source=none.txt"], "none.txt"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(
    settings: list[str], expected: str, toy_set: Path, tmp_path: Path
) -> None:
    file = vectors_file(toy_set, tmp_path, 8)
    settings = [setting.replace("FILE", file) for setting in settings]
    with pytest.raises((ConfigError, DataError), match=expected):
        train(options(tmp_path / "run", toy_set, toy.recipe(tmp_path), *settings))
