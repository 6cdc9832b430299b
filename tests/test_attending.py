"""The weights of attention, pair by pair: what they belong to, and that batches do not change them."""

from __future__ import annotations

import pytest
import torch

from tests import texts
from tests.fakes import small_network
from tests.scripted import small_tokenizer
from trmt.errors import ConfigError, DataError
from trmt.insight.heatmaps import attending
from trmt.insight.heatmaps.attending import attend, joined, words
from trmt.nets.base import Ragged, Seq2Seq, Source
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


@pytest.mark.parametrize("together", [1, 3, 64])
def test_each_pair_has_the_weights_it_has_alone(
    tokenizer: Tokenizer,
    pairs: list[tuple[list[int], list[int]]],
    together: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = network(tokenizer)
    monkeypatch.setattr(attending, "TOGETHER", together)
    found = list(attend(net, tokenizer, pairs, kinds=("cross", "encoder", "decoder")))
    assert len(found) == len(pairs)
    bos, eos = tokenizer.target.bos, tokenizer.target.eos
    for pair, (source, target) in zip(found, pairs, strict=True):
        assert (pair.source, pair.target) == ((*source, eos), (*target, eos))
        alone = net(
            Source.of([[*source, eos]]),
            Ragged.of([[bos, *target]]),
            want=("attention", "encoder_attention", "decoder_attention"),
        )
        for kind, name in attending.NAMES.items():
            expected = getattr(alone, name)[:, 0]
            torch.testing.assert_close(pair.weights[kind], expected, atol=1e-5, rtol=1e-4)


def test_long_pairs_stand_in_small_batches(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    net = network(tokenizer)
    monkeypatch.setattr(attending, "CELLS", 300)
    net.register_forward_hook(lambda net, given, output: sizes.append(len(given[0])))
    lengths = [9, 9, 9, 20, 3, 3, 3]
    list(attend(net, tokenizer, ([[5] * length] * 2 for length in lengths)))
    assert sizes == [3, 1, 3]


def test_what_a_network_does_not_have_is_refused(tokenizer: Tokenizer) -> None:
    pair = [([5, 6], [7])]
    with pytest.raises(ConfigError, match="has no attention: it writes from a summary"):
        list(attend(network(tokenizer, "rnn", context="every"), tokenizer, pair))
    with pytest.raises(ConfigError, match="of its encoder to itself; leave out --kind encoder"):
        list(attend(network(tokenizer, "rnn"), tokenizer, pair, kinds=("cross", "encoder")))
    with pytest.raises(DataError, match="96; leave it out"):
        list(attend(network(tokenizer), tokenizer, [([5] * 96, [7])]))


def test_hard_attention_looks_at_one_place(tokenizer: Tokenizer) -> None:
    [found] = attend(network(tokenizer, "rnn", focus="gumbel"), tokenizer, [([5, 6, 7], [7, 8])])
    assert set(found.weights["cross"].unique().tolist()) == {0.0, 1.0}
    assert found.weights["cross"].shape[2:] == (3, 4)


def test_words_are_what_white_space_divides(tokenizer: Tokenizer) -> None:
    side = tokenizer.source
    for text in (*texts.ENGLISH, *texts.ALL["ar"], *texts.ALL["hi"], "漢字 と かな", "😀 x"):
        ids = [*side.encode([text])[0], side.eos]
        found = words(side, ids)
        assert [place for word in found for place in word] == list(range(len(ids)))
        spelled = [side.decode([ids[place] for place in word]) for word in found]
        assert spelled == [*side.normalise(text).split(), ""]
    assert words(side, []) == []


def test_joining_words_adds_up_columns_and_averages_rows() -> None:
    weights = torch.rand(2, 3, 5, 4)
    rows, columns = [range(2), range(2, 5)], [range(1), range(1, 3), range(3, 4)]
    found = joined(weights, rows, columns)
    assert found.shape == (2, 3, 2, 3)
    expected = sum(weights[1, 2, row, 1] + weights[1, 2, row, 2] for row in (2, 3, 4)) / 3
    torch.testing.assert_close(found[1, 2, 1, 1], expected)
    torch.testing.assert_close(found.sum(-1), joined(weights.sum(-1, keepdim=True), rows, [range(1)])[..., 0])
