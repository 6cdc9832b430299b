"""The matrix products of frozen networks in plain PyTorch: fp32 and int8.

Axes: R rows, N outputs, K inputs.

A translation must not depend on the sentences that share its batch, nor on the number of threads. On an x86
CPU, torch 2.11 to 2.13 gives a row of an fp32 product the same bits whatever the other rows are under two
conditions (tests/test_linear.py): there are at least 16 rows, and the inner dimension is short enough that
the product is never split along it, which depends on rows and threads. `row_invariant` keeps both. int8 sums
are exact in any order. `trmt.native` has faster products; its int8 ones give the same bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.errors import ConfigError
from trmt.nets.base import Precision, Product

MIN_ROWS = 16
MAX_INT8 = 127.0  # -128 is never used
TINY = 2.0**-100  # rows that stay below it count as zero: 127 divided by less could be infinite
LONGEST_INT8 = 1 << 16  # inputs of an int8 product, for sums that fit in 32 bits
EXACT_FP32 = 1024  # so many products of int8 values add up to less than 2**24, exact in fp32


@dataclass(frozen=True)
class PlainProducts:
    """Products in plain PyTorch: on the CPU row-invariant ones, elsewhere what the device does fastest."""

    precision: Precision = "fp32"

    def __call__(self, weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> Product:
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        if self.precision == "int8":
            assert on_cpu, "int8 is for fp32 weights on the CPU"
            check_int8_inputs(weight.shape[1])
            return Int8Product(weight, bias, relu=relu)
        product = row_invariant(weight, bias) if on_cpu else lambda x: F.linear(x, weight, bias)
        return (lambda x: F.relu(product(x))) if relu else product


def check_int8_inputs(inputs: int) -> None:
    """Refuse an int8 product whose sums could be too large for 32 bits."""
    if inputs > LONGEST_INT8:
        raise ConfigError(
            f"a matrix has {inputs:,} columns, in int8 it may have {LONGEST_INT8:,}; use --precision fp32"
        )


def row_invariant(weight_NK: Tensor, bias: Tensor | None) -> Product:
    """The fp32 product on the CPU, whose rows have the same bits whatever the others are."""
    outputs, inputs = weight_NK.shape
    product = _in_blocks(weight_NK, bias)

    def apply(x: Tensor) -> Tensor:
        rows = x.numel() // inputs
        if rows >= MIN_ROWS:
            return product(x.reshape(rows, inputs)).view(*x.shape[:-1], outputs)
        padded = x.new_zeros(MIN_ROWS, inputs)
        padded[:rows] = x.reshape(rows, inputs)
        return product(padded)[:rows].view(*x.shape[:-1], outputs)

    return apply


def _block(inputs: int) -> int:
    # Measured with 1 to 16 threads: lengths up to 512 are not split, but for 384, from 8 threads on.
    return 512 if inputs % 512 == 0 else 256


def _in_blocks(weight_NK: Tensor, bias: Tensor | None) -> Product:
    """The inner dimension in blocks that no thread splits, summed in a fixed order."""
    block = _block(weight_NK.shape[1])
    first, *others = (piece.contiguous() for piece in weight_NK.split(block, 1))

    def apply(x_RK: Tensor) -> Tensor:
        out = F.linear(x_RK[:, :block], first, bias)
        for index, piece in enumerate(others, 1):
            out.addmm_(x_RK[:, index * block : (index + 1) * block], piece.t())
        return out

    return apply


# int8


def quantize(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as int8 values from -127 to 127, and its scale.

    Scales have 16 significant bits, so that value times scale is exact in fp32, and quantising what was
    quantised changes nothing. Rows that are not finite become zeros with a scale of NaN.
    """
    largest_N = weight_NK.abs().amax(1)
    bits_N = torch.div(largest_N, torch.full_like(largest_N, MAX_INT8)).view(torch.int32)
    scale_N = ((bits_N + 0xFF) & ~0xFF).view(torch.float32)
    values_NK = torch.round(weight_NK / scale_N[:, None]).clamp(-MAX_INT8, MAX_INT8)
    usable_N = (largest_N >= TINY) & largest_N.isfinite()
    values_NK = torch.where(usable_N[:, None], values_NK, 0.0)
    scale_N = torch.where(usable_N, scale_N, torch.where(largest_N.isfinite(), 0.0, torch.nan))
    return values_NK.to(torch.int8), scale_N


def quantize_activations(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as int8 values (held in fp32), and the scale of each row."""
    largest_R = x_RK.abs().amax(1)
    limit_R = torch.full_like(largest_R, MAX_INT8)
    usable_R = (largest_R >= TINY) & largest_R.isfinite()
    # Not `127 / m`, which torch computes as 127 * (1 / m).
    step_R = torch.where(usable_R, torch.div(limit_R, largest_R), 0.0)
    scale_R = torch.where(
        usable_R, torch.div(largest_R, limit_R), torch.where(largest_R.isfinite(), 0.0, torch.nan)
    )
    values_RK = torch.where(usable_R[:, None], torch.round(x_RK * step_R[:, None]), 0.0)
    return values_RK, scale_R


class Int8Product:
    """int8 weights and activations, exact integer sums, one scale for each row and for each output."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, *, relu: bool = False) -> None:
        self.values_NK, self.scale_N = quantize(weight_NK)
        self.bias_N, self.relu = bias_N, relu
        self.outputs, self.inputs = weight_NK.shape
        # Both give the exact sums; the first is faster, where it is right.
        exact = _int_mm_is_exact() and self.inputs > 1  # with one input, torch 2.13 returns garbage
        self.sums = self._int_mm if exact else self._fp32_sums

    def __call__(self, x: Tensor) -> Tensor:
        values_RK, scale_R = quantize_activations(x.reshape(-1, self.inputs))
        y_RN = self.sums(values_RK).float().mul_(scale_R[:, None]).mul_(self.scale_N)
        if self.bias_N is not None:
            y_RN.add_(self.bias_N)
        return (y_RN.relu_() if self.relu else y_RN).view(*x.shape[:-1], self.outputs)

    def _int_mm(self, values_RK: Tensor) -> Tensor:
        return torch._int_mm(values_RK.to(torch.int8), self.values_NK.t())

    def _fp32_sums(self, values_RK: Tensor) -> Tensor:
        """Integers are exact in fp32 as long as sums stay below 2**24."""
        blocks = zip(values_RK.split(EXACT_FP32, 1), self.values_NK.split(EXACT_FP32, 1), strict=True)
        return torch.stack([F.linear(x, weight.float()).int() for x, weight in blocks]).sum(0)


@functools.cache
def _int_mm_is_exact() -> bool:
    """Whether torch's product of int8 matrices never saturates here, tried where it would."""
    high = torch.full((17, 256), 127, dtype=torch.int8)
    high[:, 1::4] = -127
    return torch.equal(torch._int_mm(high, high.t()).long(), high.long() @ high.long().t())
