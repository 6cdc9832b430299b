"""Label-smoothed cross-entropy, without ever holding the logits of a whole batch.

Axes: N tokens in a row, C tokens of one chunk, D width, V vocabulary.

The loss of a token with label smoothing e (arXiv 1512.00567) is

    (1 - e) * -log p(y)  +  e / V * sum over the vocabulary of -log p(v)

Its gradient is known as soon as the logits are, so each chunk of tokens goes all the way: logits, loss,
gradients of the hidden states and of the matrix. What is kept for the backward pass is these gradients,
which then are only multiplied by a number. Tokens with a negative id are padding and count for nothing.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.nets import fused

CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}  # of logits: what caches hold; what a GPU is busy with
TENSOR_CORES = 64  # a GPU multiplies fastest where sizes are a multiple of this
HALF_SCALE = 1024.0  # keeps small probabilities above what fp16 can tell from zero


def smoothed_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """The loss of the file's head and the plain negative log likelihood, both summed over the tokens."""
    wanted = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    kind = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
    apply: Any = _LinearCrossEntropy.apply  # torch leaves it untyped
    with torch.autocast(kind, enabled=False):
        total, nll = apply(hidden_ND, weight_VD, target_N, smoothing, dtype, wanted)
    return total, nll.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        target_N: Tensor,
        smoothing: float,
        dtype: torch.dtype,
        wanted: bool,
    ) -> tuple[Tensor, Tensor]:
        vocabulary = weight_VD.shape[0]
        weight = _widened(weight_VD.to(dtype))
        grad_hidden = torch.empty_like(hidden_ND) if wanted else None
        # Turned, because that way round the products that it is a sum of are faster on the CPU.
        grad_weight = weight_VD.new_zeros(weight.shape[1], weight.shape[0]) if wanted else None
        factor = HALF_SCALE if dtype == torch.float16 else 1.0
        sums = []
        size = _chunk(hidden_ND.device, weight.shape[0] * 4)
        logits = hidden_ND.new_empty(min(size, hidden_ND.shape[0]), weight.shape[0], dtype=dtype)
        for begin in range(0, hidden_ND.shape[0], size):
            chunk_CD = hidden_ND[begin : begin + size].to(dtype)
            logits_CV = torch.mm(chunk_CD, weight.t(), out=logits[: chunk_CD.shape[0]])
            losses, grad_CV = _chunk_loss(
                logits_CV, target_N[begin : begin + size], vocabulary, smoothing, factor
            )
            sums.append(losses)
            if grad_hidden is not None and grad_weight is not None:
                grad_hidden[begin : begin + size] = (grad_CV @ weight).div_(factor)
                _add_product(grad_weight, grad_CV, chunk_CD, 1 / factor)
        nll, spread = torch.stack(sums).sum(0) if sums else hidden_ND.new_zeros(2)
        ctx.mark_non_differentiable(nll)
        if grad_weight is not None:
            grad_weight = grad_weight[:, :vocabulary].t().contiguous()
        ctx.save_for_backward(grad_hidden, grad_weight)
        return (1 - smoothing) * nll + smoothing * spread, nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None, None, None


def _chunk(device: torch.device, row_bytes: int) -> int:
    """How many tokens go at once."""
    return max(CHUNK_BYTES.get(device.type, 1 << 26) // row_bytes // 8 * 8, 8)


def _widened(weight: Tensor) -> Tensor:
    """On a GPU, rows of zeros are added up to a size that its tensor cores like."""
    missing = -weight.shape[0] % TENSOR_CORES if weight.is_cuda else 0
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def _add_product(total: Tensor, grad_CV: Tensor, chunk_CD: Tensor, scale: float) -> None:
    """total += scale * chunk.T @ grad, in the precision of `total`."""
    if total.dtype == grad_CV.dtype:
        total.addmm_(chunk_CD.t(), grad_CV, alpha=scale)
    elif scale == 1:
        total.add_(chunk_CD.t() @ grad_CV)
    else:  # scaled before the product: a sum over many tokens of one kind is more than fp16 can hold
        total.add_((chunk_CD * scale).t() @ grad_CV)


def _chunk_loss(
    logits_CV: Tensor, target_C: Tensor, vocabulary: int, smoothing: float, factor: float
) -> tuple[Tensor, Tensor]:
    """(negative log likelihood, its mean over the vocabulary), summed; the gradient of the logits."""
    if logits_CV.device.type == "cpu" and logits_CV.dtype == torch.bfloat16:
        scores_CV = logits_CV.float()
        if fused.kernels_serve(scores_CV):
            return _by_kernel(scores_CV, target_C, smoothing), scores_CV.to(logits_CV.dtype)
    if fused.kernels_serve(logits_CV):
        return _by_kernel(logits_CV, target_C, smoothing), logits_CV
    compute = _compiled() if logits_CV.is_cuda else _by_torch
    losses, grad_CV = compute(logits_CV, target_C, vocabulary, smoothing, factor)
    return losses, grad_CV


def _by_kernel(logits_CV: Tensor, target_C: Tensor, smoothing: float) -> Tensor:
    """By a kernel of the CPU, which writes the gradient over the logits."""
    target_C = target_C.contiguous()
    losses_C2 = logits_CV.new_empty(logits_CV.shape[0], 2)
    rows, width = logits_CV.shape
    out_of_range = fused.library().trmt_cross_entropy(
        *(ctypes.c_void_p(x.data_ptr()) for x in (logits_CV, target_C, losses_C2)),
        *(ctypes.c_int64(size) for size in (rows, width)),
        ctypes.c_float(smoothing),
    )
    if out_of_range:
        raise IndexError(f"a target is not among the {width} ids that the network has logits for")
    return losses_C2.sum(0)


def _by_torch(
    logits_CV: Tensor, target_C: Tensor, vocabulary: int, smoothing: float, factor: float
) -> tuple[Tensor, Tensor]:
    scores_CV = logits_CV.float() if logits_CV.element_size() < 4 else logits_CV
    if vocabulary < scores_CV.shape[1]:  # columns that stand for nothing
        column_V = torch.arange(scores_CV.shape[1], device=scores_CV.device)
        scores_CV = scores_CV.masked_fill(column_V >= vocabulary, -torch.inf)
    real_C = (target_C >= 0).to(scores_CV.dtype)
    place_C1 = target_C.clamp(min=0)[:, None]
    lse_C = scores_CV.logsumexp(1)
    nll_C = (lse_C - scores_CV.gather(1, place_C1)[:, 0]) * real_C
    spread_C = (lse_C - scores_CV[:, :vocabulary].mean(1)) * real_C
    grad_CV = (scores_CV - lse_C[:, None]).exp()
    grad_CV[:, :vocabulary] -= smoothing / vocabulary
    grad_CV.scatter_add_(1, place_C1, torch.full_like(place_C1, smoothing - 1, dtype=grad_CV.dtype))
    grad_CV = grad_CV * (real_C * factor)[:, None]
    return torch.stack([nll_C.sum(), spread_C.sum()]), grad_CV.to(logits_CV.dtype)


@functools.cache
def _compiled() -> Any:
    """On a GPU the operations between the products are merged into a few kernels, where it has a compiler."""
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True
    return torch.compile(_by_torch, dynamic=True)


class SmoothedCrossEntropy(torch.autograd.Function):
    """The same from logits, for networks whose readout is not the product with one matrix."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_N: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        (nll, spread), grad_NV = _by_torch(logits_NV, target_N, logits_NV.shape[1], smoothing, 1.0)
        ctx.save_for_backward(grad_NV)
        ctx.mark_non_differentiable(nll)
        return (1 - smoothing) * nll + smoothing * spread, nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (grad_NV,) = ctx.saved_tensors
        return grad_NV * grad, None, None
