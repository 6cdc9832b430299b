"""Two ways to compute the same are compared: their results, and the gradients of all that went in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trmt.registry import optional

_library = optional("trmt.native.training:library")
needs_kernels = pytest.mark.skipif(
    not (_library and _library()), reason="trmt.native is not here, or no C compiler"
)


def gradients(make: Callable[[], Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result, and the gradient of each input for a gradient that is different everywhere."""
    out = make()
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 2e-5) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
