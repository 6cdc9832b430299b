"""Claims that need no training: identities of the networks' arithmetic, computed on networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from claims.systems import BY_NAME, recipe

POSITIONS = 512
SHIFTS = (1, 2, 7, 64)


def values() -> dict[str, float]:
    """Everything that is computed, by name."""
    return {**shifts(), **convolutions()}


def shifts(width: int = 64) -> dict[str, float]:
    """How far PE(pos + k) is from a matrix that depends on k alone times PE(pos).

    The matrix turns each pair of columns by k times their rate. For comparison, what the best matrix that
    least squares find leaves of trmt's own table and of one of chance.
    """
    from trmt.nets.layers import sinusoids

    exact = sines(width)
    table = sinusoids(POSITIONS, width).double()
    chance = torch.randn(POSITIONS, width, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    similar = exact @ exact.T
    return {
        "shift-residual": max(float((exact[:-k] @ turn(k, width).T - exact[k:]).abs().max()) for k in SHIFTS),
        "shift-residual-of-sines": residual(table, 1),
        "shift-residual-of-chance": residual(chance, 1),
        "table-difference": float((table - exact).abs().max()),
        # PE(pos) . PE(pos + k) is the same wherever pos is; so it is as well with PE(pos - k).
        "similarity-spread": max(float(similar.diagonal(k).std()) for k in SHIFTS),
    }


def sines(width: int) -> Tensor:
    """The table of "Attention Is All You Need" 3.5 in double precision."""
    angle = torch.arange(POSITIONS, dtype=torch.double)[:, None] * rates(width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def rates(width: int) -> Tensor:
    """By how much the angle of each pair of columns grows from one position to the next."""
    return 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.double) / width)


def turn(k: int, width: int) -> Tensor:
    """The matrix M of the claim PE(pos + k) = M PE(pos): a rotation of each pair of columns."""
    cos, sin = (k * rates(width)).cos(), (k * rates(width)).sin()
    blocks = [
        torch.tensor([[c, s], [-s, c]], dtype=torch.double)
        for c, s in zip(cos.tolist(), sin.tolist(), strict=True)
    ]
    return torch.block_diag(*blocks)


def residual(table: Tensor, k: int) -> float:
    """The share of the variance of row pos + k that no matrix makes of row pos."""
    before, after = table[:-k], table[k:]
    solution = torch.linalg.lstsq(before, after).solution
    left = (before @ solution - after).square().sum()
    return float(left / (after - after.mean(0)).square().sum())


@torch.no_grad()
def convolutions() -> dict[str, float]:
    """How far the feed-forward layer of a Transformer is from two convolutions of width one."""
    from claims.scale import SCALES
    from trmt.nets.transformer import Transformer, TransformerConfig

    torch.manual_seed(1)
    tree: dict[str, Any] = recipe(BY_NAME["transformer"], SCALES["phrasebook"], seed=1, device="cpu")
    config = TransformerConfig(source_vocabulary=10, target_vocabulary=10, **tree["network"])
    layer = Transformer(config).eval().double().encoder.layers[0]
    x_STD = torch.randn(3, 11, config.d_model, dtype=torch.double)
    inner, outer = (convolution(linear) for linear in (layer.feed_forward.inner, layer.feed_forward.outer))
    convolved_STD = outer(inner(x_STD.transpose(1, 2)).relu()).transpose(1, 2)
    expected_STD = layer.feed_forward(x_STD)
    return {"feed-forward-difference": float((convolved_STD - expected_STD).abs().max())}


def convolution(linear: Any) -> nn.Conv1d:
    """A convolution of width one with the weights of a linear layer."""
    out, into = linear.weight.shape
    conv = nn.Conv1d(into, out, 1, dtype=linear.weight.dtype)
    conv.weight.copy_(linear.weight[:, :, None])
    conv.bias.copy_(linear.bias)
    return conv
