"""Attention weights of pairs, and of their words."""

from __future__ import annotations

import pytest
import torch

from tests import texts
from tests.fakes import small_network
from tests.scripted import small_tokenizer
from trmt.errors import ConfigError, DataError
from trmt.insight.heatmaps import weights as weights_module
from trmt.insight.heatmaps.weights import attention_weights, word_weights, words
from trmt.nets.base import Seq2Seq, WantedWeights
from trmt.nets.ragged import Ragged, Source
from trmt.text.tokenizer import Tokenizer

SOURCES = [*texts.ENGLISH[:5], "a", "", texts.ALL["zh"][0]]
TARGETS = [texts.GERMAN[0], "b", *texts.GERMAN[2:5], texts.ALL["ar"][0], "c", ""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def pairs(tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    encoded = tokenizer.source.encode(SOURCES), tokenizer.target.encode(TARGETS)
    return list(zip(*encoded, strict=True))


def network(tokenizer: Tokenizer, architecture: str = "transformer", **options: object) -> Seq2Seq:
    size = tokenizer.source.vocabulary
    return small_network(architecture, source_vocabulary=size, target_vocabulary=size, **options)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_weights_do_not_depend_on_the_batch(
    tokenizer: Tokenizer,
    pairs: list[tuple[list[int], list[int]]],
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = network(tokenizer)
    monkeypatch.setattr(weights_module, "BATCH_PAIRS", batch_size)
    found = list(attention_weights(net, tokenizer, pairs, kinds=("cross", "encoder", "decoder")))
    assert len(found) == len(pairs)
    bos, eos = tokenizer.target.bos, tokenizer.target.eos
    for pair, (source, target) in zip(found, pairs, strict=True):
        assert (pair.source, pair.target) == ((*source, eos), (*target, eos))
        alone = net(
            Source.of([[*source, eos]]),
            Ragged.of([[bos, *target]]),
            want=WantedWeights(cross=True, encoder=True, decoder=True),
        )
        for kind in ("cross", "encoder", "decoder"):
            expected = getattr(alone, f"{kind}_attention")[:, 0]
            torch.testing.assert_close(pair.weights[kind], expected, atol=1e-5, rtol=1e-4)


def test_long_pairs_are_in_small_batches(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    net = network(tokenizer)
    monkeypatch.setattr(weights_module, "MAX_CELLS", 300)
    net.register_forward_hook(lambda net, given, output: sizes.append(len(given[0])))
    lengths = [9, 9, 9, 20, 3, 3, 3]
    list(attention_weights(net, tokenizer, ([[5] * length] * 2 for length in lengths)))
    assert sizes == [3, 1, 3]


def test_attention_that_a_network_does_not_have_is_refused(tokenizer: Tokenizer) -> None:
    pair = [([5, 6], [7])]
    with pytest.raises(ConfigError, match="has no cross-attention"):
        list(attention_weights(network(tokenizer, "rnn", context="every"), tokenizer, pair))
    with pytest.raises(ConfigError, match="has no encoder self-attention; leave out --kind encoder"):
        list(attention_weights(network(tokenizer, "rnn"), tokenizer, pair, kinds=("cross", "encoder")))
    with pytest.raises(DataError, match="96 positions; leave it out"):
        list(attention_weights(network(tokenizer), tokenizer, [([5] * 96, [7])]))


def test_hard_attention_has_a_single_weight_in_each_row(tokenizer: Tokenizer) -> None:
    [found] = attention_weights(
        network(tokenizer, "rnn-attention", attention="gumbel"), tokenizer, [([5, 6, 7], [7, 8])]
    )
    assert set(found.weights["cross"].unique().tolist()) == {0.0, 1.0}
    assert found.weights["cross"].shape[2:] == (3, 4)


def test_words_are_separated_by_white_space(tokenizer: Tokenizer) -> None:
    side = tokenizer.source
    for text in (*texts.ENGLISH, *texts.ALL["ar"], *texts.ALL["hi"], "漢字 と かな", "😀 x"):
        ids = [*side.encode([text])[0], side.eos]
        found = words(side, ids)
        assert [position for word in found for position in word] == list(range(len(ids)))
        spelled = [side.decode([ids[position] for position in word]) for word in found]
        assert spelled == [*side.normalise(text).split(), ""]
    assert words(side, []) == []


def test_word_weights_are_sums_of_columns_and_means_of_rows() -> None:
    weights = torch.rand(2, 3, 5, 4)
    rows, columns = [range(2), range(2, 5)], [range(1), range(1, 3), range(3, 4)]
    found = word_weights(weights, rows, columns)
    assert found.shape == (2, 3, 2, 3)
    expected = sum(weights[1, 2, row, 1] + weights[1, 2, row, 2] for row in (2, 3, 4)) / 3
    torch.testing.assert_close(found[1, 2, 1, 1], expected)
    torch.testing.assert_close(
        found.sum(-1), word_weights(weights.sum(-1, keepdim=True), rows, [range(1)])[..., 0]
    )
