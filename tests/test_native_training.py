"""The fused operations: kernels against plain PyTorch, with gradients; how kernels are come by."""

from __future__ import annotations

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
from trmt import native
from trmt.nets import fused


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


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


@needs_kernels
def test_the_number_of_threads_changes_no_bit() -> None:
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[1])); torch.manual_seed(0)\n"
        "from torch import nn\n"
        "from trmt.nets import attention, fused\n"
        "from trmt.nets.attention import Spans\n"
        "from trmt.nets.base import Ragged\n"
        "lengths = [17, 4, 31, 9, 60, 2] * 8\n"
        "spans = Spans.of(Ragged.of([[1] * n for n in lengths]))\n"
        "merged = torch.randn(sum(lengths), 192, requires_grad=True)\n"
        "norm = nn.LayerNorm(64)\n"
        "x = attention.attend_own(merged, spans, 4, causal=True)\n"
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
    assert native.load.__wrapped__("training") is None


def test_kernels_can_be_switched_off() -> None:
    code = "from trmt.nets import fused; print(fused.library())"
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
    assert native.load.__wrapped__("training") is None
    assert "cannot build trmt's kernels" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.so"))


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
    assert native.load.__wrapped__("training") is not None


def cut_short(library: Path) -> None:
    os.truncate(library, library.stat().st_size // 2)


def flip_a_bit(library: Path) -> None:
    data = bytearray(library.read_bytes())
    data[len(data) // 2] ^= 1
    library.write_bytes(data)


def empty(library: Path) -> None:
    library.write_bytes(b"")


def lose_its_checksum(library: Path) -> None:
    library.with_suffix(".sha256").unlink()


DAMAGES = (cut_short, flip_a_bit, empty, lose_its_checksum)
LOAD = """
import os, sys
from pathlib import Path

from trmt import native

native.SOURCES = Path(sys.argv[1])
for cache in sys.argv[2:]:
    os.environ["XDG_CACHE_HOME"] = cache
    found = native.load.__wrapped__("tiny")
    print(found and found.answer())
"""


@needs_kernels
def test_a_damaged_library_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, which loading half a library can kill."""
    (tmp_path / "tiny.c").write_text("int answer(void) { return 42; }\n", encoding="ascii")
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "whole"))
    assert native.load.__wrapped__("tiny").answer() == 42
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
        assert (built.stat().st_mtime_ns != before[cache]) == bool(damage), "only what is damaged is built"
        assert built.stat().st_size == next((tmp_path / "whole").rglob("*.so")).stat().st_size


@needs_kernels
def test_a_row_of_zeros_has_a_norm() -> None:
    """Epsilon is what it is divided by, and counts wherever rows are small."""
    for norm in (nn.LayerNorm(32), nn.RMSNorm(32, eps=1e-4)):
        x = torch.stack([torch.zeros(32), torch.linspace(-1e-3, 1e-3, 32)]).requires_grad_()
        ours = gradients(lambda norm=norm, x=x: fused.add_norm(x, x, norm, 0.0)[1], x)
        assert_same(ours, gradients(lambda norm=norm, x=x: norm(x + x), x), 1e-4)


def scattered(x: Tensor) -> Tensor:
    """The same numbers, none of which lies beside the next of its row."""
    return x.t().contiguous().t()


def apart(x: Tensor) -> Tensor:
    """The same numbers in rows that do not touch."""
    return torch.cat([x, x], 1)[:, : x.shape[1]]


NORM = nn.LayerNorm(48)
LINEAR = fused.Linear(48, 32)
WEIGHTS = {"product": tuple(LINEAR.parameters()), "norm": tuple(NORM.parameters())}
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "drop": lambda x, _: fused.drop(x, 0.5),
    "product": lambda x, _: LINEAR(x),
    "sum": lambda x, y: fused.add_norm(x, y, NORM, 0.0)[0],
    "norm": lambda x, y: fused.add_norm(x, y, NORM, 0.0)[1],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_may_lie_anyhow_in_memory(name: str) -> None:
    x, y = (torch.randn(70, 48, requires_grad=True) for _ in range(2))
    torch.manual_seed(1)
    out = OPERATIONS[name](x, y)
    grad = torch.randn(out.shape)
    inputs = (x, *WEIGHTS.get(name, ()))
    expected = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    for other in (scattered(grad), apart(grad)):
        torch.testing.assert_close(torch.autograd.grad(out, inputs, other, retain_graph=True), expected)


@pytest.mark.parametrize("laid_out", [scattered, apart])
@pytest.mark.parametrize("name", ["product", "sum", "norm"])
def test_inputs_may_lie_anyhow_in_memory(name: str, laid_out: Callable[[Tensor], Tensor]) -> None:
    x, y = (torch.randn(70, 48) for _ in range(2))
    ours, theirs = [laid_out(part).requires_grad_() for part in (x, y)], [x.requires_grad_(), y]
    found = [OPERATIONS[name](*parts) for parts in (ours, theirs)]
    torch.testing.assert_close(*found)
    pairs = zip(found, (ours, theirs), strict=True)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), some[0]) for out, some in pairs))


@pytest.mark.parametrize("laid_out", [scattered, apart])
def test_what_is_dropped_may_lie_anyhow_in_memory(laid_out: Callable[[Tensor], Tensor]) -> None:
    x = laid_out(torch.arange(1.0, 65 * 64 + 1).view(65, 64))
    out = fused.drop(x, 0.5)
    assert torch.equal(out[out != 0], 2 * x[out != 0])
    assert 0.4 < float((out == 0).float().mean()) < 0.6
