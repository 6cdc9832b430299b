"""Attention over sentences that stand in a row: the keys a token sees are those of its own sentence.

Three ways to the same result: a kernel (trmt/native/training.c) on the CPU in fp32, PyTorch's attention
without padding on a GPU, and everywhere else PyTorch's attention in a grid.

Axes: N tokens in a row, M tokens of the other side in a row, S sentence, L source position, T target
position, H heads, P width of one head, D width.
"""

from __future__ import annotations

import ctypes
import inspect
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.nets import fused, layers
from trmt.nets.base import Ragged, cells

varlen_attn: Any = None
_CAUSAL: dict[bool, Any] = {}


def load_varlen() -> None:
    """Load PyTorch's attention for a GPU; only where there is one, since its whole compiler comes along."""
    global varlen_attn
    with suppress(ImportError):  # before PyTorch 2.10
        from torch.nn.attention.varlen import varlen_attn as found

        # PyTorch 2.10 has a flag for what each token may see, later ones a window.
        flag = "is_causal" in inspect.signature(found).parameters
        for causal in (True, False):
            _CAUSAL[causal] = {"is_causal": causal} if flag else {"window_size": (-1, 0 if causal else -1)}
        varlen_attn = found


LANES = 16  # floats that a kernel takes at a time
TOGETHER = 32  # sentences of like length that are padded together

Parts = tuple[Tensor, Tensor, Tensor]  # queries [N, H, P], keys and values [M, H, P]


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
    return attend((query_NHP, key_NHP, value_NHP), spans, spans, causal=causal, dropout=dropout)


def attend_over(
    query_ND: Tensor, memory_M2D: Tensor, spans: Spans, over: Spans, heads: int, *, dropout: float = 0.0
) -> Tensor:
    """Attention of each sentence to its source, whose keys and values stand side by side: [N, D]."""
    if _fits(query_ND, spans, heads, 1, dropout) and _fits(memory_M2D, over, heads, 2, dropout):
        out: Tensor = _CrossAttention.apply(query_ND, memory_M2D, spans, over, heads)  # type: ignore[no-untyped-call]
        return out
    key_MHP, value_MHP = memory_M2D.unflatten(-1, (2, heads, -1)).unbind(1)
    query_NHP = query_ND.unflatten(-1, (heads, -1))
    return attend((query_NHP, key_MHP, value_MHP), spans, over, causal=False, dropout=dropout)


def attend(parts: Parts, spans: Spans, over: Spans, *, causal: bool, dropout: float = 0.0) -> Tensor:
    """The same in PyTorch: without padding where the GPU has a kernel for it, padded elsewhere: [N, D]."""
    if not dropout and has_varlen(parts[0]):
        starts, longest = (spans.narrow_S, over.narrow_S), (spans.longest, over.longest)
        found_NHP: Any = varlen_attn(*parts, *starts, *longest, **_CAUSAL[causal])
        joined_ND: Tensor = found_NHP.flatten(1)
        return joined_ND
    return attend_padded(parts, spans, over, causal=causal, dropout=dropout)


def has_varlen(x: Tensor) -> bool:
    """Whether there is attention without padding for such tensors; it knows no dropout and no bias."""
    return varlen_attn is not None and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _fits(x: Tensor, spans: Spans, heads: int, parts: int, dropout: float) -> bool:
    part = x.shape[-1] // parts // heads
    return not dropout and part % LANES == 0 and not spans.starts_S.is_cuda and fused.kernels_serve(x)


def attend_padded(
    parts: Parts,
    spans: Spans,
    over: Spans,
    *,
    causal: bool,
    dropout: float = 0.0,
    look: layers.Look | None = None,
) -> Tensor:
    """The sentences set out in a grid, attended to, or looked at in another way, and put in a row again.

    On the CPU, sentences of like length share a grid; a GPU would have to be asked for the lengths first.
    """
    lengths_2S = torch.stack([spans.starts_S.diff(), over.starts_S.diff()])
    if lengths_2S.shape[1] <= TOGETHER or lengths_2S.device.type != "cpu" or torch.compiler.is_compiling():
        return attend_in_grid(parts, spans, over, causal=causal, dropout=dropout, look=look)
    query_NHP, key_MHP, value_MHP = parts
    rows, found = [], []
    for group in lengths_2S.amax(0).argsort().split(TOGETHER):
        (rows_N, some), (rows_M, others) = _picked(spans, group), _picked(over, group)
        picked = query_NHP[rows_N], key_MHP[rows_M], value_MHP[rows_M]
        found.append(attend_in_grid(picked, some, others, causal=causal, dropout=dropout, look=look))
        rows.append(rows_N)
    return torch.cat(found)[torch.cat(rows).argsort()]


def _picked(spans: Spans, sentences: Tensor) -> tuple[Tensor, Spans]:
    """The rows of these sentences, and where they begin and end once they stand in a row by themselves."""
    lengths_S = spans.starts_S.diff()[sentences]
    starts_S = F.pad(lengths_S.cumsum(0), (1, 0))
    shift_N = torch.repeat_interleave(spans.starts_S[sentences] - starts_S[:-1], lengths_S)
    rows_N = torch.arange(len(shift_N)) + shift_N
    return rows_N, Spans(starts_S, starts_S.int(), int(lengths_S.max()))


def attend_in_grid(
    parts: Parts,
    spans: Spans,
    over: Spans,
    *,
    causal: bool,
    dropout: float = 0.0,
    look: layers.Look | None = None,
) -> Tensor:
    """The same with all sentences in one grid."""
    query_NHP, key_MHP, value_MHP = parts
    query_SHTP, cells_N, _ = _set_out(query_NHP, spans)
    (key_SHLP, _, real_SL), (value_SHLP, _, _) = _set_out(key_MHP, over), _set_out(value_MHP, over)
    # A sentence without a key would be a row of nothing but minus infinities.
    mask = None if causal else (real_SL | ~real_SL.any(1, keepdim=True))[:, None, None]
    if look:
        seen = real_SL.new_ones(query_SHTP.shape[2], key_SHLP.shape[2]).tril() if mask is None else mask
        return look(query_SHTP, key_SHLP, value_SHLP, layers.blocked(seen)).flatten(0, 1)[cells_N]
    out_SHTP = F.scaled_dot_product_attention(
        query_SHTP, key_SHLP, value_SHLP, attn_mask=mask, is_causal=causal, dropout_p=dropout
    )
    return out_SHTP.transpose(1, 2).flatten(2).flatten(0, 1)[cells_N]


def attention_weights(
    query_ND: Tensor,
    key_MD: Tensor,
    spans: Spans,
    over: Spans,
    heads: int,
    *,
    causal: bool = False,
    only: slice = slice(None),
) -> Tensor:
    """The weights of `attend_over`, for those who want to look: [S, H, T, L], zero where nothing is.

    `only` are the heads that are wanted.
    """
    query_SHTP, _, _ = _set_out(query_ND.unflatten(-1, (heads, -1))[:, only], spans)
    key_SHLP, _, real_SL = _set_out(key_MD.unflatten(-1, (heads, -1))[:, only], over)
    mask = layers.blocked(real_SL)[:, None, None]
    if causal:
        count = query_SHTP.shape[2]
        mask = mask + layers.blocked(mask.new_ones(count, count, dtype=torch.bool).tril())
    return layers.attention_weights(query_SHTP, key_SHLP, mask)


def own_weights(merged_N3D: Tensor, spans: Spans, heads: int, *, causal: bool) -> Tensor:
    """The weights of `attend_own`, for those who want to look: [S, H, T, T], zero where nothing is."""
    query_ND, key_ND, _ = merged_N3D.chunk(3, -1)
    return attention_weights(query_ND, key_ND, spans, spans, heads, causal=causal)


def _set_out(x_NHP: Tensor, spans: Spans) -> tuple[Tensor, Tensor, Tensor]:
    """A row in a grid [S, H, T, P]; where in it each token lies, and which of its cells are real."""
    width = max(spans.longest, 1)
    lengths_S = spans.starts_S.diff()
    cells_N = cells(lengths_S, width, count=x_NHP.shape[0])
    real_ST = torch.arange(width, device=lengths_S.device) < lengths_S[:, None]
    grid = x_NHP.new_zeros(real_ST.numel(), *x_NHP.shape[1:]).index_copy(0, cells_N, x_NHP)
    return grid.unflatten(0, real_ST.shape).transpose(1, 2), cells_N, real_ST


def _forward(attention: _Attention, tokens: int) -> tuple[Tensor, Tensor]:
    """The result, and for each token and head the logarithm of what its weights were divided by."""
    out_ND = torch.empty(tokens, attention.heads * attention.part, dtype=torch.float32)
    norms_NH = torch.empty(tokens, attention.heads, dtype=torch.float32)
    _call("trmt_attention", attention, out_ND, norms_NH)
    return out_ND, norms_NH


def _backward(attention: _Attention, grad_ND: Tensor, norms_NH: Tensor, *gradients: Tensor) -> None:
    """Writes the gradients of queries, keys and values."""
    places = _Gradients(*(x.data_ptr() for x in gradients), *(x.stride(0) for x in gradients))
    _call("trmt_attention_backward", attention, grad_ND.contiguous(), norms_NH, places)


def _call(kernel: str, *arguments: Tensor | ctypes.Structure) -> None:
    addresses = (
        ctypes.c_void_p(each.data_ptr()) if isinstance(each, Tensor) else ctypes.byref(each)
        for each in arguments
    )
    if getattr(fused.library(), kernel)(*addresses):
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


class _OwnAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, merged_N3D: Tensor, spans: Spans, heads: int, causal: bool) -> Tensor:
        attention = _described(merged_N3D.chunk(3, -1), spans, spans, heads, causal=causal)
        out_ND, norms_NH = _forward(attention, len(merged_N3D))
        ctx.save_for_backward(merged_N3D, norms_NH)
        ctx.spans, ctx.heads, ctx.causal = spans, heads, causal
        return out_ND

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        merged_N3D, norms_NH = ctx.saved_tensors
        attention = _described(merged_N3D.chunk(3, -1), ctx.spans, ctx.spans, ctx.heads, causal=ctx.causal)
        grads_N3D = torch.empty_like(merged_N3D)
        _backward(attention, grad_ND, norms_NH, *grads_N3D.chunk(3, -1))
        return grads_N3D, None, None, None


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_ND: Tensor, memory_M2D: Tensor, spans: Spans, over: Spans, heads: int
    ) -> Tensor:
        attention = _described((query_ND, *memory_M2D.chunk(2, -1)), spans, over, heads, causal=False)
        out_ND, norms_NH = _forward(attention, len(query_ND))
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
        _backward(attention, grad_ND, norms_NH, grad_query_ND, *grad_memory_M2D.chunk(2, -1))
        return grad_query_ND, grad_memory_M2D, None, None, None
