"""How a frozen network's matrix products are made.

Translations must not depend on which sentences happen to share a batch. On the CPU, fp32 products give
a row the same bits whatever the other rows are, if two conditions hold (torch 2.11 to 2.13, measured by
tests/test_linear.py): there are at least 16 rows, and no thread splits the inner dimension, which
happens when it is long against the outer one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.arch.base import Product

MIN_ROWS = 16


def eager(weight: Tensor, bias: Tensor | None) -> Product:
    """Plain products: on the CPU row-invariant ones, elsewhere what the device does fastest."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return lambda x: F.linear(x, weight, bias)
    outer, inner = weight.shape
    weight = weight.contiguous()
    if torch.get_num_threads() > 1 and inner > 2 * outer:
        return _invariant(_in_parts(weight, bias, part=2 * outer), inner)
    return _invariant(lambda rows: F.linear(rows, weight, bias), inner)


def _invariant(product: Product, inner: int) -> Product:
    def apply(x: Tensor) -> Tensor:
        rows = x.numel() // inner
        if rows >= MIN_ROWS:
            return product(x.reshape(rows, inner)).view(*x.shape[:-1], -1)
        padded = x.new_zeros(MIN_ROWS, inner)
        padded[:rows] = x.reshape(rows, inner)
        return product(padded)[:rows].view(*x.shape[:-1], -1)

    return apply


def _in_parts(weight: Tensor, bias: Tensor | None, *, part: int) -> Product:
    """The inner dimension cut into parts that no thread will split, summed in a fixed order."""
    pieces = [piece.contiguous() for piece in weight.split(part, 1)]

    def apply(rows: Tensor) -> Tensor:
        out = F.linear(rows[:, :part], pieces[0], bias)
        for index, piece in enumerate(pieces[1:], 1):
            out = out.addmm_(rows[:, index * part : (index + 1) * part], piece.t())
        return out

    return apply
