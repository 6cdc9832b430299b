"""Kernels for training against plain PyTorch, with gradients; how kernels are built."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.derivatives import assert_same, gradients, needs_kernels
from trmt.native import build, training
from trmt.native.addresses import OUT_OF_MEMORY
from trmt.nets import layers
from trmt.nets.layers import LayerNorm, RMSNorm, Spans
from trmt.nets.ragged import Ragged


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


@needs_kernels
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("norm_class", [LayerNorm, RMSNorm])
def test_add_norm_is_the_sum_and_its_norm(norm_class: type[nn.Module], rows: int) -> None:
    norm = norm_class(48)
    nn.init.uniform_(norm.weight)
    x, y = (torch.randn(rows, 48, requires_grad=True) for _ in range(2))

    def both(added: Tensor, out: Tensor) -> Tensor:
        return torch.cat([added, 3 * out])

    inputs = (x, y, *norm.parameters())
    ours = gradients(lambda: both(*layers.add_norm(x, y, norm, 0.0)), *inputs)
    assert_same(ours, gradients(lambda: both(x + y, norm(x + y)), *inputs))


@needs_kernels
def test_add_norm_when_only_one_of_its_results_is_used() -> None:
    norm = LayerNorm(16)
    x, y = (torch.randn(5, 16, requires_grad=True) for _ in range(2))
    for index in (0, 1):
        ours = gradients(lambda index=index: layers.add_norm(x, y, norm, 0.0)[index], x, y)
        assert_same(ours, gradients(lambda index=index: (x + y, norm(x + y))[index], x, y))


@needs_kernels
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_in_the_output_and_the_gradient(p: float) -> None:
    x = torch.ones(2000, 96, requires_grad=True)
    out = layers.dropout(x, p)
    kept = out != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=0.005)
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)))
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    # Rows, columns and neighbours are independent.
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
    first, second = layers.dropout(x, 0.5), layers.dropout(x, 0.5)
    torch.manual_seed(7)
    assert torch.equal(layers.dropout(x, 0.5), first)
    assert not torch.equal(first, second)


@needs_kernels
def test_dropout_before_the_norm_has_the_gradient_of_what_it_kept() -> None:
    norm, x = LayerNorm(32), torch.randn(70, 32, requires_grad=True)
    y = torch.randn(70, 32, requires_grad=True)
    torch.manual_seed(3)
    ours = gradients(lambda: layers.add_norm(x, y, norm, 0.3)[1], x, y, *norm.parameters())
    torch.manual_seed(3)
    kept = (layers.add_norm(torch.zeros_like(x), torch.ones_like(y), norm, 0.3)[0]).detach()
    assert 0 < (kept == 0).float().mean() < 1
    assert_same(ours, gradients(lambda: norm(x + y * kept), x, y, *norm.parameters()))


@needs_kernels
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("rows", [1, 64, 131])
def test_a_product_is_that_of_torch(rows: int, relu: bool) -> None:
    linear = layers.Linear(24, 48, relu=relu)
    x = torch.randn(rows, 24, requires_grad=True)
    inputs = (x, *linear.parameters())

    def theirs() -> Tensor:
        out = F.linear(x, linear.weight, linear.bias)
        return F.relu(out) if relu else out

    assert_same(gradients(lambda: linear(x), *inputs), gradients(theirs, *inputs))


def test_a_product_does_not_hide_nan() -> None:
    linear = layers.Linear(16, 16, relu=True)
    assert linear(torch.full((2, 16), torch.nan, requires_grad=True)).isnan().all()


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_number_of_threads_changes_no_bit(dtype: str) -> None:
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[1])); torch.manual_seed(0)\n"
        "from torch import nn\n"
        "from trmt.nets import layers\n"
        "from trmt.nets.layers import Spans\n"
        "from trmt.nets.ragged import Ragged\n"
        "lengths = [17, 4, 31, 9, 60, 2] * 8\n"
        "spans = Spans.of(Ragged.of([[1] * n for n in lengths]))\n"
        "merged = torch.randn(sum(lengths), 192).to(getattr(torch, sys.argv[2])).requires_grad_()\n"
        "norm = nn.LayerNorm(64)\n"
        "x = layers.packed_self_attention(merged, spans, 4, causal=True)\n"
        "out = layers.dropout(layers.add_norm(x, merged[:, :64].contiguous(), norm, 0.1)[1], 0.1)\n"
        "out.square().sum().backward()\n"
        "import hashlib\n"
        "tensors = (out.detach(), merged.grad, norm.weight.grad, norm.bias.grad)\n"
        "print(hashlib.sha256(b''.join(t.float().numpy().tobytes() for t in tensors)).hexdigest())\n"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code, threads, dtype], check=True, capture_output=True, text=True
        ).stdout
        for threads in ("1", "2", "3")
    }
    assert len(seen) == 1


@needs_kernels
def test_the_default_dtype_of_a_program_changes_nothing() -> None:
    """Kernels write fp32 into what PyTorch has reserved for them."""
    norm, spans = LayerNorm(32), Spans.of(Ragged.of([[1] * 9, [1] * 4]))
    linear = layers.Linear(32, 96)
    x, target = torch.randn(13, 32, requires_grad=True), torch.randint(0, 96, (13,))

    def found() -> list[Tensor]:
        _, out = layers.add_norm(x, x, norm, 0.0)
        merged = linear(out)
        losses = training.cross_entropy(merged.detach().clone(), target, 0.1)
        assert losses is not None
        attended = layers.packed_self_attention(merged, spans, 2, causal=True)
        return [losses, *torch.autograd.grad(attended.sum(), [x, *linear.parameters(), *norm.parameters()])]

    expected = found()
    torch.set_default_dtype(torch.float64)
    try:
        assert all(torch.equal(one, other) for one, other in zip(found(), expected, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


@needs_kernels
def test_a_kernel_without_memory_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemory:
        def trmt_attention_fp32(self, *_: object) -> int:
            return OUT_OF_MEMORY

    monkeypatch.setattr("trmt.native.training.library", OutOfMemory)
    with pytest.raises(MemoryError):
        layers.packed_self_attention(torch.randn(4, 3 * 32), Spans.of(Ragged.of([[1] * 4])), 2, causal=True)


def test_without_a_compiler_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert build.load.__wrapped__("training") is None


@needs_kernels
def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    x, calls = torch.randn(4, 16, requires_grad=True), []
    monkeypatch.setattr(training, "_call", lambda *arguments: calls.append(arguments) or 0)
    layers.dropout(x, 0.5)
    assert calls
    calls.clear()
    monkeypatch.setenv("TRMT_KERNELS", "0")
    layers.dropout(x, 0.5), layers.Linear(16, 16)(x), layers.add_norm(x, x, LayerNorm(16), 0.1)
    assert not calls


def test_other_dtypes_are_left_to_pytorch() -> None:
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    linear, norm = layers.Linear(16, 16).double(), LayerNorm(16).double()
    spans = Spans.of(Ragged.of([[1] * 3, [1]]))
    results = (
        training.linear(x, linear.weight, linear.bias, False),
        training.dropout(x, 0.5),
        training.add_norm(x, x, norm, 0.1),
        training.self_attention(x.repeat(1, 3), spans, 1, True),
        training.cross_attention(x, x.repeat(1, 2), spans, spans, 1),
        training.cross_attention(x.float(), x.repeat(1, 2).bfloat16(), spans, spans, 1),
        training.cross_entropy(x, torch.zeros(4, dtype=torch.long), 0.1),
    )
    assert all(result is None for result in results)
    assert layers.add_norm(linear(x), layers.dropout(x, 0.5), norm, 0.1)[1].dtype == torch.float64


def test_weights_in_bf16_are_left_to_pytorch() -> None:
    x = torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)
    linear, norm = layers.Linear(16, 16).bfloat16(), LayerNorm(16).bfloat16()
    assert training.linear(x, linear.weight, linear.bias, False) is None
    assert training.add_norm(x, x, norm, 0.1) is None
    assert layers.add_norm(linear(x), layers.dropout(x, 0.5), norm, 0.1)[1].dtype == torch.bfloat16


@needs_kernels
def test_other_shapes_and_ids_are_left_to_pytorch() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    weight, spans = torch.randn(16, 16), Spans.of(Ragged.of([[1] * 3, [1]]))
    fewer = Spans.of(Ragged.of([[1] * 4]))
    zeros = torch.zeros(4, dtype=torch.long)
    results = (
        training.linear(x, weight, torch.randn(15), False),
        training.linear(x, weight, torch.randn(16).double(), False),
        training.add_norm(x, x, LayerNorm(8), 0.1),
        training.add_norm(x[:, :8].contiguous(), x[:, :8].contiguous(), LayerNorm(8), 0.1),
        training.dropout(torch.randn(4, 15), 0.1),
        training.linear(x, torch.randn(15, 16), torch.randn(15), False),
        training.self_attention(x.repeat(1, 4), spans, 1, True),
        training.cross_attention(x, x.repeat(1, 2), spans, fewer, 1),
        training.cross_attention(x, x.repeat(1, 4), spans, spans, 1),
        training.cross_entropy(x, zeros[:3], 0.1),
        training.cross_entropy(x, zeros.int(), 0.1),
    )
    assert all(result is None for result in results)


@needs_kernels
def test_a_compiler_that_cannot_build_them_gives_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.load.__wrapped__("training") is None
    assert "cannot build trmt's kernels" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.so"))


@needs_kernels
@pytest.mark.parametrize("relu", [True, False])
def test_products_in_bf16_are_near_and_weights_keep_fp32(relu: bool) -> None:
    linear = layers.Linear(64, 96, relu=relu)
    x = torch.randn(50, 64, requires_grad=True)
    inputs = (x, *linear.parameters())
    exact = gradients(lambda: linear(x), *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        near = gradients(lambda: linear(x), *inputs)
    assert [found.dtype for found in near] == [torch.bfloat16] + [torch.float32] * 3
    for one, other in zip(near, exact, strict=True):
        assert F.cosine_similarity(one.float().flatten(), other.flatten(), dim=0) > 0.99
    assert not torch.equal(near[0], exact[0])


@needs_kernels
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("norm_class", [LayerNorm, RMSNorm])
def test_add_norm_in_bf16_is_that_in_fp32_rounded(norm_class: type[nn.Module], p: float) -> None:
    """The norm is that of the rounded sum, which the backward pass finds again."""
    norm = norm_class(48)
    nn.init.uniform_(norm.weight)
    x, y, grad_added, grad = (torch.randn(70, 48).bfloat16() for _ in range(4))
    x.requires_grad_(), y.requires_grad_()
    torch.manual_seed(3)
    added, out = layers.add_norm(x, y, norm, p)
    torch.manual_seed(3)
    exact_sum, _ = layers.add_norm(x.detach().float(), y.detach().float(), norm, p)
    torch.testing.assert_close(added, exact_sum.bfloat16())
    rounded = added.detach().float().requires_grad_()
    exact = layers.add_norm(rounded, torch.zeros(70, 48), norm, 0.0)[1]
    torch.testing.assert_close(out, exact.bfloat16())
    weights = list(norm.parameters())
    found = torch.autograd.grad((added, out), [x, y, *weights], (grad_added, grad))
    expected = torch.autograd.grad(exact, [rounded, *weights], grad.float())
    grad_x = expected[0] + grad_added.float()
    torch.testing.assert_close(found[0], grad_x.bfloat16())
    kept = found[1] != 0
    torch.testing.assert_close(found[1][kept], (grad_x[kept] / (1 - p)).bfloat16())
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=0.03)
    for one, other in zip(found[2:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize("vocabulary", [29, 64, 1000])
def test_the_loss_in_bf16_is_that_in_fp32_rounded_once(vocabulary: int) -> None:
    logits, target = 4 * torch.randn(20, vocabulary).bfloat16(), torch.randint(-1, vocabulary, (20,))
    exact = logits.float()
    found, expected = (training.cross_entropy(x, target, 0.1) for x in (logits, exact))
    assert found is not None and expected is not None and torch.equal(found, expected)
    assert torch.equal(logits, exact.bfloat16())


@needs_kernels
def test_bf16_is_rounded_as_torch_rounds_it() -> None:
    """All numbers of 16 bits, infinities and NaNs among them, moved by a bias to every place between two."""
    x = (torch.arange(1 << 16, dtype=torch.int32) << 16).view(torch.float32).view(1024, 64)
    x = torch.where(x.abs() < 1e-37, 0.0, x)  # a processor may take what has fewer digits for zero
    for bias in (0.0, 2.0**-9, 1.5 * 2.0**-9, 3e38):
        out = x.bfloat16()
        training._call("add_bias", out.dtype, out, torch.full((64,), bias), *out.shape, ctypes.c_int(0))
        expected = (x + bias).bfloat16()
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(7), expected.nan_to_num(7))


@needs_kernels
@pytest.mark.parametrize("norm", [nn.LayerNorm(48, bias=False), nn.LayerNorm(48, elementwise_affine=False)])
def test_norms_without_a_kernel_are_left_to_pytorch(norm: nn.Module) -> None:
    x, y = torch.randn(5, 48, requires_grad=True), torch.randn(5, 48)
    torch.testing.assert_close(layers.add_norm(x, y, norm, 0.0)[1], norm(x + y))


@needs_kernels
def test_without_a_home_there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(unknown))
    assert build.load.__wrapped__("training") is not None


def cut_short(library: Path) -> None:
    os.truncate(library, library.stat().st_size // 2)


def flip_a_bit(library: Path) -> None:
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    library.write_bytes(data)


def empty(library: Path) -> None:
    library.write_bytes(b"")


def remove_checksum(library: Path) -> None:
    library.with_suffix(".sha256").unlink()


DAMAGES = (cut_short, flip_a_bit, empty, remove_checksum)
LOAD = """
import os, sys
from pathlib import Path

from trmt.native import build

build.SOURCES = Path(sys.argv[1])
for cache in sys.argv[2:]:
    os.environ["XDG_CACHE_HOME"] = cache
    found = build.load.__wrapped__("tiny")
    print(found and found.answer())
"""


@needs_kernels
def test_a_damaged_library_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process, which half a library could kill."""
    (tmp_path / "tiny.c").write_text("int answer(void) { return 42; }\n", encoding="ascii")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "whole"))
    assert build.load.__wrapped__("tiny").answer() == 42
    caches = {tmp_path / "copied": None}
    caches |= {tmp_path / damage.__name__: damage for damage in DAMAGES}
    for cache, damage in caches.items():
        shutil.copytree(tmp_path / "whole", cache)
        if damage:
            damage(next(cache.rglob("*.so")))
    before = {cache: next(cache.rglob("*.so")).stat().st_mtime_ns for cache in caches}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path), *map(str, caches)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split()) == (0, ["42"] * len(caches)), done.stderr
    assert not done.stderr
    for cache, damage in caches.items():
        built = next(cache.rglob("*.so"))
        assert (built.stat().st_mtime_ns != before[cache]) == bool(damage), "only these are built again"
        assert built.stat().st_size == next((tmp_path / "whole").rglob("*.so")).stat().st_size


@needs_kernels
def test_a_row_of_zeros_has_a_norm() -> None:
    """It is divided by epsilon."""
    for norm in (LayerNorm(32), RMSNorm(32, eps=1e-4)):
        x = torch.stack([torch.zeros(32), torch.linspace(-1e-3, 1e-3, 32)]).requires_grad_()
        ours = gradients(lambda norm=norm, x=x: layers.add_norm(x, x, norm, 0.0)[1], x)
        assert_same(ours, gradients(lambda norm=norm, x=x: norm(x + x), x), 1e-4)


def transposed(x: Tensor) -> Tensor:
    """The same numbers, stored column by column."""
    return x.t().contiguous().t()


def with_gaps(x: Tensor) -> Tensor:
    """The same numbers, stored with a gap behind each row."""
    return torch.cat([x, x], 1)[:, : x.shape[1]]


NORM = LayerNorm(48)
LINEAR = layers.Linear(48, 32)
WEIGHTS = {"product": tuple(LINEAR.parameters()), "norm": tuple(NORM.parameters())}
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dropout": lambda x, _: layers.dropout(x, 0.5),
    "product": lambda x, _: LINEAR(x),
    "sum": lambda x, y: layers.add_norm(x, y, NORM, 0.0)[0],
    "norm": lambda x, y: layers.add_norm(x, y, NORM, 0.0)[1],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_may_have_any_strides(name: str) -> None:
    x, y = (torch.randn(70, 48, requires_grad=True) for _ in range(2))
    torch.manual_seed(1)
    out = OPERATIONS[name](x, y)
    grad = torch.randn(out.shape)
    inputs = (x, *WEIGHTS.get(name, ()))
    expected = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    for other in (transposed(grad), with_gaps(grad)):
        torch.testing.assert_close(torch.autograd.grad(out, inputs, other, retain_graph=True), expected)


@pytest.mark.parametrize("strided", [transposed, with_gaps])
@pytest.mark.parametrize("name", ["product", "sum", "norm"])
def test_inputs_may_have_any_strides(name: str, strided: Callable[[Tensor], Tensor]) -> None:
    x, y = (torch.randn(70, 48) for _ in range(2))
    ours, theirs = [strided(part).requires_grad_() for part in (x, y)], [x.requires_grad_(), y]
    found = [OPERATIONS[name](*parts) for parts in (ours, theirs)]
    torch.testing.assert_close(*found)
    pairs = zip(found, (ours, theirs), strict=True)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), some[0]) for out, some in pairs))


@pytest.mark.parametrize("strided", [transposed, with_gaps])
def test_dropout_takes_any_strides(strided: Callable[[Tensor], Tensor]) -> None:
    x = strided(torch.arange(1.0, 65 * 64 + 1).view(65, 64))
    out = layers.dropout(x, 0.5)
    assert torch.equal(out[out != 0], 2 * x[out != 0])
    assert 0.4 < float((out == 0).float().mean()) < 0.6
