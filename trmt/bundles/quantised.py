"""Matrices as whole numbers with a scale for each row: how int8 bundles hold weights.

Whole numbers times scale are exact in fp32, and quantising the result gives the same numbers and scales
again. So a network with rounded weights is the int8 network, whoever holds it in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trmt.errors import BundleError
from trmt.nets.linear import quantize

SCALE = ".scale"  # what the name of a matrix's scales ends in


def store(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with each matrix as int8 and, beside it, its scales; the others as they are."""
    stored: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if not _is_matrix(tensor):
            stored[name] = tensor
            continue
        whole_NK, stored[name + SCALE] = quantize(tensor.detach().float().cpu())
        if not stored[name + SCALE].isfinite().all():
            raise BundleError(f"{name!r} holds numbers that are not finite; quantise another checkpoint")
        stored[name] = whole_NK
    return stored


def restore(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in fp32, exactly what the whole numbers stand for."""
    return {
        name: _product(tensor, stored[name + SCALE]) if name + SCALE in stored else tensor
        for name, tensor in stored.items()
        if not (name.endswith(SCALE) and name.removesuffix(SCALE) in stored)
    }


@torch.no_grad()
def round_weights(net: nn.Module) -> None:
    """Give every matrix of a network the values that int8 can hold."""
    for parameter in net.parameters():
        if _is_matrix(parameter):
            parameter.copy_(_product(*quantize(parameter)))


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.is_floating_point()


def _product(whole_NK: Tensor, scale_N: Tensor) -> Tensor:
    return whole_NK.float() * scale_N[:, None]
