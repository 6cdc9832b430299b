"""What may not come next: banned ids, anything but the prefix, the end before its time.

Axes: S sentence, K hypothesis, V vocabulary, T target position.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.decoding.request import Request
from trmt.devices.transfer import to_device


@dataclass
class Masks:
    """The masks of the sentences in a batch."""

    banned: Tensor
    banned_slice: slice | None  # the banned ids, if they follow one another
    eos: int
    prefix_ST: Tensor  # -1 behind each prefix
    min_tokens_S: Tensor
    steps_left: int  # so many steps more there is something to mask beside what is banned

    @classmethod
    def of(
        cls, requests: Sequence[Request], *, banned: Collection[int], eos: int, device: torch.device
    ) -> Masks:
        """The masks of these requests."""
        ids = sorted(banned)
        longest = max(len(request.prefix) for request in requests)
        rows = [[*request.prefix, *[-1] * (longest - len(request.prefix))] for request in requests]
        return cls(
            to_device(ids, device),
            slice(ids[0], ids[-1] + 1) if ids and ids[-1] - ids[0] + 1 == len(ids) else None,
            eos,
            to_device(rows, device).view(len(requests), longest),
            to_device([request.min_tokens for request in requests], device),
            max(max(len(request.prefix), request.min_tokens) for request in requests),
        )

    def keep(self, sentences: Tensor) -> None:
        """The masks of these sentences only."""
        self.prefix_ST, self.min_tokens_S = self.prefix_ST[sentences], self.min_tokens_S[sentences]

    def replace(self, slots: Tensor, other: Masks) -> None:
        """The masks of the sentences of `other` in these slots."""
        self.min_tokens_S = self.min_tokens_S.index_copy(0, slots, other.min_tokens_S)
        width = max(self.prefix_ST.shape[1], other.prefix_ST.shape[1])
        mine, theirs = (
            F.pad(masks.prefix_ST, [0, width - masks.prefix_ST.shape[1]], value=-1) for masks in (self, other)
        )
        self.prefix_ST = mine.index_copy(0, slots, theirs)
        self.steps_left = max(self.steps_left, other.steps_left)

    def apply(self, logits_SKV: Tensor, length_S: Tensor) -> None:
        """Mask, in place, what may not follow so many tokens."""
        if self.banned_slice:
            logits_SKV[:, :, self.banned_slice] = -torch.inf
        elif len(self.banned):
            logits_SKV.index_fill_(2, self.banned, -torch.inf)
        if self.steps_left <= 0:
            return
        self.steps_left -= 1
        logits_SKV[:, :, self.eos].masked_fill_((length_S < self.min_tokens_S)[:, None], -torch.inf)
        longest = self.prefix_ST.shape[1]
        if longest:
            forced_S = self.prefix_ST.gather(1, length_S.clamp(max=longest - 1)[:, None])[:, 0]
            within_S = (forced_S >= 0) & (length_S < longest)
            token_V = torch.arange(logits_SKV.shape[2], device=logits_SKV.device)
            # The logit is set and not left, since the token may be banned elsewhere.
            certain_SV = torch.where(token_V == forced_S.clamp(min=0)[:, None], 0.0, -torch.inf)
            logits_SKV.copy_(torch.where(within_S[:, None, None], certain_SV[:, None], logits_SKV))
