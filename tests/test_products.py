"""The products of every processor against each other, against plain PyTorch and against integers."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fakes import small_network
from trmt.decoding.engine import frozen
from trmt.native import products
from trmt.native.products import PackedProduct
from trmt.nets.base import Precision
from trmt.nets.linear import Int8Product, quantize, quantize_activations

ROWS = (1, 2, 3, 4, 5, 7, 12, 15, 16, 17, 31, 32, 33, 47, 49, 64, 70)
OUTER = (1, 15, 16, 33, 48, 100, 137)
INNER = (1, 3, 63, 64, 65, 130, 512, 1100)

needs_kernels = pytest.mark.skipif(not products.best_processor(), reason="no C compiler here")


def cases(count: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Inputs, weights and biases of many sizes, some of them extreme."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        rows, outer, inner = ROWS[number % 17], OUTER[number % 7], INNER[number % 8]
        weight = torch.randn(outer, inner, generator=generator) * 10.0 ** (number % 5 - 2)
        x = torch.randn(rows, inner, generator=generator)
        x = x * torch.randn(rows, 1, generator=generator).mul(3).exp()
        if number % 6 == 1:  # the largest sums there can be
            x, weight = x.sign() * 3, weight.sign()
        if number % 6 == 2:
            x[0], weight[-1] = 0, 0
        if number % 6 == 3:
            x[-1, 0], x[0, -1] = torch.nan, -torch.inf
        if number % 6 == 4:
            x[0], weight[0] = 2.0**-120, 2.0**-140
        bias = torch.randn(outer, generator=generator) if number % 2 else None
        found.append((x, weight, bias))
    return found


def same(one: Tensor, other: Tensor) -> bool:
    """Whether these are the same bits, NaN of any kind counting as one."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(0.5), other.nan_to_num(0.5))


def by_numpy(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The int8 product by its definition, row by row, with integers of 64 bits."""
    integers, scale = (each.numpy() for each in quantize(weight))
    out = np.empty((len(x), len(weight)), np.float32)
    for row, values in enumerate(x.numpy()):
        most = np.abs(values).max()
        if not np.isfinite(most):
            out[row] = np.nan
            continue
        step = np.float32(127) / most if most >= 2.0**-100 else np.float32(0)
        sums = integers.astype(np.int64) @ np.rint(values * step).astype(np.int64)
        unit = most / np.float32(127) if step else np.float32(0)
        out[row] = sums.astype(np.float32) * unit * scale
        if bias is not None:
            out[row] += bias.numpy()
    return torch.from_numpy(out)


def test_plain_pytorch_follows_the_definition() -> None:
    for x, weight, bias in cases(70):
        product = Int8Product(weight, bias)
        assert same(product(x), by_numpy(x, weight, bias))
        product.sums = product._fp32_sums  # as on machines whose int8 products saturate
        assert same(product(x), by_numpy(x, weight, bias))


@needs_kernels
def test_every_processor_gives_the_same_int8_bits() -> None:
    for x, weight, bias in cases(140):
        expected = Int8Product(weight, bias)(x)
        for processor in products.processors():
            found = PackedProduct(weight, bias, precision="int8", processor=processor)(x)
            assert same(found, expected), (products.PROCESSORS[processor], x.shape, weight.shape)


@needs_kernels
def test_fp32_rows_do_not_depend_on_their_neighbours() -> None:
    for x, weight, bias in cases(40):
        finite = x.nan_to_num(0, 0, 0)
        expected = F.linear(finite.double(), weight.double(), None if bias is None else bias.double())
        reach = float((finite.abs().double() @ weight.abs().double().t()).max()) * 1e-5 + 1e-6
        for processor in products.processors():
            product = PackedProduct(weight, bias, precision="fp32", processor=processor)
            found = product(finite)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=reach)
            assert all(
                torch.equal(product(row[None])[0], whole) for row, whole in zip(finite, found, strict=True)
            )


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_relu_in_the_same_pass(precision: Precision) -> None:
    x, weight, bias = torch.randn(9, 40), torch.randn(37, 40), torch.randn(37)
    x[4] = torch.nan
    product = PackedProduct(weight, bias, precision=precision)
    assert same(PackedProduct(weight, bias, precision=precision, relu=True)(x), F.relu(product(x)))
    assert (product(x) < 0).any()
    assert same(Int8Product(weight, bias, relu=True)(x), F.relu(Int8Product(weight, bias)(x)))


def test_quantising_twice_changes_nothing() -> None:
    for _, weight, _ in cases(40):
        integers, scale = quantize(weight)
        again, scale_again = quantize(integers.float() * scale[:, None])
        assert torch.equal(integers, again) and torch.equal(scale, scale_again)
        assert int(integers.min()) >= -127
        assert float((integers.double() * scale.double()[:, None] - weight.double()).abs().max()) <= float(
            0.501 * max(scale.max(), 2.0**-100)
        )


def test_activations_are_rounded_half_to_even() -> None:
    integers, _ = quantize_activations(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert integers.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_steppers_take_kernels_where_there_are_any(
    native: bool, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native and not products.best_processor():
        pytest.skip("no C compiler here")
    if not native:
        monkeypatch.setattr(products, "processors", lambda: ())
    readout = frozen(small_network("transformer"), precision).readout
    assert isinstance(readout, PackedProduct) == native
    assert isinstance(readout, Int8Product) == (precision == "int8" and not native)
    backend = products.backend()
    assert backend is None if not native else str(backend).startswith("native, ")


def digest() -> str:
    """A checksum of products that are large enough for several threads."""
    made = hashlib.sha256()
    generator = torch.Generator().manual_seed(5)
    for outer, inner, rows in ((2000, 256, 3), (512, 1024, 70), (300, 700, 33), (4000, 64, 1)):
        weight, bias = torch.randn(outer, inner, generator=generator), torch.randn(outer, generator=generator)
        x = torch.randn(rows, inner, generator=generator)
        for precision in ("fp32", "int8"):
            product = PackedProduct(weight, bias, precision=precision)  # type: ignore[arg-type]
            made.update(product(x).numpy().tobytes())
    return made.hexdigest()


@needs_kernels
def test_the_thread_count_changes_no_bit() -> None:
    code = "import sys, torch, tests.test_products as here\n"
    code += "torch.set_num_threads(int(sys.argv[1]))\nprint(here.digest())"
    environment = {**os.environ, "OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "0"}
    found = [
        subprocess.run(
            [sys.executable, "-c", code, threads], check=True, capture_output=True, text=True, env=environment
        ).stdout
        for threads in ("1", "3")
    ]
    assert found[0] == found[1] and found[0].strip()
