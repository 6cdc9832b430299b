"""The seam for speed: what `trmt.native` computes faster than plain PyTorch, asked for by name.

The core computes everything in plain PyTorch. Where speed matters, it first asks here for a faster version.
There is none while PyTorch traces (`torch.compile`), with TRMT_KERNELS=0, or where the package trmt.native
was left out. A faster version takes the same arguments as the plain one and returns its result, or None where
it cannot serve: another device or dtype, no C compiler.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from trmt.registry import NATIVE, optional


def accelerated(name: str) -> Any | None:
    """The faster version of this name in `registry.NATIVE`, if there is one."""
    if torch.compiler.is_compiling() or os.environ.get("TRMT_KERNELS") == "0":
        return None
    return _entry(name)


@functools.cache
def _entry(name: str) -> Any | None:
    return optional(NATIVE[name])
