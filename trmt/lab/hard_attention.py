"""Hard attention: all weight on one source position, which training draws.

Axes: S sentence, T target position, Q queries, L source position, H heads, N target tokens of a batch in a
row, D hidden size.

    sampled   a position drawn from softmax(scores), learned with REINFORCE (Xu et al., arXiv 1502.03044)
    gumbel    the highest score after Gumbel noise, with the gradient of the softmax (Jang et al., arXiv
              1611.01144)

Decoding takes the highest score. For REINFORCE with a learned baseline (Williams 1992), a draw of position a
from p(a) is rewarded by r, the log probability of the next token, or of all tokens from there on where a draw
changes what comes later. Added to the loss are

    reinforce   -(r - b) log p(a)      b is the baseline, computed from what was known before the draw
    baseline    (r - b)^2 / 2
    entropy     -e H(p)

The token after the last one of a target is unknown to a network: that draw has no reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.errors import ConfigError
from trmt.nets.ragged import Ragged

CHUNK = 1024  # tokens whose logits are held at a time


def check_hard_attention(temperature: float, entropy: float) -> None:
    """Refuse options that are out of range."""
    if not 0 < temperature < math.inf:
        raise ConfigError(f"network.temperature = {temperature} is out of range; set it above 0")
    if not 0 <= entropy < math.inf:
        raise ConfigError(f"network.entropy = {entropy} is out of range; set it to at least 0")


@dataclass(frozen=True)
class Draw:
    """One position for each query; of a sampled one also its log probability and the entropy, over heads."""

    weights_SHQL: Tensor
    log_prob_SQ: Tensor | None = None
    entropy_SQ: Tensor | None = None


def draw(
    score_SHQL: Tensor, how: Literal["sampled", "gumbel"], temperature: float, *, training: bool
) -> Draw:
    """Draw a position for each query, or take that of the highest score."""
    if not training:
        return Draw(_one_hot(score_SHQL.argmax(-1), score_SHQL))
    if how == "gumbel":
        return Draw(F.gumbel_softmax(score_SHQL.float(), temperature, hard=True))
    log_SHQL = score_SHQL.float().log_softmax(-1)
    prob_SHQL = log_SHQL.exp()
    position_SHQ = prob_SHQL.detach().flatten(0, -2).multinomial(1).view(prob_SHQL.shape[:-1])
    log_prob_SQ = log_SHQL.gather(-1, position_SHQ[..., None])[..., 0].sum(1)
    # Where the probability is 0, minus infinity times zero would not be a number.
    entropy_SQ = -(prob_SHQL * log_SHQL.clamp(min=-1e4)).sum(-1).sum(1)
    return Draw(_one_hot(position_SHQ, score_SHQL), log_prob_SQ, entropy_SQ)


def _one_hot(position_SHQ: Tensor, like_SHQL: Tensor) -> Tensor:
    return torch.zeros_like(like_SHQL).scatter(-1, position_SHQ[..., None], 1.0)


def reinforce(
    readout: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    target: Ragged,
    draws: tuple[Tensor, Tensor, Tensor],
    *,
    changes_later: bool,
    entropy_weight: float,
) -> dict[str, Tensor]:
    """The losses of draws, as sums; `draws` are log probability, entropy and baseline of each token's [N]."""
    log_prob_N, entropy_N, baseline_N = draws
    reward_N, known_N = rewards(readout, hidden_ND.detach(), target, changes_later=changes_later)
    advantage_N = torch.where(known_N, reward_N - baseline_N.float(), 0.0)
    return {
        "reinforce": -(advantage_N.detach() * log_prob_N).sum(),
        "baseline": advantage_N.square().sum() / 2,
        "entropy": -entropy_weight * entropy_N.sum(),
    }


@torch.no_grad()
def rewards(
    readout: Callable[[Tensor], Tensor], hidden_ND: Tensor, target: Ragged, *, changes_later: bool
) -> tuple[Tensor, Tensor]:
    """The reward of each token's draw, and where there is one."""
    width = target.longest
    cells_N = target.cells_N(width)
    # The next token of the row, which at the end of a sentence is another sentence's.
    next_N = target.ids_N.roll(-1)
    known_N = torch.ones_like(next_N, dtype=torch.bool)
    known_N[target.lengths_S.cumsum(0) - 1] = False
    log_probs = [
        -F.cross_entropy(readout(chunk_ND).float(), chunk_N, reduction="none")
        for chunk_ND, chunk_N in zip(hidden_ND.split(CHUNK), next_N.split(CHUNK), strict=True)
    ]
    reward_N = torch.where(known_N, torch.cat(log_probs), 0.0)
    if changes_later:
        grid_ST = reward_N.new_zeros(len(target) * width).index_copy(0, cells_N, reward_N)
        later_ST = grid_ST.view(-1, width).flip(1).cumsum(1).flip(1)
        reward_N = later_ST.flatten()[cells_N]
    return reward_N, known_N
