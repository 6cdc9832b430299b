"""Attention over packed sentences: every way to compute it against one, that one against the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.derivatives import assert_same, gradients, needs_kernels
from trmt.devices import varlen
from trmt.nets import layers
from trmt.nets.layers import Spans
from trmt.nets.ragged import Ragged


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Switches the kernels off."""
    return lambda: monkeypatch.setenv("TRMT_KERNELS", "0")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def spans(*lengths: int) -> Spans:
    return Spans.of(Ragged.of([[1] * length for length in lengths]))


LENGTHS = [(1,), (3, 1, 17, 5), (16, 32), (40, 2, 33), (2, 70)]


@needs_kernels
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_self_attention_is_that_in_a_grid(
    lengths: tuple[int, ...], causal: bool, plain: Callable[[], None]
) -> None:
    here = spans(*lengths)
    merged = torch.randn(sum(lengths), 3 * 64, requires_grad=True)

    def attended() -> Tensor:
        return layers.packed_self_attention(merged, here, 4, causal=causal)

    ours = gradients(attended, merged)
    plain()
    assert_same(ours, gradients(attended, merged))


@needs_kernels
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_cross_attention_is_that_in_a_grid(
    lengths: tuple[int, ...], plain: Callable[[], None]
) -> None:
    here, over = spans(*lengths), spans(*(length + 4 for length in reversed(lengths)))
    query = torch.randn(sum(lengths), 64, requires_grad=True)
    wide = torch.randn(sum(lengths) + 4 * len(lengths), 3 * 128, requires_grad=True)

    def attended() -> Tensor:  # keys and values of one layer of three: there are gaps between the rows
        return layers.packed_cross_attention(query, wide.chunk(3, -1)[1], here, over, 2)

    ours = gradients(attended, query, wide)
    plain()
    assert_same(ours, gradients(attended, query, wide))


@needs_kernels
@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_in_bf16_is_that_in_fp32_rounded_once(lengths: tuple[int, ...]) -> None:
    here, over = spans(*lengths), spans(*(length + 4 for length in lengths))
    merged = torch.randn(sum(lengths), 3 * 64).bfloat16()
    memory = torch.randn(sum(lengths) + 4 * len(lengths), 128).bfloat16()

    def attended(dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (merged, merged[:, :64], memory)]
        out = layers.packed_self_attention(inputs[0], here, 4, causal=True)
        out2 = layers.packed_cross_attention(inputs[1], inputs[2], here, over, 2)
        grad = torch.linspace(-1, 1, out.numel()).view(out.shape).bfloat16().to(dtype)
        return [out, out2, *torch.autograd.grad((out, out2), inputs, (grad, grad))]

    for ours, exact in zip(attended(torch.bfloat16), attended(torch.float32), strict=True):
        assert torch.equal(ours, exact.bfloat16())


@pytest.mark.parametrize("causal", [True, False])
def test_the_weights_are_those_of_the_values(causal: bool) -> None:
    here, heads = spans(3, 1, 5), 2
    merged = torch.randn(9, 3 * 32)
    query, key, _ = merged.chunk(3, -1)
    weights = layers.packed_weights(query, key, here, here, heads, causal=causal)
    some = layers.packed_weights(query, key, here, here, heads, causal=causal, only=slice(1, 2))
    torch.testing.assert_close(some, weights[:, 1:2])
    found = layers.packed_self_attention(merged, here, heads, causal=causal)
    values = merged.chunk(3, -1)[2]
    for number, (begin, end) in enumerate([(0, 3), (3, 4), (4, 9)]):
        value = values[begin:end].unflatten(-1, (heads, -1)).transpose(0, 1)
        mixed = weights[number, :, : end - begin, : end - begin] @ value
        torch.testing.assert_close(mixed.transpose(0, 1).flatten(1), found[begin:end], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_a_grid_is_each_sentence_by_itself(causal: bool) -> None:
    """What all others are compared with, against the definition."""
    lengths, heads, head_dim = (3, 1, 6), 2, 5
    query, key, value = torch.randn(3, sum(lengths), heads, head_dim)
    found = layers.attend_padded(query, key, value, spans(*lengths), spans(*lengths), causal=causal)
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        for head in range(heads):
            scores = query[rows, head] @ key[rows, head].T / head_dim**0.5
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            expected = scores.softmax(-1) @ value[rows, head]
            torch.testing.assert_close(found[rows, head * head_dim : (head + 1) * head_dim], expected)
        begin += length


@pytest.mark.parametrize("causal", [True, False])
def test_sentences_of_similar_length_share_a_grid(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [1 + (7 * number) % 23 for number in range(100)]
    over = lengths if causal else [1 + (5 * number) % 31 for number in range(100)]
    query = torch.randn(sum(lengths), 2, 8, requires_grad=True)
    memory = torch.randn(sum(over), 2, 16, requires_grad=True)

    def attended() -> Tensor:
        key, value = memory.chunk(2, -1)
        return layers.attend_packed(query, key, value, spans(*lengths), spans(*over), causal=causal)

    ours = gradients(attended, query, memory)
    monkeypatch.setattr(layers, "GROUP", 1000)
    assert_same(ours, gradients(attended, query, memory))


def test_a_sentence_without_a_source_disturbs_no_other(plain: Callable[[], None]) -> None:
    here, over = spans(2, 3), spans(0, 4)
    query, memory = torch.randn(5, 32, requires_grad=True), torch.randn(4, 64, requires_grad=True)
    for _ in range(2):
        found = gradients(lambda: layers.packed_cross_attention(query, memory, here, over, 2), query, memory)
        assert all(x.isfinite().all() for x in found)
        alone = layers.packed_cross_attention(query[2:], memory, spans(3), spans(4), 2)
        torch.testing.assert_close(found[0][2:], alone)
        plain()


@pytest.mark.parametrize("causal", [True, False])
def test_the_attention_for_gpus_gets_what_it_asks_for(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not run on the CPU: a function with its signature checks the arguments."""
    here, over = spans(3, 1, 6), spans(2, 4, 6)

    def stand_in(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16
        assert query.dim() == key.dim() == value.dim() == 3
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert (cu_seq_q.tolist(), cu_seq_k.tolist()) == ([0, 3, 4, 10], [0, 2, 6, 12])
        assert (max_q, max_k) == (6, 6)
        assert window_size in ((-1, -1), (-1, 0))
        out = layers.attend_padded(query, key, value, here, over, causal=window_size == (-1, 0))
        return out.unflatten(-1, (query.shape[1], -1))

    query, key, value = (torch.randn(rows, 2, 16).bfloat16() for rows in (10, 12, 12))
    expected = layers.attend_packed(query, key, value, here, over, causal=causal)
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(varlen, "serves", lambda *_: True)
    assert torch.equal(layers.attend_packed(query, key, value, here, over, causal=causal), expected)


@needs_kernels
def test_other_head_dimensions_are_left_to_pytorch(plain: Callable[[], None]) -> None:
    here, merged = spans(5, 2, 9), torch.randn(16, 3 * 40, requires_grad=True)

    def attended() -> Tensor:  # heads of 20 and of 8
        return layers.packed_self_attention(merged, here, 2, causal=True) + layers.packed_self_attention(
            merged, here, 5, causal=True
        )

    ours = gradients(attended, merged)
    plain()
    assert_same(ours, gradients(attended, merged))


def test_queries_and_gradients_may_have_any_strides() -> None:
    here, merged = spans(3, 20, 6), torch.randn(29, 3 * 32)
    scattered, grad = merged.t().contiguous().t().requires_grad_(), torch.randn(29, 32)
    merged.requires_grad_()
    out, other = (layers.packed_self_attention(x, here, 2, causal=True) for x in (merged, scattered))
    torch.testing.assert_close(out, other)
    (expected,) = torch.autograd.grad(out, merged, grad, retain_graph=True)
    for gradient, result, given in (
        (grad.t().contiguous().t(), out, merged),
        (torch.cat([grad, grad], 1)[:, :32], out, merged),
        (grad, other, scattered),
    ):
        (found,) = torch.autograd.grad(result, given, gradient, retain_graph=True)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_attention_weights_are_dropped_if_wanted() -> None:
    here, over = spans(4, 9), spans(7, 5)
    merged, memory = torch.randn(13, 3 * 32), torch.randn(12, 2 * 32)

    def both(dropout: float) -> tuple[Tensor, Tensor]:
        own = layers.packed_self_attention(merged, here, 2, causal=False, dropout=dropout)
        cross = layers.packed_cross_attention(merged[:, :32], memory, here, over, 2, dropout=dropout)
        return own, cross

    draws = [both(0.2) for _ in range(400)]
    for place, whole in enumerate(both(0.0)):
        dropped = torch.stack([draw[place] for draw in draws])
        assert float(dropped.std(0).min()) > 0
        torch.testing.assert_close(dropped.mean(0), whole, atol=0.1, rtol=0.1)


def test_the_attention_for_gpus_is_not_asked_for_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    here, x = spans(3, 4), torch.randn(7, 2, 16)
    monkeypatch.setattr(varlen, "varlen_attn", lambda *_, **__: pytest.fail("it has no dropout"))
    monkeypatch.setattr(varlen, "serves", lambda *_: True)
    assert layers.attend_packed(x, x, x, here, here, causal=True, dropout=0.5).shape == (7, 32)
