"""Matrix products of frozen networks by C kernels, whose weights are packed once.

int8 products give the same bits as those of trmt/nets/linear.py; fp32 products are the kernels' own, and a
row's bits depend on nothing but the row (products.c says what they compute).

Axes: R rows, N outputs, K inputs.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.native import build
from trmt.native.addresses import address, check_returned, pointer
from trmt.native.packed_weights import Layout, Packed, PackedWeightCache
from trmt.nets.base import Precision
from trmt.nets.linear import check_int8_inputs, quantize

PROCESSORS = ("plain C", "AVX2", "AVX-VNNI", "AVX512-VNNI", "AMX")  # as numbered in products.h
PANEL, DEPTH = 16, 64  # outputs and inputs of packed weights are padded to multiples of these


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "panels", "depth", "is_int8", "relu")),
        *((name, ctypes.c_void_p) for name in ("packed", "scale", "shift", "bias")),
    )


@functools.cache
def library() -> Any | None:
    """The kernels for inference, if they can be built."""
    found = build.load("inference")
    if found:
        for name in ("pack_int8", "pack_fp32"):
            getattr(found, f"trmt_{name}").restype = None
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        found.trmt_product.argtypes = (pointer, pointer, size, pointer, ctypes.c_int)
        found.trmt_step.argtypes = (pointer, pointer)
        found.trmt_encode.argtypes = (pointer, pointer, pointer)
        found.trmt_reorder.argtypes = (pointer, pointer, pointer)
        found.trmt_steps.restype = size
        found.trmt_steps.argtypes = (pointer, size, size)
    return found


@functools.cache
def processors() -> tuple[int, ...]:
    """Which of PROCESSORS the kernels can use here, the best last; none where there are no kernels."""
    found = library()
    bits = found.trmt_processors() if found else 0
    return tuple(number for number in range(len(PROCESSORS)) if bits >> number & 1)


def best_processor() -> int | None:
    """The processor to use; None without kernels or vectors of 8 floats: PyTorch is faster then."""
    return max(processors(), default=0) or None


def backend() -> str | None:
    """What makes the products on this CPU."""
    found = best_processor()
    return f"native, {PROCESSORS[found]}" if found else None


class PackedProducts:
    """Makes packed products for inference on the CPU; with the checksum of the weights, these are cached."""

    def __init__(self, precision: Precision = "fp32", *, checksum: str = "") -> None:
        self.precision = precision
        self.cache = PackedWeightCache.of(checksum, precision) if checksum else None

    def __call__(self, weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> PackedProduct:
        return PackedProduct(weight, bias, precision=self.precision, relu=relu, cache=self.cache)

    def save(self) -> None:
        """Keep the packed weights for other processes."""
        if self.cache:
            self.cache.save()


class PackedProduct:
    """A product with packed weights."""

    def __init__(
        self,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        *,
        precision: Precision,
        relu: bool = False,
        processor: int | None = None,
        cache: PackedWeightCache | None = None,
    ) -> None:
        loaded = library()
        assert loaded is not None, "there are kernels"
        self.outputs, self.inputs = weight_NK.shape
        weight_NK = weight_NK.contiguous()
        address(weight_NK, self.outputs, self.inputs)
        self.processor = (best_processor() or 0) if processor is None else processor
        self.function = loaded.trmt_product
        is_int8 = precision == "int8"
        if is_int8:
            check_int8_inputs(self.inputs)
        multiple = DEPTH if is_int8 else 1
        depth = -(-self.inputs // multiple) * multiple
        panels = -(-self.outputs // PANEL)
        pack = functools.partial(
            _pack_int8 if is_int8 else _pack_fp32, loaded, weight_NK, panels * PANEL, depth
        )
        layout = _layout(panels * PANEL, depth, is_int8=is_int8)
        packed, scale, shift = cache.take(weight_NK, pack, layout) if cache else pack()
        if bias_N is not None:
            bias_N = bias_N.float().contiguous()
            address(bias_N, self.outputs)
        bias = None if bias_N is None else _padded(bias_N)
        self.tensors = packed, scale, shift, bias  # what the pointers point to
        sizes = self.outputs, self.inputs, panels, depth, is_int8, relu
        self.matrix = _Matrix(*sizes, *map(pointer, self.tensors))
        self.address = ctypes.addressof(self.matrix)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        at = address(x, *x.shape[:-1], self.inputs)
        y = x.new_empty((*x.shape[:-1], self.outputs))
        rows = x.numel() // self.inputs
        check_returned(self.function(self.address, at, rows, y.data_ptr(), self.processor))
        return y


def _layout(outputs: int, depth: int, *, is_int8: bool) -> Layout:
    """What packed weights, scales and shifts are for a kernel that reads them."""
    if not is_int8:
        return (torch.float32, outputs * depth), None, None
    return (torch.int8, outputs * depth), (torch.float32, outputs), (torch.int32, outputs)


def _padded(tensor: Tensor) -> Tensor:
    return F.pad(tensor, [0, -len(tensor) % PANEL])


def _pack_int8(loaded: Any, weight_NK: Tensor, outputs: int, depth: int) -> Packed:
    values_NK, scale_N = quantize(weight_NK)
    packed = torch.zeros(outputs * depth, dtype=torch.int8)
    shift = torch.zeros(outputs, dtype=torch.int32)
    sizes = (ctypes.c_int64(size) for size in (*weight_NK.shape, depth))
    at = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (packed, shift))
    loaded.trmt_pack_int8(ctypes.c_void_p(values_NK.data_ptr()), *sizes, *at)
    return packed, F.pad(scale_N, [0, outputs - len(scale_N)]), shift


def _pack_fp32(loaded: Any, weight_NK: Tensor, outputs: int, depth: int) -> Packed:
    packed = torch.zeros(outputs * depth)
    sizes = (ctypes.c_int64(size) for size in weight_NK.shape)
    loaded.trmt_pack_fp32(ctypes.c_void_p(weight_NK.data_ptr()), *sizes, ctypes.c_void_p(packed.data_ptr()))
    return packed, None, None
