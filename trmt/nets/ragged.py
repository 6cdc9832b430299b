"""What goes into networks: sentences of different lengths, stored one after another without padding.

Axes: S sentence, N all tokens of a batch in a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.devices.transfer import to_device


def grid_cells(lengths_S: Tensor, width: int, *, count: int) -> Tensor:
    """The cell of each of `count` tokens in a padded grid with rows of `width`; needs no device sync."""
    starts_S = lengths_S.cumsum(0) - lengths_S
    shift_S = torch.arange(len(lengths_S), device=lengths_S.device) * width - starts_S
    shift_N = torch.repeat_interleave(shift_S, lengths_S, output_size=count)
    return torch.arange(count, device=lengths_S.device) + shift_N


@dataclass(frozen=True)
class Ragged:
    """Sentences of different lengths, stored one after another without padding."""

    ids_N: Tensor
    lengths_S: Tensor
    longest: int  # kept on the host, so that asking for shapes needs no device sync

    @classmethod
    def of(cls, sentences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Self:
        """The sentences, given as lists of ids."""
        lengths = [len(sentence) for sentence in sentences]
        flat = [token for sentence in sentences for token in sentence]
        return cls(to_device(flat, device), to_device(lengths, device), max(lengths, default=0))

    def __len__(self) -> int:
        return self.lengths_S.shape[0]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """The same sentences on another device."""
        return type(self)(
            self.ids_N.to(device, non_blocking=non_blocking),
            self.lengths_S.to(device, non_blocking=non_blocking),
            self.longest,
        )

    def width(self, multiple: int = 1) -> int:
        """The longest sentence, rounded up to a multiple."""
        return -(-self.longest // multiple) * multiple

    def cells_N(self, width: int) -> Tensor:
        """The cell of each token in the padded [S, width] grid, counted row by row."""
        return grid_cells(self.lengths_S, width, count=self.ids_N.shape[0])

    def positions_N(self) -> Tensor:
        """The position of each token in its sentence, counted from 0."""
        return self.cells_N(0)

    def padded(self, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """The ids as a grid padded with zeros, and the mask of its real tokens."""
        width = self.width(multiple)
        ids = self.ids_N.new_zeros(len(self) * width)
        ids[self.cells_N(width)] = self.ids_N
        real = torch.arange(width, device=self.ids_N.device) < self.lengths_S[:, None]
        return ids.view(len(self), width), real

    def packed(self) -> tuple[Tensor, Tensor]:
        """The ids in a row and the S + 1 offsets at which sentences begin and end."""
        return self.ids_N, F.pad(self.lengths_S.cumsum(0), (1, 0))


@dataclass(frozen=True)
class Source(Ragged):
    """The input of the encoder: ids, and by name what else belongs to them (segments, tags, factors)."""

    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        moved = super().to(device, non_blocking=non_blocking)
        extras = {name: x.to(device, non_blocking=non_blocking) for name, x in self.extras.items()}
        return replace(moved, extras=extras)
