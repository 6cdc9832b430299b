"""Several steps of search in one call of a kernel, with nothing to do in Python between them (multi_step.c).

Axes: S sentence, K hypothesis, T target position.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from trmt.decoding.base import Search
from trmt.native import products, search
from trmt.native.addresses import check_returned, is_plain
from trmt.native.products import PackedProduct
from trmt.native.transformer import NativeStepper, check_sizes
from trmt.nets.base import State, Stepper

LONGEST = 16  # steps of a call: Ctrl-C waits for its end


class _Rules(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("bans", "eos", "longest")),
        *((name, ctypes.c_void_p) for name in ("banned", "least", "prefix")),
    )


class _Search(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("network", "step", "readout", "advance", "search")),
        *((name, ctypes.c_void_p) for name in ("length", "done")),
        ("reorders", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("logits", "parents")),
        ("rules", _Rules),
    )


def multi_step(stepper: Stepper, how: Search) -> MultiStep | None:
    """The steps of this network and search in one call, where both have kernels."""
    return MultiStep(stepper, how) if isinstance(stepper, NativeStepper) else None


class MultiStep:
    """The steps of one network and one search."""

    def __init__(self, stepper: NativeStepper, how: Search) -> None:
        assert isinstance(stepper.readout, PackedProduct)
        check_sizes(stepper.readout, (stepper.readout.outputs, stepper.width))
        self.stepper, self.readout, self.search = stepper, stepper.readout, how
        loaded = products.library()
        assert loaded is not None
        self.function = loaded.trmt_steps
        self._scratch: dict[str, Tensor] = {}

    def run(self, batch: Any, most: int, enough: int) -> int:
        """Decode up to `most` steps, until `enough` sentences are done; returns how many steps were taken."""
        outputs = self.readout.outputs
        compiled = search.compiled(self.search, batch.search_state, outputs)
        if not compiled:
            return 0
        memory, cache, position_S = batch.state.take()
        cache.advance(position_S, 0)
        cache.reserve(cache.longest + 1)
        tokens_SK = batch.tokens_SK = batch.tokens_SK.contiguous()
        rows = tokens_SK.numel()
        step = self.stepper.prepared(tokens_SK, position_S, cache, memory)
        step.hidden = self._space("hidden", rows * self.stepper.width)
        arguments = _Search(
            self.stepper.decoder.address,
            ctypes.addressof(step),
            self.readout.address,
            ctypes.cast(compiled.function, ctypes.c_void_p),
            ctypes.addressof(compiled.state),
            batch.search_state.length_S.data_ptr(),
            batch.search_state.done_S.data_ptr(),
            self.search.reorders,
            self._space("logits", rows * outputs),
            self._space("parents", rows, torch.long),
            _rules(batch.masks),
        )
        most = min(most, cache.columns - cache.longest, LONGEST)
        taken = int(self.function(ctypes.addressof(arguments), most, enough))
        check_returned(max(-taken, 0))
        cache.longest += taken
        batch.masks.steps_left -= taken
        batch.state = State(memory, cache, position_S)
        return taken

    def _space(self, name: str, size: int, dtype: torch.dtype = torch.float32) -> int:
        """The address of space for so many numbers, which is used again next time."""
        kept = self._scratch.get(name)
        if kept is None or len(kept) < size:
            kept = self._scratch[name] = torch.empty(size, dtype=dtype)
        return kept.data_ptr()


def _rules(masks: Any) -> _Rules:
    tensors = masks.banned, masks.min_tokens_S, masks.prefix_ST
    assert all(is_plain(tensor) for tensor in tensors)
    pointers = (tensor.data_ptr() for tensor in tensors)
    return _Rules(len(masks.banned), masks.eos, masks.prefix_ST.shape[1], *pointers)
