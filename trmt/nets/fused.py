"""What networks compute beside their matrix products, in one pass where a kernel for it is at hand.

Each function here has two ways to the same result: a kernel (trmt/native/training.c) for training on the
CPU in fp32, and plain PyTorch for everything else: other devices, other precisions, decoding,
torch.compile. Which one ran cannot be told from the result but for rounding, and for which elements
dropout picks.

Axes: N tokens in a row, D width, V width of a product, B blocks of rows.
"""

from __future__ import annotations

import ctypes
import functools
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt import native

BLOCK = 64  # rows whose sums a kernel hands back together; ROWS in the C file


class _Shape(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        ("epsilon", ctypes.c_float),
    )


@functools.cache
def library() -> Any:
    """The native, or None."""
    found = native.load("training")
    if found:
        for name in (
            "dropout",
            "add_norm",
            "add_norm_backward",
            "add_bias",
            "bias_backward",
        ):
            getattr(found, f"trmt_{name}").restype = None
    return found


def kernels_serve(*tensors: Tensor) -> bool:
    """Whether the kernels can take these: whole rows of fp32 on the CPU, and nobody traces."""
    if torch.compiler.is_compiling():
        return False
    if not all(x.device.type == "cpu" and x.dtype == torch.float32 and x.stride(-1) == 1 for x in tensors):
        return False
    return library() is not None


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _dropout_fields(p: float) -> dict[str, Any]:
    """A seed for one call, drawn from torch's generator, and what keeps 1 - p of the elements."""
    if not p:
        return {"seed": 0, "threshold": 0, "scale": 1.0}
    seed = int(torch.randint(0, 1 << 62, ()))
    return {"seed": seed, "threshold": min(round(p * 2**32), 2**32 - 1), "scale": 1 / (1 - p)}


# Dropout


def drop(x: Tensor, p: float) -> Tensor:
    """Each element set to 0 with probability p, the others made larger for it."""
    if not p:
        return x
    if not (x.is_contiguous() and kernels_serve(x)):
        return F.dropout(x, p)
    out: Tensor = _Dropout.apply(x, p)  # type: ignore[no-untyped-call]
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        fields = _dropout_fields(p)
        ctx.fields = fields
        return _dropped(x, fields)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _dropped(grad.contiguous(), ctx.fields), None


def _dropped(x: Tensor, fields: dict[str, Any]) -> Tensor:
    out = torch.empty_like(x)
    width = x.shape[-1]
    library().trmt_dropout(
        _at(x),
        _at(out),
        ctypes.c_int64(x.numel() // max(width, 1)),
        ctypes.c_int64(width),
        ctypes.c_uint64(fields["seed"]),
        ctypes.c_uint32(fields["threshold"]),
        ctypes.c_float(fields["scale"]),
    )
    return out


# Products


class Linear(nn.Linear):
    """A product with a bias, and relu behind it if wanted."""

    def __init__(self, inputs: int, outputs: int, *, relu: bool = False) -> None:
        super().__init__(inputs, outputs)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2 and torch.is_grad_enabled() and kernels_serve(x, self.weight):
            low = torch.is_autocast_enabled("cpu")
            dtype = torch.get_autocast_dtype("cpu") if low else x.dtype
            with torch.autocast("cpu", enabled=False) if low else nullcontext():
                out: Tensor = _Product.apply(x, self.weight, self.bias, self.relu, dtype)  # type: ignore[no-untyped-call]
            return out
        out = F.linear(x, self.weight, self.bias)
        return F.relu(out) if self.relu else out


class _Product(torch.autograd.Function):
    """Whatever precision the product is made in, what goes in and comes out is fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool, dtype: torch.dtype) -> Tensor:
        x, weight = x.to(dtype), weight.to(dtype)
        out = (x @ weight.t()).float()
        sizes = (ctypes.c_int64(size) for size in out.shape)
        library().trmt_add_bias(_at(out), _at(bias), *sizes, ctypes.c_int(relu))
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        grad = grad.contiguous()
        masked = torch.empty_like(grad) if out is not None else grad
        partial = grad.new_empty(-(-grad.shape[0] // BLOCK), grad.shape[1])
        sizes = (ctypes.c_int64(size) for size in grad.shape)
        library().trmt_bias_backward(*map(_at, (grad, out, masked)), *sizes, _at(partial))
        masked = masked.to(x.dtype)
        grad_x = (masked @ weight).float() if ctx.needs_input_grad[0] else None
        return grad_x, outer_product(masked, x).float(), partial.sum(0), None, None


def outer_product(grad_NV: Tensor, x_ND: Tensor) -> Tensor:
    """grad.T @ x, the gradient of a matrix, made the way round that the CPU's library is faster at."""
    if grad_NV.shape[1] > x_ND.shape[1]:
        return (x_ND.t() @ grad_NV).t()
    return grad_NV.t() @ x_ND


# Residual, dropout, norm


def add_norm(x: Tensor, y: Tensor, norm: Any, p: float) -> tuple[Tensor, Tensor]:
    """x + dropout(y), and the norm of that."""
    if torch.is_grad_enabled() and _known(norm, x) and kernels_serve(x, y, norm.weight) and _rows(x, y):
        bias = getattr(norm, "bias", None)
        epsilon = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        added, out = _AddNorm.apply(x, y, norm.weight, bias, p, epsilon)  # type: ignore[no-untyped-call]
        return added, out
    added = x + F.dropout(y, p) if p else x + y
    return added, norm(added)


def _known(norm: Any, x: Tensor) -> bool:
    """Whether the kernel has this norm: of rows, with a weight, and if it is centred with a bias."""
    if not isinstance(norm, nn.LayerNorm | nn.RMSNorm) or norm.normalized_shape != (x.shape[-1],):
        return False
    return norm.weight is not None and (isinstance(norm, nn.RMSNorm) or norm.bias is not None)


def _rows(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.is_contiguous() and y.is_contiguous()


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, p: float, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        width = x.shape[-1]
        rows = x.numel() // width
        shape = _Shape(rows=rows, width=width, epsilon=epsilon, **_dropout_fields(p))
        added, out, statistics = torch.empty_like(x), torch.empty_like(x), x.new_empty(rows, 2)
        library().trmt_add_norm(ctypes.byref(shape), *map(_at, (x, y, weight, bias, added, out, statistics)))
        ctx.shape, ctx.centred = shape, bias is not None
        ctx.save_for_backward(added, weight, statistics)
        ctx.set_materialize_grads(False)
        return added, out

    @staticmethod
    def backward(ctx: Any, grad_added: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        added, weight, statistics = ctx.saved_tensors
        shape: _Shape = ctx.shape
        if grad_out is None:  # nobody looked at the norm
            grad_out = torch.zeros_like(added)
        grad_x = torch.empty_like(added)
        grad_y = torch.empty_like(added) if shape.threshold else grad_x
        partial_B2D = added.new_empty(-(-shape.rows // BLOCK), 2, shape.width)
        # Under names, so that copies live until the kernel is done with them.
        grad_out, grad_added = grad_out.contiguous(), None if grad_added is None else grad_added.contiguous()
        library().trmt_add_norm_backward(
            ctypes.byref(shape),
            *map(_at, (grad_out, grad_added, added, weight, statistics)),
            ctypes.c_int(ctx.centred),
            *map(_at, (grad_x, grad_y, partial_B2D)),
        )
        grad_weight, grad_bias = partial_B2D.sum(0).unbind(0)
        return grad_x, grad_y, grad_weight, grad_bias if ctx.centred else None, None, None
