"""What networks compute beside their matrix products, in one pass where a kernel for it is at hand.

Each function here has two ways to the same result: a kernel (trmt/kernels/training.c) for training on the
CPU in fp32, and plain PyTorch for everything else: other devices, other precisions, decoding,
torch.compile. Which one ran cannot be told from the result but for rounding, and for which elements
dropout picks.

Axes: N tokens in a row, M tokens of the other side in a row, S sentence, L source position, T target
position, H heads, P width of one head, D width, V width of a product, B blocks of rows.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt import kernels
from trmt.arch import layers
from trmt.arch.base import Ragged, cells

varlen_attn: Any = None
with suppress(ImportError):  # before PyTorch 2.10
    from torch.nn.attention.varlen import varlen_attn
# PyTorch 2.10 has a flag for what each token may see, later ones a window.
_FLAG = varlen_attn is not None and "is_causal" in inspect.signature(varlen_attn).parameters
_CAUSAL: dict[bool, Any] = {
    causal: {"is_causal": causal} if _FLAG else {"window_size": (-1, 0 if causal else -1)}
    for causal in (True, False)
}

BLOCK = 64  # rows whose sums a kernel hands back together; ROWS in the C file
LANES = 16  # floats that a kernel takes at a time
TOGETHER = 32  # sentences of like length that are padded together


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
        *((name, ctypes.c_int64) for name in ("sentences", "heads", "part", "causal")),
        ("scale", ctypes.c_float),
    )


class _Gradients(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("query_stride", "key_stride", "value_stride")),
    )


@functools.cache
def library() -> Any:
    """The kernels, or None."""
    found = kernels.load("training")
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
        grad_added = None if grad_added is None else grad_added.contiguous()
        library().trmt_add_norm_backward(
            ctypes.byref(shape),
            *map(_at, (grad_out.contiguous(), grad_added, added, weight, statistics)),
            ctypes.c_int(ctx.centred),
            *map(_at, (grad_x, grad_y, partial_B2D)),
        )
        grad_weight, grad_bias = partial_B2D.sum(0).unbind(0)
        return grad_x, grad_y, grad_weight, grad_bias if ctx.centred else None, None, None


# Attention over sentences in a row


@dataclass(frozen=True)
class Spans:
    """Where sentences begin and end that stand in a row."""

    starts_S: Tensor  # S + 1 of them: the last is where the last sentence ends
    narrow_S: Tensor  # the same as the GPU's kernels want them
    longest: int

    @classmethod
    def of(cls, sentences: Ragged) -> Spans:
        """The spans of these sentences."""
        starts_S = sentences.packed()[1]
        return cls(starts_S, starts_S.int(), sentences.longest)


def attend_own(merged_N3D: Tensor, spans: Spans, heads: int, *, causal: bool, dropout: float = 0.0) -> Tensor:
    """Attention of each sentence to itself; queries, keys and values stand side by side: [N, D]."""
    if _fits(merged_N3D, spans, heads, 3, dropout):
        out: Tensor = _OwnAttention.apply(merged_N3D, spans, heads, causal)  # type: ignore[no-untyped-call]
        return out
    query_NHP, key_NHP, value_NHP = merged_N3D.unflatten(-1, (3, heads, -1)).unbind(1)
    return attend(query_NHP, key_NHP, value_NHP, spans, spans, causal=causal, dropout=dropout)


def attend_over(
    query_ND: Tensor, memory_M2D: Tensor, spans: Spans, over: Spans, heads: int, *, dropout: float = 0.0
) -> Tensor:
    """Attention of each sentence to its source, whose keys and values stand side by side: [N, D]."""
    if _fits(query_ND, spans, heads, 1, dropout) and _fits(memory_M2D, over, heads, 2, dropout):
        out: Tensor = _CrossAttention.apply(query_ND, memory_M2D, spans, over, heads)  # type: ignore[no-untyped-call]
        return out
    key_MHP, value_MHP = memory_M2D.unflatten(-1, (2, heads, -1)).unbind(1)
    query_NHP = query_ND.unflatten(-1, (heads, -1))
    return attend(query_NHP, key_MHP, value_MHP, spans, over, causal=False, dropout=dropout)


def attend(
    query_NHP: Tensor,
    key_MHP: Tensor,
    value_MHP: Tensor,
    spans: Spans,
    over: Spans,
    *,
    causal: bool,
    dropout: float = 0.0,
) -> Tensor:
    """The same in PyTorch: without padding where the GPU has a kernel for it, padded elsewhere: [N, D]."""
    if not dropout and has_varlen(query_NHP):
        found_NHP: Any = varlen_attn(
            query_NHP,
            key_MHP,
            value_MHP,
            spans.narrow_S,
            over.narrow_S,
            spans.longest,
            over.longest,
            **_CAUSAL[causal],
        )
        joined_ND: Tensor = found_NHP.flatten(1)
        return joined_ND
    return attend_padded(query_NHP, key_MHP, value_MHP, spans, over, causal=causal, dropout=dropout)


def has_varlen(x: Tensor) -> bool:
    """Whether there is attention without padding for such tensors; it knows no dropout and no bias."""
    return varlen_attn is not None and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _fits(x: Tensor, spans: Spans, heads: int, parts: int, dropout: float) -> bool:
    part = x.shape[-1] // parts // heads
    return not dropout and part % LANES == 0 and not spans.starts_S.is_cuda and kernels_serve(x)


def attend_padded(
    query_NHP: Tensor,
    key_MHP: Tensor,
    value_MHP: Tensor,
    spans: Spans,
    over: Spans,
    *,
    causal: bool,
    dropout: float = 0.0,
) -> Tensor:
    """The sentences set out in a grid, attended to, and put in a row again.

    On the CPU, sentences of like length share a grid; a GPU would have to be asked for the lengths first.
    """
    lengths_2S = torch.stack([spans.starts_S.diff(), over.starts_S.diff()])
    if lengths_2S.shape[1] <= TOGETHER or lengths_2S.device.type != "cpu" or torch.compiler.is_compiling():
        return _attend_in_grid(query_NHP, key_MHP, value_MHP, spans, over, causal=causal, dropout=dropout)
    rows, found = [], []
    for group in lengths_2S.amax(0).argsort().split(TOGETHER):
        (rows_N, some), (rows_M, others) = _picked(spans, group), _picked(over, group)
        parts = query_NHP[rows_N], key_MHP[rows_M], value_MHP[rows_M]
        found.append(_attend_in_grid(*parts, some, others, causal=causal, dropout=dropout))
        rows.append(rows_N)
    return torch.cat(found)[torch.cat(rows).argsort()]


def _picked(spans: Spans, sentences: Tensor) -> tuple[Tensor, Spans]:
    """The rows of these sentences, and where they begin and end once they stand in a row by themselves."""
    lengths_S = spans.starts_S.diff()[sentences]
    starts_S = F.pad(lengths_S.cumsum(0), (1, 0))
    shift_N = torch.repeat_interleave(spans.starts_S[sentences] - starts_S[:-1], lengths_S)
    rows_N = torch.arange(len(shift_N)) + shift_N
    return rows_N, Spans(starts_S, starts_S.int(), int(lengths_S.max()))


def _attend_in_grid(
    query_NHP: Tensor,
    key_MHP: Tensor,
    value_MHP: Tensor,
    spans: Spans,
    over: Spans,
    *,
    causal: bool,
    dropout: float,
) -> Tensor:
    query_SHTP, cells_N, _ = _set_out(query_NHP, spans)
    (key_SHLP, _, real_SL), (value_SHLP, _, _) = _set_out(key_MHP, over), _set_out(value_MHP, over)
    # A sentence without a key would be a row of nothing but minus infinities.
    mask = None if causal else (real_SL | ~real_SL.any(1, keepdim=True))[:, None, None]
    out_SHTP = F.scaled_dot_product_attention(
        query_SHTP, key_SHLP, value_SHLP, attn_mask=mask, is_causal=causal, dropout_p=dropout
    )
    return out_SHTP.transpose(1, 2).flatten(2).flatten(0, 1)[cells_N]


def attention_weights(query_ND: Tensor, key_MD: Tensor, spans: Spans, over: Spans, heads: int) -> Tensor:
    """The weights of `attend_over`, for those who want to look: [S, H, T, L], zero where nothing is."""
    query_SHTP, _, _ = _set_out(query_ND.unflatten(-1, (heads, -1)), spans)
    key_SHLP, _, real_SL = _set_out(key_MD.unflatten(-1, (heads, -1)), over)
    return layers.attention_weights(query_SHTP, key_SHLP, layers.blocked(real_SL)[:, None, None])


def _set_out(x_NHP: Tensor, spans: Spans) -> tuple[Tensor, Tensor, Tensor]:
    """A row in a grid [S, H, T, P]; where in it each token lies, and which of its cells are real."""
    width = max(spans.longest, 1)
    lengths_S = spans.starts_S.diff()
    cells_N = cells(lengths_S, width, count=x_NHP.shape[0])
    real_ST = torch.arange(width, device=lengths_S.device) < lengths_S[:, None]
    grid = x_NHP.new_zeros(real_ST.numel(), *x_NHP.shape[1:]).index_copy(0, cells_N, x_NHP)
    return grid.unflatten(0, real_ST.shape).transpose(1, 2), cells_N, real_ST


def _call(kernel: str, *arguments: Any) -> None:
    if getattr(library(), kernel)(*arguments):
        raise MemoryError("out of memory in attention")


def _described(
    inputs: tuple[Tensor, ...], spans: Spans, over: Spans, heads: int, *, causal: bool
) -> _Attention:
    part = inputs[0].shape[-1] // heads
    return _Attention(
        *(x.data_ptr() for x in inputs),
        *(x.stride(0) for x in inputs),
        spans.starts_S.data_ptr(),
        over.starts_S.data_ptr(),
        len(spans.starts_S) - 1,
        heads,
        part,
        causal,
        part**-0.5,
    )


def _placed(*gradients: Tensor) -> _Gradients:
    return _Gradients(*(x.data_ptr() for x in gradients), *(x.stride(0) for x in gradients))


class _OwnAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, merged_N3D: Tensor, spans: Spans, heads: int, causal: bool) -> Tensor:
        attention = _described(merged_N3D.chunk(3, -1), spans, spans, heads, causal=causal)
        out_ND = merged_N3D.new_empty(merged_N3D.shape[0], merged_N3D.shape[1] // 3)
        norms_NH = merged_N3D.new_empty(merged_N3D.shape[0], heads)
        _call("trmt_attention", ctypes.byref(attention), _at(out_ND), _at(norms_NH))
        ctx.save_for_backward(merged_N3D, norms_NH)
        ctx.spans, ctx.heads, ctx.causal = spans, heads, causal
        return out_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        merged_N3D, norms_NH = ctx.saved_tensors
        attention = _described(merged_N3D.chunk(3, -1), ctx.spans, ctx.spans, ctx.heads, causal=ctx.causal)
        grads_N3D = torch.empty_like(merged_N3D)
        places = _placed(*grads_N3D.chunk(3, -1))
        grad_ND = grad_ND.contiguous()
        _call(
            "trmt_attention_backward",
            ctypes.byref(attention),
            _at(grad_ND),
            _at(norms_NH),
            ctypes.byref(places),
        )
        return grads_N3D, None, None, None


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_ND: Tensor, memory_M2D: Tensor, spans: Spans, over: Spans, heads: int
    ) -> Tensor:
        attention = _described((query_ND, *memory_M2D.chunk(2, -1)), spans, over, heads, causal=False)
        out_ND = query_ND.new_empty(query_ND.shape)
        norms_NH = query_ND.new_empty(query_ND.shape[0], heads)
        _call("trmt_attention", ctypes.byref(attention), _at(out_ND), _at(norms_NH))
        ctx.save_for_backward(query_ND, memory_M2D, norms_NH)
        ctx.spans, ctx.over, ctx.heads = spans, over, heads
        return out_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        query_ND, memory_M2D, norms_NH = ctx.saved_tensors
        attention = _described(
            (query_ND, *memory_M2D.chunk(2, -1)), ctx.spans, ctx.over, ctx.heads, causal=False
        )
        grad_query_ND = query_ND.new_empty(query_ND.shape)
        grad_memory_M2D = memory_M2D.new_empty(memory_M2D.shape)
        places = _placed(grad_query_ND, *grad_memory_M2D.chunk(2, -1))
        grad_ND = grad_ND.contiguous()
        _call(
            "trmt_attention_backward",
            ctypes.byref(attention),
            _at(grad_ND),
            _at(norms_NH),
            ctypes.byref(places),
        )
        return grad_query_ND, grad_memory_M2D, None, None, None
