"""Encoder and decoder in C kernels, against the plain network and on every processor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fakes import random_sentences, small_network
from trmt.decoding.engine import frozen
from trmt.errors import TrmtError
from trmt.native import products
from trmt.native.products import PackedProduct, PackedProducts
from trmt.native.transformer import NativeStepper
from trmt.nets.base import Decoding, Precision, Seq2Seq, Stepper
from trmt.nets.linear import PlainProducts
from trmt.nets.ragged import Source

pytestmark = pytest.mark.skipif(not products.best_processor(), reason="no C compiler here")

SIZES: tuple[dict[str, Any], ...] = (
    {},
    {"norm_position": "pre", "heads": 4, "d_model": 64},
    {"norm": "rms", "positions": "learned", "d_model": 96, "heads": 2, "feed_forward": 50},
    {"d_model": 128, "heads": 2, "tied": "none", "output_bias": True, "norm_epsilon": 1e-3},
)
NETWORKS = [(name, options) for name in ("transformer", "ssru") for options in SIZES]
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
# One token, multiples of what kernels take at a time, more rows than keys and values are made of together.
SENTENCES = [[5], [*range(4, 20)], *random_sentences(12, longest=40, seed=4), [7] * 90]


@dataclass(frozen=True)
class ExactProducts:
    """Packed products; what lies between them is computed in double precision, as kernels do it."""

    made: Precision
    precision: Precision = "int8"

    def __call__(self, weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> PackedProduct:
        return PackedProduct(weight, bias, precision=self.made, relu=relu)


@pytest.fixture(params=NETWORKS, ids=lambda each: "-".join([each[0], *map(str, each[1].values())]))
def net(request: pytest.FixtureRequest) -> Seq2Seq:
    name, options = request.param
    return small_network(name, **options)


def native(net: Seq2Seq, precision: Precision) -> NativeStepper:
    stepper = frozen(net, precision)
    assert isinstance(stepper, NativeStepper)
    return stepper


def on_processors(stepper: NativeStepper) -> Iterator[int]:
    """Every processor, on which the stepper works from then on."""
    for processor in products.processors():
        stepper.encoder.network.processor = stepper.decoder.network.processor = processor
        yield processor


def assert_equal_bits(one: Tensor, other: Tensor, *, tolerance: float = 1e-6) -> None:
    """All close, and nearly all of them the same bits."""
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    assert (one == other).float().mean() > 0.99


# Decoding


@torch.inference_mode()
def walk(stepper: Stepper, *, hypotheses: int, steps: int = 36) -> list[Tensor]:
    """Hidden states of steps between which beams are reordered and sentences leave and join."""
    sources = random_sentences(5, longest=21, seed=4)
    draw = torch.Generator().manual_seed(1)
    decoding = Decoding(hypotheses, 2 * steps)
    found = []
    state = stepper.start(Source.of(sources[:3]), decoding)
    for step in range(steps):
        count = 2 if step == 7 else 1
        tokens = torch.randint(4, 23, (len(state), hypotheses, count), generator=draw)
        hidden, state = stepper.step(tokens, state)
        found.append(hidden)
        state = state.reorder(torch.randint(0, hypotheses, (len(state), hypotheses), generator=draw))
        if step == 11:
            state = state.keep(torch.tensor([2, 0]))
        if step == 20:  # a longer batch takes its slots
            longer = stepper.start(Source.of(sources[2:]), decoding)
            for _ in range(24):
                tokens = torch.randint(4, 23, (3, hypotheses, 1), generator=draw)
                hidden, longer = stepper.step(tokens, longer)
                longer = longer.reorder(
                    torch.randint(0, hypotheses, (len(longer), hypotheses), generator=draw)
                )
                found.append(hidden)
            state = longer.replace(torch.tensor([2, 0]), state)
            state = state.reorder(torch.randint(0, hypotheses, (len(state), hypotheses), generator=draw))
        if step == 24:
            state = state.keep(torch.tensor([2, 0, 1]))
        if step == 26:
            state = state.replace(torch.tensor([2, 0]), stepper.start(Source.of(sources[1:3]), decoding))
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("hypotheses", [1, 3])
def test_a_step_of_the_kernel_is_that_of_the_plain_network(
    net: Seq2Seq, precision: Precision, hypotheses: int
) -> None:
    ours = walk(native(net, precision), hypotheses=hypotheses)
    exact = net.frozen(ExactProducts(precision))
    assert getattr(exact.net, "exact", False)
    for one, other in zip(ours, walk(exact, hypotheses=hypotheses), strict=True):
        assert_equal_bits(one, other)
    plain = net.frozen(PackedProducts(precision))
    for one, other in zip(ours, walk(plain, hypotheses=hypotheses), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_processor_makes_the_same_steps(net: Seq2Seq, precision: Precision) -> None:
    stepper = native(net, precision)
    expected = walk(stepper, hypotheses=2)
    for _ in on_processors(stepper):
        for one, other in zip(walk(stepper, hypotheses=2), expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
            if precision == "int8":
                assert (one == other).float().mean() > 0.99


def test_plain_pytorch_makes_the_same_int8_steps_by_itself(net: Seq2Seq) -> None:
    plain = net.frozen(PlainProducts("int8"))
    both = zip(walk(native(net, "int8"), hypotheses=3), walk(plain, hypotheses=3), strict=True)
    for one, other in both:
        assert (one == other).float().mean() > 0.99


@pytest.mark.parametrize("precision", PRECISIONS)
@torch.inference_mode()
def test_a_step_does_not_depend_on_neighbours(net: Seq2Seq, precision: Precision) -> None:
    stepper, decoding = native(net, precision), Decoding(2, 9)
    sources = random_sentences(5, longest=21, seed=4)
    tokens = torch.randint(4, 23, (5, 2, 9), generator=torch.Generator().manual_seed(2))
    together, _ = stepper.step(tokens, stepper.start(Source.of(sources), decoding))
    for number, source in enumerate(sources):
        alone, _ = stepper.step(tokens[number : number + 1], stepper.start(Source.of([source]), decoding))
        assert torch.equal(alone[0], together[number])


@pytest.mark.parametrize("name", ["transformer", "ssru"])
def test_broken_weights_show(name: str) -> None:
    net = small_network(name, d_model=64)
    with torch.no_grad():
        net.get_parameter("decoder.layers.1.cross_out.weight")[3, 5] = torch.nan
    assert walk(native(net, "fp32"), hypotheses=2, steps=3)[-1].isnan().any()


@pytest.mark.parametrize("name", ["transformer", "ssru"])
@pytest.mark.parametrize(
    "options",
    [
        {"activation": "gelu"},
        {"positions": "rotary"},
        {"d_model": 12},
        {"embedding_norm": True},
        {"embedding_scale": False},
    ],
)
def test_what_the_kernel_does_not_compute_is_left_to_pytorch(name: str, options: dict[str, Any]) -> None:
    assert not isinstance(frozen(small_network(name, **options), "int8"), NativeStepper)


def test_a_subclass_may_compute_something_else() -> None:
    net = small_network("transformer")
    net.__class__ = type("Other", (type(net),), {})
    assert not isinstance(frozen(net), NativeStepper)


# The encoder


@torch.inference_mode()
def encoded(stepper: Stepper, sentences: list[list[int]]) -> list[Tensor]:
    """Cross-attention keys and values [2 * A, L, D] of each sentence; the mask is checked on the way."""
    memory, _, _ = stepper.start(Source.of(sentences), Decoding(1, 4)).take()
    if isinstance(stepper, NativeStepper):
        kv_SALD = memory["kv"]
    else:
        layers = len(stepper.net.decoder.layers)
        names = [f"{name}{layer}" for layer in range(layers) for name in ("key", "value")]
        kv_SALD = torch.stack([memory[name].transpose(1, 2).flatten(2) for name in names], 1)
    found = []
    for sentence, kv_ALD, mask_L in zip(sentences, kv_SALD, memory["mask"].flatten(1), strict=True):
        count = len(sentence)
        assert not mask_L[:count].any() and (mask_L[count:] == -torch.inf).all()
        found.append(kv_ALD[:, :count].clone())
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_kernel_encodes_as_the_plain_network(net: Seq2Seq, precision: Precision) -> None:
    ours = encoded(native(net, precision), SENTENCES)
    for one, other in zip(ours, encoded(net.frozen(ExactProducts(precision)), SENTENCES), strict=True):
        assert_equal_bits(one, other)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_processor_encodes_the_same(net: Seq2Seq, precision: Precision) -> None:
    stepper = native(net, precision)
    expected = encoded(stepper, SENTENCES)
    for _ in on_processors(stepper):
        for one, other in zip(encoded(stepper, SENTENCES), expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
            if precision == "int8":
                assert (one == other).float().mean() > 0.99


@pytest.mark.parametrize("precision", PRECISIONS)
def test_neighbours_change_no_bit_of_the_encoder_output(precision: Precision) -> None:
    stepper = native(small_network("transformer", **SIZES[1]), precision)
    for sentence, among in zip(SENTENCES, encoded(stepper, SENTENCES), strict=True):
        assert torch.equal(encoded(stepper, [sentence])[0], among)


def test_padding_holds_zeros() -> None:
    stepper = native(small_network("transformer"), "int8")
    memory, _, _ = stepper.start(Source.of([[5], [7] * 30]), Decoding(1, 4)).take()
    assert not memory["kv"][0, :, 1:].any() and memory["kv"][1].all(2).any()


@pytest.mark.parametrize("name", ["transformer", "ssru"])
def test_a_source_that_is_too_long_is_refused(name: str) -> None:
    stepper = native(small_network(name), "int8")
    with pytest.raises(TrmtError, match="a source has 97 tokens"):
        encoded(stepper, [[5] * 97])
    with pytest.raises(TrmtError, match="97 target positions"):
        stepper.start(Source.of([[5]]), Decoding(1, 97))
