"""Steps of search one after another in one call of a kernel, with nothing to do in Python between them.

What `Eager` does in a step, with the same bits (trmt/native/chain.c); it is for networks and searches whose
own steps are kernels.

Axes: S sentence, K hypothesis, T target position.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from trmt.decoding.base import Search
from trmt.native import products
from trmt.native.products import Native
from trmt.nets.base import State, Stepper

LONGEST = 16  # steps of a call: whoever interrupts the program waits for its end


class _Rules(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("bans", "eos", "longest")),
        *((name, ctypes.c_void_p) for name in ("banned", "least", "prefix")),
    )


class _Chain(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("network", "step", "readout", "advance", "search")),
        *((name, ctypes.c_void_p) for name in ("length", "done")),
        ("reorders", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("read", "parents")),
        ("rules", _Rules),
    )


class Chain:
    """The steps of one network and one search."""

    def __init__(self, stepper: Stepper, search: Search) -> None:
        self.kernel, self.product, self.search = stepper.kernel, stepper.product, search
        self.function = products.library().trmt_chain
        self._kept: dict[str, Tensor] = {}

    @classmethod
    def of(cls, stepper: Stepper, search: Search) -> Chain | None:
        """The chain, where the network's steps are kernels."""
        return cls(stepper, search) if stepper.kernel and isinstance(stepper.product, Native) else None

    def run(self, under: Any, most: int, enough: int) -> bool:
        """Take what is under way so many steps further, or until so many sentences are done.

        Returns whether it went any further.
        """
        compiled = self.search.compiled(under.search_state, self.product.outer)
        if not compiled:
            return False
        memory, cache, position_S = under.state.take()
        cache.go_on(position_S, 0)
        cache.make_room(cache.longest + 1)
        tokens_SK = under.tokens_SK = under.tokens_SK.contiguous()
        rows = tokens_SK.numel()
        step = self.kernel.prepared(tokens_SK, position_S, cache, memory)
        step.hidden = self._space("hidden", rows * self.kernel.width)
        chain = _Chain(
            self.kernel.address,
            ctypes.addressof(step),
            self.product.address,
            ctypes.cast(compiled.function, ctypes.c_void_p),
            ctypes.addressof(compiled.state),
            under.search_state.length_S.data_ptr(),
            under.search_state.done_S.data_ptr(),
            self.search.reorders,
            self._space("read", rows * self.product.outer),
            self._space("parents", rows, torch.long),
            self._rules(under.masks),
        )
        most = min(most, cache.columns - cache.longest, LONGEST)
        taken = self.function(ctypes.addressof(chain), most, enough)
        cache.longest += taken
        under.oldest += taken
        under.masks.busy -= taken
        under.state = State(memory, cache, position_S)
        return bool(taken)

    @staticmethod
    def _rules(masks: Any) -> _Rules:
        tensors = masks.banned, masks.least_S, masks.prefix_ST
        assert all(tensor.is_contiguous() for tensor in tensors)
        pointers = (tensor.data_ptr() for tensor in tensors)
        return _Rules(len(masks.banned), masks.eos, masks.prefix_ST.shape[1], *pointers)

    def _space(self, name: str, size: int, kind: torch.dtype = torch.float32) -> int:
        """Where there is space for so many numbers, kept for the next time."""
        kept = self._kept.get(name)
        if kept is None or len(kept) < size:
            kept = self._kept[name] = torch.empty(size, dtype=kind)
        return kept.data_ptr()
