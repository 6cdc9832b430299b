"""Matrix products for translating, and the one int8 arithmetic that all of them share.

`Native` calls the C kernels (products.c says what they compute), `Int8` does the same in plain PyTorch to
the last bit. fp32 products are the kernels' own: a row's bits depend on nothing but the row.

Axes: R rows, N outputs, K inputs.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt import native
from trmt.native.shelf import Parts, Shelf

Precision = Literal["fp32", "int8"]
PROCESSORS = ("plain C", "AVX2", "AVX-VNNI", "AVX512-VNNI", "AMX")  # as numbered in products.h
MOST = 127.0  # of the whole numbers; -128 is never used
TINY = 2.0**-100  # rows that stay below it count as zero: 127 divided by less could be infinite
PANEL, DEPTH = 16, 64  # what outputs and inputs of packed weights are padded to multiples of
LONGEST = 1 << 16  # inputs of an int8 product, for sums that fit in 32 bits
EXACT = 1024  # so many products of whole numbers up to 127 add up to less than 2**24, exact in fp32


class Product(Protocol):
    """x -> x @ weight.T + bias, then relu in the variant that `with_relu` gives."""

    def __call__(self, x: Tensor, /) -> Tensor: ...
    def with_relu(self) -> Product: ...
    def only(self, outputs: Tensor, /) -> Product: ...  # the same bits, of these outputs alone


def quantised(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in whole numbers from -127 to 127, and its scale.

    Scales have 16 significant bits, so that whole numbers times scale are exact in fp32, and quantising what
    was quantised changes nothing. Rows that are not finite become zeros with a scale of NaN.
    """
    most_N = weight_NK.abs().amax(1)
    bits_N = torch.div(most_N, torch.full_like(most_N, MOST)).view(torch.int32)
    scale_N = ((bits_N + 0xFF) & ~0xFF).view(torch.float32)
    whole_NK = torch.round(weight_NK / scale_N[:, None]).clamp(-MOST, MOST)
    real_N = (most_N >= TINY) & most_N.isfinite()
    whole_NK = torch.where(real_N[:, None], whole_NK, 0.0)
    scale_N = torch.where(real_N, scale_N, torch.where(most_N.isfinite(), 0.0, torch.nan))
    return whole_NK.to(torch.int8), scale_N


def quantised_rows(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as the kernels quantise them: whole numbers (as fp32), and the scale of each row."""
    most_R = x_RK.abs().amax(1)
    limit_R = torch.full_like(most_R, MOST)
    real_R = (most_R >= TINY) & most_R.isfinite()
    # Not `127 / m`, which torch computes as 127 * (1 / m).
    step_R = torch.where(real_R, torch.div(limit_R, most_R), 0.0)
    scale_R = torch.where(real_R, torch.div(most_R, limit_R), torch.where(most_R.isfinite(), 0.0, torch.nan))
    whole_RK = torch.where(real_R[:, None], torch.round(x_RK * step_R[:, None]), 0.0)
    return whole_RK, scale_R


class Int8:
    """The int8 product in plain PyTorch."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, *, relu: bool = False) -> None:
        self.whole_NK, self.scale_N = quantised(weight_NK)
        self.bias_N, self.relu = bias_N, relu
        self.outer, self.inner = weight_NK.shape
        # Both give the exact sums; the first is faster, where it is right.
        exact = _int_mm_is_exact() and self.inner > 1  # with one input, torch 2.13 returns garbage
        self.sums = self._by_int_mm if exact else self._by_fp32

    def with_relu(self) -> Int8:
        other = object.__new__(Int8)
        other.__dict__.update(self.__dict__)
        other.relu = True
        return other

    def only(self, outputs: Tensor) -> Int8:
        other = object.__new__(Int8)
        other.__dict__.update(self.__dict__)
        other.whole_NK, other.scale_N = self.whole_NK[outputs], self.scale_N[outputs]
        other.bias_N = None if self.bias_N is None else self.bias_N[outputs]
        other.outer = len(outputs)
        other.sums = other._by_int_mm if self.sums == self._by_int_mm else other._by_fp32
        return other

    def __call__(self, x: Tensor) -> Tensor:
        x_RK = x.reshape(-1, self.inner)
        whole_RK, scale_R = quantised_rows(x_RK)
        y_RN = self.sums(whole_RK).float().mul_(scale_R[:, None]).mul_(self.scale_N)
        if self.bias_N is not None:
            y_RN.add_(self.bias_N)
        return (y_RN.relu_() if self.relu else y_RN).view(*x.shape[:-1], self.outer)

    def _by_int_mm(self, whole_RK: Tensor) -> Tensor:
        return torch._int_mm(whole_RK.to(torch.int8), self.whole_NK.t())

    def _by_fp32(self, whole_RK: Tensor) -> Tensor:
        """Whole numbers are exact in fp32 as long as sums stay below 2**24."""
        parts = zip(whole_RK.split(EXACT, 1), self.whole_NK.split(EXACT, 1), strict=True)
        return torch.stack([F.linear(x, weight.float()).int() for x, weight in parts]).sum(0)


@functools.cache
def _int_mm_is_exact() -> bool:
    """Whether torch's product of int8 matrices never saturates here, tried where it would."""
    high = torch.full((17, 256), 127, dtype=torch.int8)
    high[:, 1::4] = -127
    return torch.equal(torch._int_mm(high, high.t()).long(), high.long() @ high.long().t())


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("outer", "inner", "panels", "depth", "is_int8", "relu")),
        *((name, ctypes.c_void_p) for name in ("packed", "scale", "shift", "bias")),
    )


@functools.cache
def library() -> Any:
    """The kernels for translating, or None."""
    found = native.load("translating")
    if found:
        for name in ("product", "pack_int8", "pack_fp32", "step", "read", "reorder"):
            getattr(found, f"trmt_{name}").restype = None
        found.trmt_product.argtypes = (
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int,
        )
        found.trmt_step.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        found.trmt_read.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        sizes = (ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
        found.trmt_reorder.argtypes = (ctypes.c_void_p, *sizes, ctypes.c_void_p)
        found.trmt_chain.restype = ctypes.c_int64
        found.trmt_chain.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    return found


@functools.cache
def processors() -> tuple[int, ...]:
    """Which of PROCESSORS the kernels can use here, the best last; none where there are no native."""
    found = library()
    bits = found.trmt_processors() if found else 0
    return tuple(number for number in range(len(PROCESSORS)) if bits >> number & 1)


def best() -> int | None:
    """The processor to use; None where PyTorch does better, for want of kernels or of vectors of 8 floats."""
    return max(processors(), default=0) or None


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Native:
    """A product by the kernels; its weights are packed for them once."""

    def __init__(
        self,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        *,
        precision: Precision,
        processor: int | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self.outer, self.inner = weight_NK.shape
        self.processor = (best() or 0) if processor is None else processor
        self.function = library().trmt_product
        is_int8 = precision == "int8"
        step = DEPTH if is_int8 else 1
        depth = -(-self.inner // step) * step
        room = -(-self.outer // PANEL) * PANEL
        pack = functools.partial(_int8_panels if is_int8 else _fp32_panels, weight_NK, room, depth)
        packed, scale, shift = shelf.take(weight_NK, pack) if shelf else pack()
        self._hold((packed, scale, shift, None if bias_N is None else _padded(bias_N.float())), depth)

    def _hold(self, parts: tuple[Tensor | None, ...], depth: int, *, relu: bool = False) -> None:
        self.kept = parts
        panels, is_int8 = -(-self.outer // PANEL), parts[1] is not None
        self.matrix = _Matrix(
            self.outer, self.inner, panels, depth, is_int8, relu, *(_at(tensor) for tensor in parts)
        )
        self.address = ctypes.addressof(self.matrix)

    def _with(self, outer: int, parts: tuple[Tensor | None, ...], *, relu: bool) -> Native:
        other = object.__new__(Native)
        other.__dict__.update(self.__dict__)
        other.outer = outer
        other._hold(parts, self.matrix.depth, relu=relu)
        return other

    def with_relu(self) -> Native:
        return self._with(self.outer, self.kept, relu=True)

    def only(self, outputs: Tensor) -> Native:
        packed, *others = self.kept
        assert packed is not None
        together = 4 if self.matrix.is_int8 else 1  # inputs of one output that lie together
        rows = packed.view(self.matrix.panels, -1, PANEL, together)[outputs // PANEL, :, outputs % PANEL]
        missing = -len(outputs) % PANEL
        rows = F.pad(rows, [0, 0, 0, 0, 0, missing]).unflatten(0, (-1, PANEL)).transpose(1, 2)
        chosen = [None if part is None else _padded(part[outputs]) for part in others]
        return self._with(len(outputs), (rows.contiguous(), *chosen), relu=bool(self.matrix.relu))

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.outer))
        self.function(self.address, x.data_ptr(), x.numel() // self.inner, y.data_ptr(), self.processor)
        return y


def _padded(part: Tensor) -> Tensor:
    return F.pad(part, [0, -len(part) % PANEL])


def _int8_panels(weight_NK: Tensor, room: int, depth: int) -> Parts:
    whole_NK, scale_N = quantised(weight_NK)
    packed = torch.zeros(room * depth, dtype=torch.int8)
    shift = torch.zeros(room, dtype=torch.int32)
    outer, inner = (ctypes.c_int64(size) for size in weight_NK.shape)
    library().trmt_pack_int8(_at(whole_NK), outer, inner, ctypes.c_int64(depth), _at(packed), _at(shift))
    return packed, F.pad(scale_N, [0, room - len(scale_N)]), shift


def _fp32_panels(weight_NK: Tensor, room: int, depth: int) -> Parts:
    packed = torch.zeros(room * depth)
    outer, inner = (ctypes.c_int64(size) for size in weight_NK.shape)
    library().trmt_pack_fp32(_at(weight_NK.contiguous()), outer, inner, _at(packed))
    return packed, None, None
