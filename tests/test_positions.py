"""Every kind of position, against plain sums over one pair of places after the other."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from trmt.nets.positions import bucket, slopes

from tests.fakes import random_sentences, small_network
from trmt.errors import ConfigError
from trmt.lab.masked_encoder import MaskedEncoderConfig
from trmt.nets import layers, positions
from trmt.nets.base import Ragged, Source
from trmt.nets.linear import choose
from trmt.nets.transformer import TransformerConfig

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIZES = {"source_vocabulary": 23, "target_vocabulary": 23, "width": 12, "heads": 3}


def parts(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one sentence, 3 heads of width 4."""
    query, key, value = torch.randn(3, 1, 3, length, 4, generator=torch.Generator().manual_seed(2))
    return query, key, value


def by_hand(length: int, side: int, score: Any, value_at: Any) -> Tensor:
    """Attention with the scores and values of these functions of (head, query's place, key's place)."""
    rows = torch.zeros(length, 3, 4)
    for head in range(3):
        for at in range(length):
            places = range(at + 1) if side else range(length)
            weights = [math.exp(float(score(head, at, other))) for other in places]
            for weight, other in zip(weights, places, strict=True):
                rows[at, head] += weight / sum(weights) * value_at(head, at, other)
    return rows.flatten(1)


def found(net: Any, config: Any, layer: int, length: int, side: int, *, steady: bool) -> Tensor:
    distance = positions.distances(length, length, torch.device("cpu"))
    past = torch.ones(length, length, dtype=torch.bool)
    mask = layers.blocked(past.tril() if side else past)[None, None]
    look = positions.look(net, config, layer, distance, side=side, steady=steady)
    return look(*parts(length), mask)[0]


@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("side", [0, 1])
@torch.no_grad()
def test_relative_positions_add_a_vector_to_each_key_and_value(side: int, steady: bool) -> None:
    net = small_network("transformer", **SIZES, positions="relative", reach=2)
    apart = (net.decoder_apart if side else net.encoder_apart)[1]
    query, key, value = (part[0] for part in parts(7))

    def vector(kind: int, at: int, other: int) -> Tensor:
        return apart[kind, min(max(other - at, -2), 2) + 2]

    def score(head: int, at: int, other: int) -> Tensor:
        return query[head, at] @ (key[head, other] + vector(0, at, other)) / math.sqrt(4)

    want = by_hand(7, side, score, lambda head, at, other: value[head, other] + vector(1, at, other))
    torch.testing.assert_close(found(net, net.config, 1, 7, side, steady=steady), want, **CLOSE)


@pytest.mark.parametrize("side", [0, 1])
@torch.no_grad()
def test_alibi_takes_away_what_grows_with_the_distance(side: int) -> None:
    net = small_network("transformer", **SIZES, positions="alibi")
    query, key, value = (part[0] for part in parts(7))

    def score(head: int, at: int, other: int) -> Tensor:
        return query[head, at] @ key[head, other] / 2 - float(net.table[head]) * abs(at - other)

    want = by_hand(7, side, score, lambda head, _, other: value[head, other])
    torch.testing.assert_close(found(net, net.config, 0, 7, side, steady=False), want, **CLOSE)


def test_the_slopes_are_those_of_the_paper() -> None:
    assert slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    torch.testing.assert_close(slopes(16), 2 ** (-torch.arange(1, 17) / 2))
    torch.testing.assert_close(slopes(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))
    assert len(slopes(12)) == 12 and slopes(12)[:8].tolist() == slopes(8).tolist()
    assert slopes(1).tolist() == [2.0**-8]


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 6), (4, 20), (64, 500)])
@pytest.mark.parametrize("both_sides", [True, False])
def test_the_buckets_are_those_of_t5(buckets: int, farthest: int, both_sides: bool) -> None:
    T5Attention = transformers.models.t5.modeling_t5.T5Attention

    distance = torch.arange(-600, 601)
    theirs = T5Attention._relative_position_bucket(
        distance, bidirectional=both_sides, num_buckets=buckets, max_distance=farthest
    )
    ours = bucket(distance, buckets=buckets, farthest=farthest, both_sides=both_sides)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("side", [0, 1])
@torch.no_grad()
def test_t5_adds_a_number_of_the_head_and_the_bucket(side: int) -> None:
    net = small_network("transformer", **SIZES, positions="t5", buckets=8, farthest=6)
    query, key, value = (part[0] for part in parts(9))

    def score(head: int, at: int, other: int) -> Tensor:
        place = torch.tensor(other - at)
        number = int(bucket(place, buckets=8, farthest=6, both_sides=not side))
        return query[head, at] @ key[head, other] / 2 + net.biases[side, number, head]

    want = by_hand(9, side, score, lambda head, _, other: value[head, other])
    torch.testing.assert_close(found(net, net.config, 0, 9, side, steady=False), want, **CLOSE)


@torch.no_grad()
def test_t5_equals_the_attention_of_hugging_face() -> None:
    T5Attention = transformers.models.t5.modeling_t5.T5Attention

    net = small_network("transformer", positions="t5", score_scale=False, buckets=8, farthest=20, heads=4)
    config = transformers.T5Config(
        d_model=16, d_kv=4, num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=20
    )
    theirs = T5Attention(config, has_relative_attention_bias=True).eval()
    layer = net.encoder[0]
    layer.own.bias.zero_(), layer.own_out.bias.zero_()
    for matrix, weight in zip((theirs.q, theirs.k, theirs.v), layer.own.weight.chunk(3), strict=True):
        matrix.weight.copy_(weight)
    theirs.o.weight.copy_(layer.own_out.weight)
    theirs.relative_attention_bias.weight.copy_(net.biases[0])
    x_1LD = torch.randn(1, 13, 16, generator=torch.Generator().manual_seed(1))
    from trmt.nets.transformer_layers import attend_around, own_parts

    merged = own_parts(layer, net.config, x_1LD)
    ours = layer.own_out(attend_around(net, net.config, 0, merged, torch.zeros(1, 1, 1, 13)))
    torch.testing.assert_close(ours, theirs(x_1LD, position_bias=theirs.compute_bias(13, 13))[0], **CLOSE)


@torch.no_grad()
def test_complex_embeddings_have_amplitude_frequency_and_phase() -> None:
    net = small_network("transformer", positions="complex", tied="none")
    net.target_turns.copy_(torch.randn(1, 23, 8))
    ids, position = torch.tensor([5, 9, 5]), torch.tensor([0, 3, 40])
    x = net.target_embedding(ids)
    got = positions.placed(net, net.config, x, ids, position, side=1)
    for row, (token, place) in enumerate(zip(ids.tolist(), position.tolist(), strict=True)):
        for column in range(8):
            amplitude, phase = cmath.polar(complex(*x[row, 2 * column : 2 * column + 2].tolist()))
            turned = cmath.rect(amplitude, float(net.target_turns[0, token, column]) * place + phase)
            pair = [turned.real, turned.imag]
            assert got[row, 2 * column : 2 * column + 2].tolist() == pytest.approx(pair, abs=1e-5)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
@torch.no_grad()
def test_concatenated_positions_stand_beside_the_piece(kind: Any) -> None:
    options = {"position_join": "concatenate", "position_width": 6}
    for tied in ("all", "target", "none"):
        net = small_network("transformer", positions=kind, tied=tied, **options)
        assert net.output.weight.shape == (23, 16)
        assert net.source_embedding.weight.shape == (23, 16 if tied == "all" else 10)
        ids, position = torch.tensor([5, 9]), torch.tensor([4, 2])
        x = net.source_embedding(ids)
        got = positions.placed(net, net.config, x, ids, position, side=0)
        table = layers.sinusoids(96, 6) if kind == "sinusoidal" else net.positions[0]
        assert torch.equal(got, torch.cat([x[:, :10], table[position]], 1))


LONG = [[5, 6, 7] * 9, [8] * 20]


@pytest.mark.parametrize("kind", ["none", "rotary", "relative", "t5", "alibi", "complex"])
@torch.inference_mode()
def test_positions_without_a_table_go_on(kind: Any) -> None:
    """Sentences longer than `longest`, in steps as at once, and as with a table that is longer."""
    net = small_network("transformer", positions=kind, longest=8)
    longer = small_network("transformer", positions=kind, longest=64)
    longer.load_state_dict(net.state_dict())
    source, target = Source.of(LONG), Ragged.of([[1, *sentence] for sentence in LONG])
    want = longer(source, target).hidden
    torch.testing.assert_close(net(source, target).hidden, want, **CLOSE)
    assert net.most_tokens > 10**6
    stepper = net.frozen(choose())
    state = stepper.start(source, hypotheses=1, room=1000)
    steps = []
    for token in torch.tensor([[1, *LONG[0][:19]], [1, *LONG[1][:19]]]).unbind(1):
        output, state = stepper.step(token[:, None, None], state)
        steps.append(output.hidden[0, 0, 0])
    torch.testing.assert_close(torch.stack(steps), want[:20], **CLOSE)


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_positions_with_a_table_end(kind: Any) -> None:
    net = small_network("transformer", positions=kind, longest=8)
    assert net.most_tokens == 8
    with pytest.raises(ConfigError, match="27 pieces, the network positions for 8"):
        net(Source.of(LONG), Ragged.of([[1], [1]]))
    with pytest.raises(ConfigError, match="9 target positions"):
        net.frozen(choose()).start(Source.of([[5]]), hypotheses=1, room=9)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"position_join": "concatenate", "positions": "alibi"}, ("position_join", "positions")),
        ({"position_join": "concatenate", "position_width": 16}, ("position_width", "width")),
        ({"positions": "t5", "buckets": 6}, ("positions", "buckets", "farthest")),
        ({"positions": "t5", "buckets": 32, "farthest": 16}, ("positions", "buckets", "farthest")),
        ({"positions": "complex", "width": 15, "heads": 3}, ("positions", "width")),
        ({"positions": "rotary", "width": 10, "heads": 2}, ("positions", "width", "heads")),
        ({"width": 16, "heads": 3}, ("width", "heads")),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], named: tuple[str, ...]) -> None:
    given: dict[str, Any] = {"width": 16, "heads": 2, **options}
    for refuse in (
        lambda: TransformerConfig(source_vocabulary=9, target_vocabulary=9, **given),
        lambda: MaskedEncoderConfig(source_vocabulary=9, **given),
    ):
        with pytest.raises(ConfigError) as caught:
            refuse()
        assert all(name in str(caught.value) for name in named)


@pytest.mark.parametrize("kind", ["complex", "relative", "t5"])
def test_frequencies_and_distances_are_not_held_in_int8(kind: Any) -> None:
    net = small_network("transformer", positions=kind, longest=8)
    names = [
        name for name, _ in net.named_parameters() if name.split("_")[-1] in ("turns", "apart", "biases")
    ]
    assert names and all(net.get_parameter(name).dim() > 2 for name in names)


@torch.inference_mode()
def test_a_sentence_has_the_same_bits_beside_longer_ones() -> None:
    short, longer = [[5, 9, 4]], [[5, 9, 4], *random_sentences(3, longest=60, seed=4)]
    for kind in ("relative", "t5", "alibi", "complex", "rotary", "none"):
        stepper = small_network("transformer", positions=kind, reach=3, width=64).frozen(choose())
        alone, beside = (
            stepper.start(Source.of(sources), hypotheses=2, room=9) for sources in (short, longer)
        )
        for token in (1, 7, 8):
            tokens = [torch.full((count, 2, 1), token) for count in (1, len(longer))]
            (one, alone), (other, beside) = stepper.step(tokens[0], alone), stepper.step(tokens[1], beside)
            assert torch.equal(one.hidden[0], other.hidden[0]), kind
