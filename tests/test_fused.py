"""The fused operations: kernels against plain PyTorch, with gradients; every way of attention against one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt import kernels
from trmt.arch import fused
from trmt.arch.base import Ragged
from trmt.arch.fused import Spans

needs_kernels = pytest.mark.skipif(fused.library() is None, reason="no C compiler here")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A switch that takes the kernels away."""
    return lambda: monkeypatch.setattr(fused, "library", lambda: None)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


def gradients(make: Callable[[], Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result, and the gradient of each input for a gradient that is different everywhere."""
    out = make()
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 2e-5) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def spans(*lengths: int) -> Spans:
    return Spans.of(Ragged.of([[1] * length for length in lengths]))


@needs_kernels
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_add_norm_is_the_sum_and_its_norm(kind: type[nn.Module], rows: int) -> None:
    norm = kind(48)
    nn.init.uniform_(norm.weight)
    x, y = (torch.randn(rows, 48, requires_grad=True) for _ in range(2))

    def both(added: Tensor, out: Tensor) -> Tensor:
        return torch.cat([added, 3 * out])

    inputs = (x, y, *norm.parameters())
    ours = gradients(lambda: both(*fused.add_norm(x, y, norm, 0.0)), *inputs)
    assert_same(ours, gradients(lambda: both(x + y, norm(x + y)), *inputs))


@needs_kernels
def test_add_norm_when_only_one_of_its_results_is_used() -> None:
    norm = nn.LayerNorm(16)
    x, y = (torch.randn(5, 16, requires_grad=True) for _ in range(2))
    for place in (0, 1):
        ours = gradients(lambda place=place: fused.add_norm(x, y, norm, 0.0)[place], x, y)
        assert_same(ours, gradients(lambda place=place: (x + y, norm(x + y))[place], x, y))


@needs_kernels
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_the_gradient_knows_which(p: float) -> None:
    x = torch.ones(2000, 96, requires_grad=True)
    out = fused.drop(x, p)
    kept = out != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=0.005)
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)))
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    # No row, column or neighbour knows of another: shares are near p everywhere, pairs are independent.
    for axis in (0, 1):
        spread = kept.float().mean(axis).std()
        expected = (p * (1 - p) / kept.shape[axis]) ** 0.5
        assert float(spread) == pytest.approx(expected, rel=0.25)
    for other in (kept.roll(1, 0), kept.roll(1, 1)):
        assert float((kept & other).float().mean()) == pytest.approx((1 - p) ** 2, abs=0.006)


@needs_kernels
def test_dropout_is_drawn_from_the_seed_and_anew_each_time() -> None:
    x = torch.ones(64, 64)
    torch.manual_seed(7)
    first, second = fused.drop(x, 0.5), fused.drop(x, 0.5)
    torch.manual_seed(7)
    assert torch.equal(fused.drop(x, 0.5), first)
    assert not torch.equal(first, second)


@needs_kernels
def test_dropout_before_the_norm_gives_the_gradient_of_what_it_kept() -> None:
    norm, x = nn.LayerNorm(32), torch.randn(70, 32, requires_grad=True)
    y = torch.randn(70, 32, requires_grad=True)
    torch.manual_seed(3)
    ours = gradients(lambda: fused.add_norm(x, y, norm, 0.3)[1], x, y, *norm.parameters())
    torch.manual_seed(3)
    kept = (fused.add_norm(torch.zeros_like(x), torch.ones_like(y), norm, 0.3)[0]).detach()
    assert 0 < (kept == 0).float().mean() < 1
    assert_same(ours, gradients(lambda: norm(x + y * kept), x, y, *norm.parameters()))


@needs_kernels
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("rows", [1, 64, 131])
def test_a_product_is_that_of_torch(rows: int, relu: bool) -> None:
    linear = fused.Linear(24, 40, relu=relu)
    x = torch.randn(rows, 24, requires_grad=True)
    inputs = (x, *linear.parameters())

    def theirs() -> Tensor:
        out = F.linear(x, linear.weight, linear.bias)
        return F.relu(out) if relu else out

    assert_same(gradients(lambda: linear(x), *inputs), gradients(theirs, *inputs))


def test_a_product_keeps_what_is_not_a_number() -> None:
    linear = fused.Linear(16, 16, relu=True)
    assert linear(torch.full((2, 16), torch.nan, requires_grad=True)).isnan().all()


LENGTHS = [(1,), (3, 1, 17, 5), (16, 32), (40, 2, 33), (2, 70)]


@needs_kernels
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_a_row_is_that_in_a_grid(
    lengths: tuple[int, ...], causal: bool, plain: Callable[[], None]
) -> None:
    here = spans(*lengths)
    merged = torch.randn(sum(lengths), 3 * 64, requires_grad=True)

    def attended() -> Tensor:
        return fused.attend_own(merged, here, 4, causal=causal)

    ours = gradients(attended, merged)
    plain()
    assert_same(ours, gradients(attended, merged))


@needs_kernels
@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_to_a_source_in_a_row_is_that_in_a_grid(
    lengths: tuple[int, ...], plain: Callable[[], None]
) -> None:
    here, over = spans(*lengths), spans(*(length + 4 for length in reversed(lengths)))
    query = torch.randn(sum(lengths), 64, requires_grad=True)
    wide = torch.randn(sum(lengths) + 4 * len(lengths), 3 * 128, requires_grad=True)

    def attended() -> Tensor:  # the memory of one layer of three: its rows do not touch
        return fused.attend_over(query, wide.chunk(3, -1)[1], here, over, 2)

    ours = gradients(attended, query, wide)
    plain()
    assert_same(ours, gradients(attended, query, wide))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_a_grid_is_each_sentence_by_itself(causal: bool) -> None:
    """The reference of all the others, against the definition."""
    lengths, heads, part = (3, 1, 6), 2, 5
    query, key, value = torch.randn(3, sum(lengths), heads, part)
    found = fused.attend_padded(query, key, value, spans(*lengths), spans(*lengths), causal=causal)
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        for head in range(heads):
            scores = query[rows, head] @ key[rows, head].T / part**0.5
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            expected = scores.softmax(-1) @ value[rows, head]
            torch.testing.assert_close(found[rows, head * part : (head + 1) * part], expected)
        begin += length


@pytest.mark.parametrize("causal", [True, False])
def test_many_sentences_share_grids_with_others_of_their_length(
    causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [1 + (7 * number) % 23 for number in range(100)]
    over = lengths if causal else [1 + (5 * number) % 31 for number in range(100)]
    query = torch.randn(sum(lengths), 2, 8, requires_grad=True)
    memory = torch.randn(sum(over), 2, 16, requires_grad=True)

    def attended() -> Tensor:
        key, value = memory.chunk(2, -1)
        return fused.attend_padded(query, key, value, spans(*lengths), spans(*over), causal=causal)

    ours = gradients(attended, query, memory)
    monkeypatch.setattr(fused, "TOGETHER", 1000)
    assert_same(ours, gradients(attended, query, memory))


def test_a_sentence_without_a_source_disturbs_nobody(plain: Callable[[], None]) -> None:
    here, over = spans(2, 3), spans(0, 4)
    query, memory = torch.randn(5, 32, requires_grad=True), torch.randn(4, 64, requires_grad=True)
    for _ in range(2):
        found = gradients(lambda: fused.attend_over(query, memory, here, over, 2), query, memory)
        assert all(x.isfinite().all() for x in found)
        alone = fused.attend_over(query[2:], memory, spans(3), spans(4), 2)
        torch.testing.assert_close(found[0][2:], alone)
        plain()


@needs_kernels
def test_the_number_of_threads_changes_no_bit() -> None:
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[1])); torch.manual_seed(0)\n"
        "from torch import nn\n"
        "from trmt.arch import fused\n"
        "from trmt.arch.base import Ragged\n"
        "from trmt.arch.fused import Spans\n"
        "lengths = [17, 4, 31, 9, 60, 2] * 8\n"
        "spans = Spans.of(Ragged.of([[1] * n for n in lengths]))\n"
        "merged = torch.randn(sum(lengths), 192, requires_grad=True)\n"
        "norm = nn.LayerNorm(64)\n"
        "x = fused.attend_own(merged, spans, 4, causal=True)\n"
        "out = fused.drop(fused.add_norm(x, merged[:, :64].contiguous(), norm, 0.1)[1], 0.1)\n"
        "out.square().sum().backward()\n"
        "import hashlib\n"
        "tensors = (out.detach(), merged.grad, norm.weight.grad, norm.bias.grad)\n"
        "print(hashlib.sha256(b''.join(t.numpy().tobytes() for t in tensors)).hexdigest())\n"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code, threads], check=True, capture_output=True, text=True
        ).stdout
        for threads in ("1", "2", "3")
    }
    assert len(seen) == 1


def test_without_a_compiler_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert kernels.load.__wrapped__("training") is None


def test_kernels_can_be_switched_off() -> None:
    code = "from trmt.arch import fused; print(fused.library())"
    environment = {**os.environ, "TRMT_KERNELS": "0"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == "None"


@needs_kernels
def test_a_compiler_that_cannot_build_them_is_said_and_survived(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.load.__wrapped__("training") is None
    assert "cannot build trmt's kernels" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("causal", [True, False])
def test_the_gpus_attention_gets_what_it_asks_for(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no kernel on the CPU: a stand-in with its signature checks the call and answers in its place."""
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
        out = fused.attend_padded(query, key, value, here, over, causal=window_size == (-1, 0))
        return out.unflatten(-1, (query.shape[1], -1))

    query, key, value = (torch.randn(rows, 2, 16).bfloat16() for rows in (10, 12, 12))
    expected = fused.attend(query, key, value, here, over, causal=causal)
    monkeypatch.setattr(fused, "varlen_attn", stand_in)
    monkeypatch.setattr(fused, "_CAUSAL", {True: {"window_size": (-1, 0)}, False: {"window_size": (-1, -1)}})
    monkeypatch.setattr(fused, "has_varlen", lambda x: True)
    assert torch.equal(fused.attend(query, key, value, here, over, causal=causal), expected)


@needs_kernels
def test_products_in_half_precision_are_near_and_stay_fp32_outside() -> None:
    linear = fused.Linear(64, 96, relu=True)
    x = torch.randn(50, 64, requires_grad=True)
    inputs = (x, *linear.parameters())
    exact = gradients(lambda: linear(x), *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        near = gradients(lambda: linear(x), *inputs)
    for one, other in zip(near, exact, strict=True):
        assert one.dtype == torch.float32
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.99
    assert not torch.equal(near[0], exact[0])


@needs_kernels
@pytest.mark.parametrize("norm", [nn.LayerNorm(48, bias=False), nn.LayerNorm(48, elementwise_affine=False)])
def test_norms_that_the_kernel_does_not_have_are_left_to_torch(norm: nn.Module) -> None:
    x, y = torch.randn(5, 48, requires_grad=True), torch.randn(5, 48)
    torch.testing.assert_close(fused.add_norm(x, y, norm, 0.0)[1], norm(x + y))


@needs_kernels
def test_without_a_home_there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(unknown))
    assert kernels.load.__wrapped__("training") is not None
