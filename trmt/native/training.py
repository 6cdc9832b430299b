"""What networks compute in training beside their matrix products, by C kernels on the CPU (training.c).

Each function takes the arguments of the plain one in trmt/nets/layers.py and returns None where the kernels
cannot serve. A result differs from PyTorch's by rounding, and in which elements dropout draws.

Activations and their gradients are fp32, or under autocast bf16, from the first linear layer or residual
connection on. Weights, their gradients, statistics of norms and sums of losses are always fp32.

Axes: S sentence, N tokens in a row, M tokens of the other side in a row, H heads, D hidden size, V vocabulary
or columns of a product, C tokens of a chunk, B blocks of rows.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trmt.native import build
from trmt.native.addresses import OUT_OF_MEMORY, OUT_OF_RANGE, is_plain, pointer
from trmt.nets.layers import Spans

BLOCK = 64  # rows whose sums a kernel returns together; ROWS in the C file
LANES = 16  # floats that a kernel takes at a time
KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # of activations, as kernels are named after them


class _Shape(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        ("epsilon", ctypes.c_float),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, ctypes.c_void_p) for name in ("query_starts", "key_starts")),
        *((name, ctypes.c_int64) for name in ("sentences", "heads", "head_dim", "causal")),
        ("scale", ctypes.c_float),
    )


class _Gradients(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("query_stride", "key_stride", "value_stride")),
    )


@functools.cache
def library() -> Any | None:
    """The kernels for training, if they can be built."""
    found = build.load("training")
    if found:
        for name in ("dropout", "add_norm", "add_norm_backward", "add_bias", "bias_backward"):
            for kind in KINDS.values():
                getattr(found, f"trmt_{name}_{kind}").restype = None
    return found


def serves(*activations: Tensor, parameters: Sequence[Tensor] = ()) -> bool:
    """Whether the kernels can take these: rows on the CPU, parameters in fp32."""
    tensors = *activations, *parameters
    if not all(x.device.type == "cpu" and x.dim() and x.stride(-1) == 1 for x in tensors):
        return False
    dtypes = {x.dtype for x in activations}
    if len(dtypes) != 1 or dtypes.pop() not in KINDS or any(x.dtype != torch.float32 for x in parameters):
        return False
    return library() is not None


def _cast(*activations: Tensor) -> Iterator[Tensor]:
    """Activations as autocast wants them for products."""
    low = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if low else activations[0].dtype
    return (x.to(dtype) if low and x.is_floating_point() else x for x in activations)


def _call(kernel: str, dtype: torch.dtype, *arguments: Any) -> int:
    """Call a kernel for activations of a type: tensors as pointers, structures by reference, 64-bit ints."""
    given: list[Any] = []
    for each in arguments:
        if each is None or isinstance(each, Tensor):
            given.append(ctypes.c_void_p(pointer(each)))
        elif isinstance(each, ctypes.Structure):
            given.append(ctypes.byref(each))
        else:
            given.append(ctypes.c_int64(each) if isinstance(each, int) else each)
    code = int(getattr(library(), f"trmt_{kernel}_{KINDS[dtype]}")(*given) or 0)
    if code & OUT_OF_MEMORY:
        raise MemoryError("there is no memory left for a kernel")
    return code


# Dropout


def _dropout_fields(p: float) -> dict[str, Any]:
    """A seed for one call, drawn from torch's generator, and the threshold to keep 1 - p of the elements."""
    if not p:
        return {"seed": 0, "threshold": 0, "scale": 1.0}
    seed = int(torch.randint(0, 1 << 62, ()))
    return {"seed": seed, "threshold": min(round(p * 2**32), 2**32 - 1), "scale": 1 / (1 - p)}


def dropout(x: Tensor, p: float) -> Tensor | None:
    """Each element set to 0 with probability p, the others scaled by 1 / (1 - p)."""
    if not (x.is_contiguous() and serves(x)) or x.shape[-1] % LANES:
        return None
    out: Tensor = _Dropout.apply(x, p)  # type: ignore[no-untyped-call]
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.fields = _dropout_fields(p)
        return _dropped(x, ctx.fields)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _dropped(grad.contiguous(), ctx.fields), None


def _dropped(x: Tensor, fields: dict[str, Any]) -> Tensor:
    out = torch.empty_like(x)
    width = x.shape[-1]
    drawn = (
        ctypes.c_uint64(fields["seed"]),
        ctypes.c_uint32(fields["threshold"]),
        ctypes.c_float(fields["scale"]),
    )
    _call("dropout", x.dtype, x, out, x.numel() // max(width, 1), width, *drawn)
    return out


# Products


def linear(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor | None:
    """x @ weight.T + bias, and relu behind it if wanted."""
    if x.dim() != 2 or not torch.is_grad_enabled():
        return None
    (x,) = _cast(x)
    if not serves(x, parameters=(weight, bias)):
        return None
    if bias.shape != weight.shape[:1] or len(bias) % LANES:
        return None
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _Linear.apply(x, weight, bias, relu)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        weight = weight.to(x.dtype)
        out = x @ weight.t()
        _call("add_bias", x.dtype, out, bias, *out.shape, ctypes.c_int(relu))
        ctx.save_for_backward(x, weight, out if relu else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        grad = grad.contiguous()
        masked = torch.empty_like(grad) if out is not None else grad
        partial = torch.empty(-(-grad.shape[0] // BLOCK), grad.shape[1], dtype=torch.float32)
        _call("bias_backward", x.dtype, grad, out, masked, *grad.shape, partial)
        grad_x = masked @ weight if ctx.needs_input_grad[0] else None
        return grad_x, outer_product(masked, x).float(), partial.sum(0), None


def outer_product(grad_NV: Tensor, x_ND: Tensor) -> Tensor:
    """grad.T @ x, the gradient of a matrix, in the order that the CPU's library is faster at."""
    if grad_NV.shape[1] > x_ND.shape[1]:
        return (x_ND.t() @ grad_NV).t()
    return grad_NV.t() @ x_ND


# Residual connection, dropout, norm


def add_norm(x: Tensor, y: Tensor, norm: nn.Module, p: float) -> tuple[Tensor, Tensor] | None:
    """x + dropout(y), and the norm of that."""
    if not torch.is_grad_enabled() or not isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        return None
    bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
    if norm.weight is None or (isinstance(norm, nn.LayerNorm) and bias is None):
        return None  # without a bias, the kernel takes a norm for RMSNorm
    vectors = [norm.weight] if bias is None else [norm.weight, bias]
    x, y = _cast(x, y)
    if not serves(x, y, parameters=vectors):
        return None
    if not (x.shape == y.shape and x.is_contiguous() and y.is_contiguous()):
        return None
    if any(vector.shape != x.shape[-1:] for vector in vectors) or x.shape[-1] % LANES:
        return None
    epsilon = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps
    added, out = _AddNorm.apply(x, y, norm.weight, bias, p, epsilon)  # type: ignore[no-untyped-call]
    return added, out


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, p: float, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        width = x.shape[-1]
        rows = x.numel() // width
        shape = _Shape(rows=rows, width=width, epsilon=epsilon, **_dropout_fields(p))
        added, out, statistics = (
            torch.empty_like(x),
            torch.empty_like(x),
            torch.empty(rows, 2, dtype=torch.float32),
        )
        _call("add_norm", x.dtype, shape, x, y, weight, bias, added, out, statistics)
        ctx.shape, ctx.centred = shape, bias is not None
        ctx.save_for_backward(added, weight, statistics)
        ctx.set_materialize_grads(False)
        return added, out

    @staticmethod
    def backward(ctx: Any, grad_added: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        added, weight, statistics = ctx.saved_tensors
        shape: _Shape = ctx.shape
        if grad_out is None:  # the norm was not used
            grad_out = torch.zeros_like(added)
        grad_x = torch.empty_like(added)
        grad_y = torch.empty_like(added) if shape.threshold else grad_x
        partial_B2D = torch.empty(-(-shape.rows // BLOCK), 2, shape.width, dtype=torch.float32)
        # Under names, so that copies live until the kernel is done with them.
        grad_out, grad_added = grad_out.contiguous(), None if grad_added is None else grad_added.contiguous()
        inputs = grad_out, grad_added, added, weight, statistics
        gradients = grad_x, grad_y, partial_B2D
        _call("add_norm_backward", added.dtype, shape, *inputs, ctypes.c_int(ctx.centred), *gradients)
        grad_weight, grad_bias = partial_B2D.sum(0).unbind(0)
        return grad_x, grad_y, grad_weight, grad_bias if ctx.centred else None, None, None


# Attention


def self_attention(qkv_N3D: Tensor, spans: Spans, heads: int, causal: bool) -> Tensor | None:
    """Self-attention within each sentence; queries, keys and values stand side by side: [N, D]."""
    if not _serves_attention(qkv_N3D, spans, heads, 3):
        return None
    out: Tensor = _SelfAttention.apply(qkv_N3D, spans, heads, causal)  # type: ignore[no-untyped-call]
    return out


def cross_attention(
    query_ND: Tensor, kv_M2D: Tensor, spans: Spans, source: Spans, heads: int
) -> Tensor | None:
    """Attention of each target sentence to its source; keys and values stand side by side: [N, D]."""
    if not (_serves_attention(query_ND, spans, heads, 1) and _serves_attention(kv_M2D, source, heads, 2)):
        return None
    if query_ND.dtype != kv_M2D.dtype:
        return None
    if len(spans.starts_S) != len(source.starts_S) or kv_M2D.shape[-1] != 2 * query_ND.shape[-1]:
        return None
    out: Tensor = _CrossAttention.apply(query_ND, kv_M2D, spans, source, heads)  # type: ignore[no-untyped-call]
    return out


def _serves_attention(x: Tensor, spans: Spans, heads: int, merged: int) -> bool:
    starts_S = spans.starts_S
    whole = x.dim() == 2 and x.shape[-1] % (merged * heads * LANES) == 0
    return whole and is_plain(starts_S) and starts_S.dtype == torch.long and serves(x)


def _forward(attention: _Attention, query_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and for each token and head the logarithm of the normaliser of its softmax."""
    out_ND = query_ND.new_empty(len(query_ND), attention.heads * attention.head_dim)
    log_sums_NH = torch.empty(len(query_ND), attention.heads, dtype=torch.float32)
    _call("attention", query_ND.dtype, attention, out_ND, log_sums_NH)
    return out_ND, log_sums_NH


def _backward(attention: _Attention, grad_ND: Tensor, log_sums_NH: Tensor, *gradients: Tensor) -> None:
    """Writes the gradients of queries, keys and values."""
    targets = _Gradients(*(x.data_ptr() for x in gradients), *(x.stride(0) for x in gradients))
    _call("attention_backward", grad_ND.dtype, attention, grad_ND.contiguous(), log_sums_NH, targets)


def _described(qkv: tuple[Tensor, ...], spans: Spans, keys: Spans, heads: int, *, causal: bool) -> _Attention:
    head_dim = qkv[0].shape[-1] // heads
    return _Attention(
        *(x.data_ptr() for x in qkv),
        *(x.stride(0) for x in qkv),
        spans.starts_S.data_ptr(),
        keys.starts_S.data_ptr(),
        len(spans.starts_S) - 1,
        heads,
        head_dim,
        causal,
        head_dim**-0.5,
    )


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_N3D: Tensor, spans: Spans, heads: int, causal: bool) -> Tensor:
        attention = _described(qkv_N3D.chunk(3, -1), spans, spans, heads, causal=causal)
        out_ND, log_sums_NH = _forward(attention, qkv_N3D)
        ctx.save_for_backward(qkv_N3D, log_sums_NH)
        ctx.spans, ctx.heads, ctx.causal = spans, heads, causal
        return out_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        qkv_N3D, log_sums_NH = ctx.saved_tensors
        attention = _described(qkv_N3D.chunk(3, -1), ctx.spans, ctx.spans, ctx.heads, causal=ctx.causal)
        grads_N3D = torch.empty_like(qkv_N3D)
        _backward(attention, grad_ND, log_sums_NH, *grads_N3D.chunk(3, -1))
        return grads_N3D, None, None, None


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_ND: Tensor, kv_M2D: Tensor, spans: Spans, source: Spans, heads: int
    ) -> Tensor:
        attention = _described((query_ND, *kv_M2D.chunk(2, -1)), spans, source, heads, causal=False)
        out_ND, log_sums_NH = _forward(attention, query_ND)
        ctx.save_for_backward(query_ND, kv_M2D, log_sums_NH)
        ctx.spans, ctx.source, ctx.heads = spans, source, heads
        return out_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        query_ND, kv_M2D, log_sums_NH = ctx.saved_tensors
        qkv = query_ND, *kv_M2D.chunk(2, -1)
        attention = _described(qkv, ctx.spans, ctx.source, ctx.heads, causal=False)
        grad_query_ND, grad_kv_M2D = query_ND.new_empty(query_ND.shape), torch.empty_like(kv_M2D)
        _backward(attention, grad_ND, log_sums_NH, grad_query_ND, *grad_kv_M2D.chunk(2, -1))
        return grad_query_ND, grad_kv_M2D, None, None, None


# Cross-entropy


def cross_entropy(logits_CV: Tensor, target_C: Tensor, smoothing: float) -> Tensor | None:
    """(negative log likelihood, its mean over the vocabulary), summed; the logits become the gradient."""
    if not serves(logits_CV) or not logits_CV.is_contiguous() or target_C.dtype != torch.long:
        return None
    if target_C.shape != logits_CV.shape[:1] or logits_CV.dim() != 2:
        return None
    target_C = target_C.contiguous()
    losses_C2 = torch.empty(logits_CV.shape[0], 2, dtype=torch.float32)
    arguments = target_C, losses_C2, *logits_CV.shape, ctypes.c_float(smoothing)
    if _call("cross_entropy", logits_CV.dtype, logits_CV, *arguments) & OUT_OF_RANGE:
        raise IndexError(
            f"a target is not among the {logits_CV.shape[1]} ids that the network has logits for"
        )
    return losses_C2.sum(0)
