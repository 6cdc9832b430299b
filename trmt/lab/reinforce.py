"""Learning where to look by drawing lots: REINFORCE with a learned baseline (Williams 1992).

Axes: N all target tokens of a batch in a row, D width, S sentence, T target position, V vocabulary.

A look that drew place a from p(a) is rewarded by r, the log probability of the word that followed, or of
all words from there on where a look changes what comes later. Added to the loss are

    reinforce   -(r - b) log p(a)      b is the baseline, told from what was known before the draw
    baseline    (r - b)^2 / 2
    entropy     -e H(p)

What follows the last token of a target a network cannot know: it draws without a reward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.nets.base import Ragged

CHUNK = 1024  # tokens whose logits are there at a time


class Draw(NamedTuple):
    """What is known of the draw for each token."""

    log_drawn_N: Tensor
    entropy_N: Tensor
    baseline_N: Tensor


def reinforced(
    readout: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    target: Ragged,
    draw: Draw,
    *,
    lasting: bool,
    entropy: float,
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """The losses of drawing, as sums and the number of tokens; `lasting` if draws change what comes later."""
    reward_N, known_N = rewards(readout, hidden_ND.detach(), target, lasting=lasting)
    better_N = torch.where(known_N, reward_N - draw.baseline_N.float(), 0.0)
    count, known = torch.tensor(len(known_N), device=known_N.device), known_N.sum()
    return {
        "reinforce": (-(better_N.detach() * draw.log_drawn_N).sum(), known),
        "baseline": (better_N.square().sum() / 2, known),
        "entropy": (-entropy * draw.entropy_N.sum(), count),
    }


@torch.no_grad()
def rewards(
    readout: Callable[[Tensor], Tensor], hidden_ND: Tensor, target: Ragged, *, lasting: bool
) -> tuple[Tensor, Tensor]:
    """The reward of each token's draw, and where there is one."""
    width = target.longest
    cells_N = target.cells_N(width)
    # The next token of the row, which at the end of a sentence is not its own.
    next_N = target.ids_N.roll(-1)
    known_N = torch.ones_like(next_N, dtype=torch.bool)
    known_N[target.lengths_S.cumsum(0) - 1] = False
    logs = [
        -F.cross_entropy(readout(some_ND).float(), some_N, reduction="none")
        for some_ND, some_N in zip(hidden_ND.split(CHUNK), next_N.split(CHUNK), strict=True)
    ]
    reward_N = torch.where(known_N, torch.cat(logs), 0.0)
    if lasting:
        grid_ST = reward_N.new_zeros(len(target) * width).index_copy(0, cells_N, reward_N)
        later_ST = grid_ST.view(-1, width).flip(1).cumsum(1).flip(1)
        reward_N = later_ST.flatten()[cells_N]
    return reward_N, known_N
