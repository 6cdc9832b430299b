"""One step of the decoder: the kernel against plain PyTorch, on every processor, and the cache they share."""

from __future__ import annotations

from itertools import product as pairs
from typing import Any

import pytest
import torch
from torch import Tensor
from trmt.native.stepping import Cache

from tests.fakes import random_sentences, small_network
from trmt.native import products
from trmt.nets import linear
from trmt.nets.base import Source
from trmt.nets.transformer import TransformerStepper

needs_kernels = pytest.mark.skipif(not products.best(), reason="no C compiler here")
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"norm_place": "pre", "heads": 4, "width": 64},
    {"norm": "rms", "positions": "learned", "width": 96, "heads": 2, "feed_forward": 50},
    {"width": 128, "heads": 2, "tied": "none"},
)
SOURCES = random_sentences(5, longest=21, seed=4)


@torch.inference_mode()
def walk(stepper: TransformerStepper, *, hypotheses: int, steps: int = 36) -> list[Tensor]:
    """Hidden states along a way with exchanges, departures and arrivals."""
    generator = torch.Generator().manual_seed(1)
    found = []
    state = stepper.start(Source.of(SOURCES[:3]), hypotheses=hypotheses, room=steps)
    for step in range(steps):
        count = 2 if step == 7 else 1
        tokens = torch.randint(4, 23, (len(state), hypotheses, count), generator=generator)
        output, state = stepper.step(tokens, state)
        found.append(output.hidden)
        parents = torch.randint(0, hypotheses, (len(state), hypotheses), generator=generator)
        state = state.reorder(parents)
        if step == 11:
            state = state.keep(torch.tensor([2, 0]))
        if step == 20:
            younger = stepper.start(Source.of(SOURCES[3:]), hypotheses=hypotheses, room=steps)
            state = state.join(younger) if step % 2 else younger.join(state)
        if step == 24:
            state = state.keep(torch.tensor([3, 0, 1]))
        if step == 26:
            others = stepper.start(Source.of(SOURCES[1:3]), hypotheses=hypotheses, room=steps)
            state = state.fork().replace(torch.tensor([2, 0]), others)
    return found


def steppers(precision: products.Precision, **options: Any) -> tuple[TransformerStepper, TransformerStepper]:
    """The same network stepped by the kernel and by plain PyTorch; both make products alike."""
    net = small_network("transformer", **options)
    kernel, plain = (net.frozen(linear.choose(precision)) for _ in range(2))
    assert isinstance(kernel, TransformerStepper) and isinstance(plain, TransformerStepper)
    assert kernel.kernel and plain.stepwise
    plain.kernel = plain.reader = None
    return kernel, plain


@needs_kernels
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_kernel_computes_what_pytorch_does(
    precision: products.Precision, options: dict[str, Any]
) -> None:
    kernel, plain = steppers(precision, **options)
    for hypotheses in (1, 3):
        both = zip(walk(kernel, hypotheses=hypotheses), walk(plain, hypotheses=hypotheses), strict=True)
        for one, other in both:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
            assert (one == other).float().mean() > 0.99  # most are the same to the last bit


@needs_kernels
def test_every_processor_steps_alike() -> None:
    for precision, options in pairs(("fp32", "int8"), KINDS):
        kernel, _ = steppers(precision, **options)  # type: ignore[arg-type]
        expected = walk(kernel, hypotheses=2)
        for processor in products.processors():
            assert kernel.kernel
            kernel.kernel.network.processor = processor
            for one, other in zip(walk(kernel, hypotheses=2), expected, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
                if precision == "int8":
                    assert (one == other).float().mean() > 0.99


@needs_kernels
def test_plain_pytorch_makes_the_same_int8_steps_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, _ = steppers("int8", **KINDS[1])
    native = walk(kernel, hypotheses=3)
    monkeypatch.setattr(products, "processors", lambda: ())
    alone = small_network("transformer", **KINDS[1]).frozen(linear.choose("int8"))
    assert isinstance(alone, TransformerStepper) and alone.stepwise and not alone.kernel
    for one, other in zip(native, walk(alone, hypotheses=3), strict=True):
        assert (one == other).float().mean() > 0.99


@needs_kernels
def test_broken_weights_show() -> None:
    net = small_network("transformer", width=64)
    with torch.no_grad():
        net.decoder[1].own.weight[3, 5] = torch.nan  # type: ignore[index, union-attr]
    stepper = net.frozen(linear.choose("fp32"))
    assert walk(stepper, hypotheses=2, steps=3)[-1].isnan().any()  # type: ignore[arg-type]


@needs_kernels
@pytest.mark.parametrize("options", [{"activation": "gelu"}, {"positions": "rotary"}, {"width": 12}])
def test_what_the_kernel_has_not_is_left_to_pytorch(options: dict[str, Any]) -> None:
    stepper = small_network("transformer", **options).frozen(linear.choose("int8"))
    assert isinstance(stepper, TransformerStepper) and not stepper.stepwise


def test_the_cache_follows_ancestors() -> None:
    cache = Cache.empty((1, 2), layers=1, width=2)
    cache.make_room(4)
    histories = [[], []]
    for column, parents in enumerate([[0, 1], [1, 1], [0, 0], [1, 0]]):
        position = torch.tensor([column])
        cache.mark(position)
        new = torch.tensor([[[column, 0.0], [column, 1.0]]])
        cache.put(0, new, new + 100, position)
        histories = [[*history, [column, k]] for k, history in enumerate(histories)]
        keys, values = cache.histories(0, column + 1)
        assert keys[0].tolist() == histories and torch.equal(values, keys + 100)
        cache = cache.reorder(torch.tensor([parents]))
        histories = [list(histories[parent]) for parent in parents]
