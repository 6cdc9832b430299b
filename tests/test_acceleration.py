"""The seam for speed: everything works without trmt.native, and a faster version gives the plain result."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fakes import random_sentences, small_network
from tests.scripted import random_bundle, small_tokenizer
from trmt import acceleration, registry
from trmt.acceleration import accelerated
from trmt.decoding import top
from trmt.decoding.beam import Beam
from trmt.decoding.engine import Engine, frozen
from trmt.decoding.greedy import Greedy
from trmt.decoding.request import Request
from trmt.native import gpu, products
from trmt.nets import layers
from trmt.nets.base import Stepper
from trmt.nets.layers import LayerNorm, RMSNorm, Spans
from trmt.nets.ragged import Ragged, Source
from trmt.objectives import cross_entropy
from trmt.registry import ARCHITECTURES, NATIVE
from trmt.translating import TranslateOptions, Translator

needs_kernels = pytest.mark.skipif(not products.best_processor(), reason="no C compiler here")
LINES = ["Where can I buy a ticket?", "It rains.", "你好", "x y z 1 2 3"]


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the package trmt.native had been left out."""
    find_spec = registry.find_spec
    monkeypatch.setattr(
        registry, "find_spec", lambda name: None if name == "trmt.native" else find_spec(name)
    )
    caches = acceleration._entry, registry.optional
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_every_entry_is_there() -> None:
    assert all(callable(accelerated(name)) for name in NATIVE)


@pytest.mark.usefixtures("without_native")
def test_without_the_package_there_is_nothing_faster() -> None:
    assert not any(accelerated(name) for name in NATIVE)
    assert type(frozen(small_network("transformer"), "int8")) is Stepper


def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRMT_KERNELS", "0")
    assert not any(accelerated(name) for name in NATIVE)
    monkeypatch.setenv("TRMT_KERNELS", "1")
    assert accelerated("stepper")


def test_nothing_faster_is_traced() -> None:
    found: list[Any] = []

    def traced(x: Tensor) -> Tensor:
        found.append(accelerated("dropout"))
        return x + 1

    torch.compile(traced, backend="eager")(torch.ones(2))
    assert found == [None]


def test_the_core_imports_nothing_of_it() -> None:
    """A process that has the core's modules has not loaded trmt.native."""
    modules = "trmt.nets.ssru, trmt.decoding.engine, trmt.objectives.translation, trmt.translating"
    code = f"import sys, {modules}; print([name for name in sys.modules if name.startswith('trmt.native')])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


# Everything works without it


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.usefixtures("without_native")
def test_a_network_trains_and_decodes_without_it(name: str) -> None:
    net = small_network(name, dropout=0.1).train()
    output = net(Source.of([[5, 6, 2], [7, 2]]), Ragged.of([[1, 8], [1, 9, 10]]))
    net.readout(output.hidden).logsumexp(-1).sum().backward()
    requests = [Request((*ids, 2), 9, key=key) for key, ids in enumerate(random_sentences(5))]
    for search in (Greedy(), Beam(size=3)):
        engine = Engine(net.eval(), search, bos=1, eos=2, banned=(0, 1))
        assert len(list(engine.translate(requests))) == 5


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu", "d_model": 32}], ids=str)
def test_text_is_the_same_with_it_and_without(
    precision: Any, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    random_bundle(tmp_path / "bundle", small_tokenizer(tmp_path / "text"), **options)
    how = TranslateOptions(precision=precision, max_length=20, n_best=2)
    with_it = Translator.load(tmp_path / "bundle", options=how).translate(LINES)
    request.getfixturevalue("without_native")
    without = Translator.load(tmp_path / "bundle", options=how).translate(LINES)
    for one, other in zip(with_it, without, strict=True):
        assert [each.text for each in one.candidates] == [each.text for each in other.candidates]
        scores = [each.score for each in other.candidates]
        assert [each.score for each in one.candidates] == pytest.approx(scores, abs=1e-4)


# A faster version that serves returns the plain result

LENGTHS, SOURCE_LENGTHS = [3, 17, 1, 9], [5, 2, 30, 9]
SPANS, SOURCE = (Spans.of(Ragged.of([[1] * n for n in lengths])) for lengths in (LENGTHS, SOURCE_LENGTHS))
ROWS = sum(LENGTHS)


def linear(x: Tensor) -> Any:
    made = layers.Linear(48, 32, relu=True)
    return made(x), lambda: accelerated("linear")(x, made.weight, made.bias, True)


def add_norm(norm: Callable[[int], torch.nn.Module]) -> Callable[[Tensor], Any]:
    def both(x: Tensor) -> Any:
        made = norm(48)
        return layers.add_norm(x, x.flip(0), made, 0.0), lambda: accelerated("add_norm")(
            x, x.flip(0), made, 0.0
        )

    return both


def self_attention(x: Tensor) -> Any:
    return (
        layers.packed_self_attention(x, SPANS, 1, causal=True),
        lambda: accelerated("self_attention")(x, SPANS, 1, True),
    )


def cross_attention(x: Tensor) -> Any:
    query, kv = x[:, :16].contiguous(), torch.randn(sum(SOURCE_LENGTHS), 32)
    return (
        layers.packed_cross_attention(query, kv, SPANS, SOURCE, 1),
        lambda: accelerated("cross_attention")(query, kv, SPANS, SOURCE, 1),
    )


def loss(x: Tensor) -> Any:
    logits, target = x.detach().clone(), torch.randint(0, 48, (ROWS,))
    plain = cross_entropy._by_torch(logits.clone(), target, 48, 0.1, 1.0)
    return plain, lambda: (accelerated("cross_entropy")(logits, target, 0.1), logits)


def highest(x: Tensor) -> Any:
    scores = torch.randn(5, 1000)
    return top.top(scores.clone(), 4), lambda: accelerated("top")(scores, 4)


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "linear": linear,
    "add_norm": add_norm(LayerNorm),
    "add_rms_norm": add_norm(RMSNorm),
    "self_attention": self_attention,
    "cross_attention": cross_attention,
    "cross_entropy": loss,
    "top": highest,
}


@needs_kernels
@pytest.mark.parametrize("name", WAYS)
def test_what_serves_returns_the_plain_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    x = torch.randn(ROWS, 48, requires_grad=True)
    monkeypatch.setenv("TRMT_KERNELS", "0")
    plain, fast = WAYS[name](x)
    monkeypatch.delenv("TRMT_KERNELS")
    found = fast()
    assert found is not None
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=2e-5)


def test_without_a_gpu_its_kernels_do_not_serve() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    x, position_ST = torch.randn(2, 1, 1, 16), torch.zeros(2, 1)
    assert not gpu.serves_cached_attention(x, 16) and gpu.top(torch.randn(2, 300), 2) is None
    both = torch.stack([x, x])
    assert gpu.cached_attention(x, both, both, None, position_ST, 1) is None
