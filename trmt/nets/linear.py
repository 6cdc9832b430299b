"""How a frozen network's matrix products are made.

Translations must not depend on which sentences happen to share a batch, nor on the number of threads. On the
CPU there are two back ends that keep this: `native`, the C kernels, and `pure`, plain PyTorch. In int8 both
give the same bits (trmt/native/products.py), in fp32 they differ in the last ones.

PyTorch's own fp32 products give a row the same bits whatever the other rows are, if two conditions hold
(torch 2.11 to 2.13 on x86, held by tests/test_linear.py): there are at least 16 rows, and the inner
dimension is short enough that the product is never split along it, which depends on rows and threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.native import products
from trmt.native.products import Precision
from trmt.native.shelf import Shelf
from trmt.nets.base import Linear, Product

MIN_ROWS = 16


def choose(precision: Precision = "fp32", *, shelf: Shelf | None = None) -> Linear:
    """Products of this precision, by the best back end there is for each; packed weights go on the shelf."""

    def linear(weight: Tensor, bias: Tensor | None) -> Product:
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        fits = on_cpu and weight.shape[1] <= products.LONGEST
        assert fits or precision == "fp32", "int8 is for fp32 weights on the CPU, of so many inputs at most"
        if on_cpu and products.best():
            return products.Native(weight, bias, precision=precision, shelf=shelf)
        return products.Int8(weight, bias) if precision == "int8" else eager(weight, bias)

    return linear


def backend() -> str:
    """What makes the products on the CPU, in words."""
    found = products.best()
    return f"native, {products.PROCESSORS[found]}" if found else "pure PyTorch"


def eager(weight: Tensor, bias: Tensor | None) -> Product:
    """Plain products: on the CPU row-invariant ones, elsewhere what the device does fastest."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return lambda x: F.linear(x, weight, bias)
    outer, inner = weight.shape
    return _invariant(_in_parts(weight, bias), outer, inner)


def _invariant(product: Product, outer: int, inner: int) -> Product:
    def apply(x: Tensor) -> Tensor:
        rows = x.numel() // inner
        if rows >= MIN_ROWS:
            return product(x.reshape(rows, inner)).view(*x.shape[:-1], outer)
        padded = x.new_zeros(MIN_ROWS, inner)
        padded[:rows] = x.reshape(rows, inner)
        return product(padded)[:rows].view(*x.shape[:-1], outer)

    return apply


def _part(inner: int) -> int:
    # Measured with 1 to 16 threads: lengths up to 512 are not split, but for 384, from 8 threads on.
    return 512 if inner % 512 == 0 else 256


def _in_parts(weight: Tensor, bias: Tensor | None) -> Product:
    """The inner dimension cut into parts that no thread will split, summed in a fixed order."""
    part = _part(weight.shape[1])
    first, *others = (piece.contiguous() for piece in weight.split(part, 1))

    def apply(rows: Tensor) -> Tensor:
        out = F.linear(rows[:, :part], first, bias)
        for index, piece in enumerate(others, 1):
            out.addmm_(rows[:, index * part : (index + 1) * part], piece.t())
        return out

    return apply
