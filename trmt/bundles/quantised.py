"""Matrices as int8 with a scale for each row: how int8 bundles store weights.

int8 times scale is exact in fp32, and quantising the product gives the same int8 and scales again. So a
network in fp32 whose weights were rounded this way computes what the int8 network computes.

Axes: N rows of a matrix, K columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trmt.errors import BundleError
from trmt.nets.linear import quantize

SCALE = ".scale"  # suffix of the name of a matrix's scales


def quantise_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with each matrix as int8, and its scales under a name of their own; the rest unchanged."""
    stored: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not _is_matrix(tensor):
            stored[name] = tensor
            continue
        int8_NK, stored[name + SCALE] = quantize(tensor.detach().float().cpu())
        if not stored[name + SCALE].isfinite().all():
            raise BundleError(f"{name!r} has values that are not finite; quantise another checkpoint")
        stored[name] = int8_NK
    return stored


def dequantise_weights(stored: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """The weights in fp32, with the exact values of int8 times scale."""
    for name, tensor in stored.items():
        if name + SCALE in stored and not _has_scales(tensor, stored[name + SCALE]):
            raise BundleError(
                f"{where} has {name!r} not as an int8 matrix with a scale in fp32 for each row; copy it again"
            )
    return {
        name: _dequantise(tensor, stored[name + SCALE]) if name + SCALE in stored else tensor
        for name, tensor in stored.items()
        if not (name.endswith(SCALE) and name.removesuffix(SCALE) in stored)
    }


def _has_scales(int8_NK: Tensor, scale_N: Tensor) -> bool:
    types = int8_NK.dtype, scale_N.dtype
    return types == (torch.int8, torch.float32) and int8_NK.dim() == 2 and scale_N.shape == int8_NK.shape[:1]


@torch.no_grad()
def round_weights(net: nn.Module) -> None:
    """Round every matrix of a network to the values that int8 can represent."""
    for parameter in net.parameters():
        if _is_matrix(parameter):
            parameter.copy_(_dequantise(*quantize(parameter)))


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.is_floating_point()


def _dequantise(int8_NK: Tensor, scale_N: Tensor) -> Tensor:
    return int8_NK.float() * scale_N[:, None]
