"""Label-smoothed cross-entropy, without ever holding the logits of a whole batch.

Axes: N tokens in a row, C tokens of one chunk, D width, V vocabulary.

The loss of a token with label smoothing e (arXiv 1512.00567) is

    (1 - e) * -log p(y)  +  e / V * sum over the vocabulary of -log p(v)

Its gradient is known as soon as the logits are, so each chunk of tokens goes all the way: logits, loss,
gradients of the hidden states and of the matrix. Only these gradients are kept for the backward pass, which
multiplies them by a number. Tokens with a negative id are padding and count for nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.acceleration import accelerated
from trmt.devices import hardware
from trmt.devices.abilities import abilities
from trmt.devices.memory import is_out_of_memory

CHUNK_BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}  # of logits: what fits in caches; what keeps a GPU busy
TENSOR_CORES = 64  # a GPU multiplies fastest when sizes are a multiple of this
HALF_SCALE = 1024.0  # keeps small probabilities above what fp16 can tell from zero


def smoothed_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """The loss above and the negative log likelihood without smoothing, both summed over the tokens."""
    needs_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    device_type = hidden_ND.device.type
    dtype = (
        torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden_ND.dtype
    )
    apply: Any = _LinearCrossEntropy.apply  # torch leaves it untyped
    with torch.autocast(device_type, enabled=False):
        total, nll = apply(hidden_ND, weight_VD, target_N, smoothing, dtype, needs_grad)
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
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        vocabulary = weight_VD.shape[0]
        weight = _padded(weight_VD.to(dtype))
        grad_hidden = torch.empty_like(hidden_ND) if needs_grad else None
        # Transposed, because in that order the products that it is a sum of are faster on the CPU.
        grad_weight = weight_VD.new_zeros(weight.shape[1], weight.shape[0]) if needs_grad else None
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


def _padded(weight: Tensor) -> Tensor:
    """On a GPU, with rows of zeros up to a multiple of TENSOR_CORES."""
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
    if vocabulary == logits_CV.shape[1] and (fast := accelerated("cross_entropy")):
        losses = fast(logits_CV, target_C, smoothing)  # which writes the gradient over the logits
        if losses is not None:
            return losses, logits_CV
    given = logits_CV, target_C, vocabulary, smoothing, factor
    device = logits_CV.device
    if hardware.is_cuda(device) and abilities(device).use("compile"):
        try:
            losses, grad_CV = _compiled()(*given)
            return losses, grad_CV
        except Exception as error:  # whatever compilers raise; nothing that was given has been changed
            if is_out_of_memory(error):
                raise
            abilities(device).lose("compile", error)
    return _by_torch(*given)


def _by_torch(
    logits_CV: Tensor, target_C: Tensor, vocabulary: int, smoothing: float, factor: float
) -> tuple[Tensor, Tensor]:
    scores_CV = logits_CV.float() if logits_CV.element_size() < 4 else logits_CV
    if vocabulary < scores_CV.shape[1]:  # columns that were only added for size
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
    """The same, its operations fused by torch.compile."""
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
