"""The source of a Transformer that is stepped as in `stepping`: read by a kernel, or in plain PyTorch.

Axes: S sentence, L source position, N source tokens in a row, H heads, P width of one head, D width, A layers
of the decoder.

As there, what lies between the matrix products is computed in double precision and rounded to fp32 once.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from trmt.native import products
from trmt.native.products import Native
from trmt.native.stepping import Half, Remembered
from trmt.nets import layers, positions
from trmt.nets.base import Source
from trmt.nets.transformer_layers import check_length, embed, encode


def remember(net: Any, config: Any, source: Source) -> Remembered:
    """What the source left, in plain PyTorch."""
    check_length(config, source)
    ids_SL, real_SL = source.padded(layers.KEY_MULTIPLE)
    mask = layers.blocked(real_SL)[:, None, None]
    position_L = positions.grid(config, ids_SL)

    def look_around(_: int, merged_SLD: Tensor) -> Tensor:
        parts = (layers.heads(part, config.heads).double() for part in merged_SLD.chunk(3, -1))
        query_SHLP, key_SHLP, value_SHLP = parts
        scores = query_SHLP @ key_SHLP.transpose(-2, -1) / math.sqrt(query_SHLP.shape[-1]) + mask
        return (scores.softmax(-1) @ value_SHLP).transpose(1, 2).flatten(2).float()

    x_SLD = encode(net, config, embed(net, config, ids_SL, position_L, side=0), look_around)
    both_SALD = net.memory(x_SLD).unflatten(-1, (2 * config.decoder_layers, -1)).transpose(1, 2)
    return Remembered.of(both_SALD.contiguous(), mask)


class _Text(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sentences", "length")),
        *((name, ctypes.c_void_p) for name in ("ids", "starts", "memory", "mask")),
    )


def reader_for(net: Any, frozen: Any) -> Reader | None:
    """The kernel for an encoder whose products are the kernels' own."""
    suits = net.config.segments == 1 and isinstance(frozen.memory, Native)
    return Reader(net, frozen) if suits else None


class Reader(Half):
    """An encoder that reads in one call."""

    def __init__(self, net: Any, frozen: Any) -> None:
        super().__init__(net, frozen, side=0)
        self.config, self.memory = net.config, frozen.memory
        self.function = products.library().trmt_read

    def read(self, source: Source) -> Remembered:
        """What `remember` returns."""
        check_length(self.config, source)
        ids_N, starts = source.packed()
        both_SALD = torch.empty(
            len(source), 2 * self.config.decoder_layers, source.longest, self.config.width
        )
        mask = torch.empty(len(source), 1, 1, source.longest)
        pointers = (tensor.data_ptr() for tensor in (ids_N, starts, both_SALD, mask))
        text = _Text(len(source), source.longest, *pointers)
        self.function(self.address, self.memory.address, ctypes.addressof(text))
        return Remembered.of(both_SALD, mask)
