"""Every kind of position, against plain sums over one pair of positions after the other."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.fakes import random_sentences, small_network
from trmt.errors import ConfigError
from trmt.lab.alibi import slopes
from trmt.lab.distance_attention import distances
from trmt.lab.t5_positions import bucket
from trmt.nets import layers
from trmt.nets.base import UNLIMITED, Decoding
from trmt.nets.linear import PlainProducts
from trmt.nets.ragged import Ragged, Source
from trmt.registry import NETWORKS, resolve

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIZES = {"d_model": 12, "heads": 3}


def qkv(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one sentence, 3 heads of dimension 4."""
    query, key, value = torch.randn(3, 1, 3, length, 4, generator=torch.Generator().manual_seed(2))
    return query, key, value


def by_hand(length: int, decoder: bool, score: Any, value_at: Any) -> Tensor:
    """Attention with the scores and values of these functions of (head, query position, key position)."""
    rows = torch.zeros(length, 3, 4)
    for head in range(3):
        for position in range(length):
            others = range(position + 1) if decoder else range(length)
            weights = [math.exp(float(score(head, position, other))) for other in others]
            for weight, other in zip(weights, others, strict=True):
                rows[position, head] += weight / sum(weights) * value_at(head, position, other)
    return rows.flatten(1)


def attention(net: Any, layer: int, length: int, decoder: bool) -> Tensor:
    """The attention that a network computes."""
    distance = distances(length, length, torch.device("cpu"))
    allowed = torch.ones(length, length, dtype=torch.bool)
    mask = layers.additive_mask(allowed.tril() if decoder else allowed)[None, None]
    return net.attend(layer, qkv(length), mask, distance, decoder=decoder)[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("decoder", [False, True])
@torch.no_grad()
def test_relative_positions_add_a_vector_to_each_key_and_value(decoder: bool, training: bool) -> None:
    net: Any = small_network("transformer-relative", **SIZES, max_distance=2).train(training)
    vectors = (net.decoder if decoder else net.encoder).distance_vectors[1]
    query, key, value = (x[0] for x in qkv(7))

    def vector(of_values: int, position: int, other: int) -> Tensor:
        return vectors[of_values, min(max(other - position, -2), 2) + 2]

    def score(head: int, position: int, other: int) -> Tensor:
        return query[head, position] @ (key[head, other] + vector(0, position, other)) / math.sqrt(4)

    expected = by_hand(7, decoder, score, lambda head, at, other: value[head, other] + vector(1, at, other))
    torch.testing.assert_close(attention(net, 1, 7, decoder), expected, **CLOSE)


@pytest.mark.parametrize("decoder", [False, True])
@torch.no_grad()
def test_alibi_subtracts_the_distance_times_a_slope(decoder: bool) -> None:
    net: Any = small_network("transformer-alibi", **SIZES)
    query, key, value = (x[0] for x in qkv(7))

    def score(head: int, position: int, other: int) -> Tensor:
        return query[head, position] @ key[head, other] / 2 - float(net.slopes_H[head]) * abs(
            position - other
        )

    expected = by_hand(7, decoder, score, lambda head, _, other: value[head, other])
    torch.testing.assert_close(attention(net, 0, 7, decoder), expected, **CLOSE)


def test_the_slopes_are_those_of_the_paper() -> None:
    assert slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    torch.testing.assert_close(slopes(16), 2 ** (-torch.arange(1, 17) / 2))
    torch.testing.assert_close(slopes(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))
    assert len(slopes(12)) == 12 and slopes(12)[:8].tolist() == slopes(8).tolist()
    assert slopes(1).tolist() == [2.0**-8]


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 6), (4, 20), (64, 500)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_buckets_are_those_of_t5(buckets: int, max_distance: int, bidirectional: bool) -> None:
    T5Attention = transformers.models.t5.modeling_t5.T5Attention

    distance = torch.arange(-600, 601)
    theirs = T5Attention._relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance
    )
    ours = bucket(distance, buckets=buckets, max_distance=max_distance, bidirectional=bidirectional)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("decoder", [False, True])
@torch.no_grad()
def test_t5_adds_a_number_of_the_head_and_the_bucket(decoder: bool) -> None:
    net: Any = small_network("transformer-t5", **SIZES, buckets=8, max_distance=6)
    biases = (net.decoder if decoder else net.encoder).distance_bias[0]
    query, key, value = (x[0] for x in qkv(9))

    def score(head: int, position: int, other: int) -> Tensor:
        distance = torch.tensor(other - position)
        number = int(bucket(distance, buckets=8, max_distance=6, bidirectional=not decoder))
        return query[head, position] @ key[head, other] / 2 + biases[number, head]

    expected = by_hand(9, decoder, score, lambda head, _, other: value[head, other])
    torch.testing.assert_close(attention(net, 0, 9, decoder), expected, **CLOSE)


@torch.no_grad()
def test_t5_equals_the_attention_of_hugging_face() -> None:
    T5Attention = transformers.models.t5.modeling_t5.T5Attention

    net: Any = small_network("transformer-t5+unscaled", buckets=8, max_distance=20, heads=4)
    config = transformers.T5Config(
        d_model=16, d_kv=4, num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=20
    )
    theirs = T5Attention(config, has_relative_attention_bias=True).eval()
    layer = net.encoder.layers[0]
    layer.self_qkv.bias.zero_(), layer.self_out.bias.zero_()
    for matrix, weight in zip((theirs.q, theirs.k, theirs.v), layer.self_qkv.weight.chunk(3), strict=True):
        matrix.weight.copy_(weight)
    theirs.o.weight.copy_(layer.self_out.weight)
    theirs.relative_attention_bias.weight.copy_(net.encoder.distance_bias[0])
    x_1LD = torch.randn(1, 13, 16, generator=torch.Generator().manual_seed(1))
    mask, position_L = torch.zeros(1, 1, 1, 13), torch.arange(13)
    _, sublayer = layer.self_sublayer(lambda qkv: net.grid_self_attention(0, qkv, position_L, mask))
    expected = theirs(x_1LD, position_bias=theirs.compute_bias(13, 13))[0]
    torch.testing.assert_close(sublayer(x_1LD), expected, **CLOSE)


@torch.no_grad()
def test_complex_embeddings_have_amplitude_frequency_and_phase() -> None:
    net: Any = small_network("transformer-complex", tied="none")
    embedding = net.decoder.embedding
    embedding.frequencies.weight.copy_(torch.randn(1, 23, 8))
    ids, position = torch.tensor([5, 9, 5]), torch.tensor([0, 3, 40])
    x, found = embedding.tokens(ids) * 4, embedding(ids, position)
    for row, (token, at) in enumerate(zip(ids.tolist(), position.tolist(), strict=True)):
        for column in range(8):
            amplitude, phase = cmath.polar(complex(*x[row, 2 * column : 2 * column + 2].tolist()))
            rotated = cmath.rect(
                amplitude, float(embedding.frequencies.weight[0, token, column]) * at + phase
            )
            pair = [rotated.real, rotated.imag]
            assert found[row, 2 * column : 2 * column + 2].tolist() == pytest.approx(pair, abs=1e-5)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
@torch.no_grad()
def test_concatenated_positions_stand_beside_the_embedding(positions: Any) -> None:
    for tied in ("all", "target", "none"):
        net: Any = small_network(
            "transformer-concatenated", positions=positions, tied=tied, position_columns=6
        )
        embedding = net.encoder.embedding
        assert net.output.weight.shape == (23, 16)
        assert embedding.tokens.weight.shape == (23, 16 if tied == "all" else 10)
        ids, position = torch.tensor([5, 9]), torch.tensor([4, 2])
        x = embedding.tokens(ids) * 4
        table = layers.sinusoids(96, 6) if positions == "sinusoidal" else embedding.positions[0]
        assert torch.equal(embedding(ids, position), torch.cat([x[:, :10], table[position]], 1))


LONG = [[5, 6, 7] * 9, [8] * 20]
WITHOUT_TABLE: list[tuple[str, dict[str, Any]]] = [
    ("transformer-no-positions", {}),
    ("transformer", {"positions": "rotary"}),
    ("transformer-relative", {}),
    ("transformer-t5", {}),
    ("transformer-alibi", {}),
    ("transformer-complex", {}),
]


@pytest.mark.parametrize(("name", "options"), WITHOUT_TABLE)
@torch.inference_mode()
def test_positions_without_a_table_have_no_limit(name: str, options: dict[str, Any]) -> None:
    """Sentences longer than `max_positions`, step by step as at once, and as with more positions."""
    net = small_network(name, **options, max_positions=8)
    longer = small_network(name, **options, max_positions=64)
    longer.load_state_dict(net.state_dict())
    source, target = Source.of(LONG), Ragged.of([[1, *sentence] for sentence in LONG])
    expected = longer(source, target).hidden
    torch.testing.assert_close(net(source, target).hidden, expected, **CLOSE)
    assert net.max_positions == UNLIMITED
    stepper = net.frozen(PlainProducts())
    state = stepper.start(source, Decoding(hypotheses=1, max_tokens=1000))
    steps = []
    for token in torch.tensor([[1, *LONG[0][:19]], [1, *LONG[1][:19]]]).unbind(1):
        hidden, state = stepper.step(token[:, None, None], state)
        steps.append(hidden[0, 0, 0])
    torch.testing.assert_close(torch.stack(steps), expected[:20], **CLOSE)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_positions_with_a_table_have_a_limit(positions: Any) -> None:
    net = small_network("transformer", positions=positions, max_positions=8)
    assert net.max_positions == 8
    with pytest.raises(ConfigError, match="27 tokens, the network has 8 positions"):
        net(Source.of(LONG), Ragged.of([[1], [1]]))
    with pytest.raises(ConfigError, match="9 target positions"):
        net.frozen(PlainProducts()).start(Source.of([[5]]), Decoding(hypotheses=1, max_tokens=9))


@pytest.mark.parametrize(
    ("variant", "options", "words"),
    [
        ("-concatenated", {"position_columns": 16}, ("position_columns", "d_model")),
        ("-t5", {"buckets": 6}, ("buckets", "max_distance")),
        ("-t5", {"buckets": 32, "max_distance": 16}, ("buckets", "max_distance")),
        ("-complex", {"d_model": 15, "heads": 3}, ("positions", "d_model")),
        ("", {"positions": "rotary", "d_model": 10, "heads": 2}, ("positions", "d_model", "heads")),
        ("", {"d_model": 16, "heads": 3}, ("d_model", "heads")),
    ],
)
@pytest.mark.parametrize("base", ["transformer", "masked-encoder"])
def test_options_that_exclude_each_other_are_refused(
    base: str, variant: str, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    sizes: dict[str, Any] = {"source_vocabulary": 9, "d_model": 16, "heads": 2}
    if base == "transformer":
        sizes["target_vocabulary"] = 9
    with pytest.raises(ConfigError) as caught:
        resolve(NETWORKS, base + variant).config_class(**{**sizes, **options})
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("name", ["complex", "relative", "t5"])
def test_frequencies_and_distances_are_not_held_in_int8(name: str) -> None:
    net = small_network(f"transformer-{name}", max_positions=8)
    ends = ("frequencies.weight", "distance_vectors", "distance_bias")
    names = [name for name, _ in net.named_parameters() if name.endswith(ends)]
    assert names and all(net.get_parameter(name).dim() > 2 for name in names)


@torch.inference_mode()
def test_a_sentence_has_the_same_bits_beside_longer_ones() -> None:
    short, longer = [[5, 9, 4]], [[5, 9, 4], *random_sentences(3, longest=60, seed=4)]
    for name, options in WITHOUT_TABLE:
        stepper = small_network(name, **options, d_model=64).frozen(PlainProducts())
        alone, beside = (stepper.start(Source.of(sources), Decoding(2, 9)) for sources in (short, longer))
        for token in (1, 7, 8):
            tokens = [torch.full((count, 2, 1), token) for count in (1, len(longer))]
            (one, alone), (other, beside) = stepper.step(tokens[0], alone), stepper.step(tokens[1], beside)
            assert torch.equal(one[0], other[0]), name
