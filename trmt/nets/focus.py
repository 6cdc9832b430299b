"""Where attention looks, given how alike everything is: everywhere, in a window, or at one place.

Axes: S sentence, Q queries, L source position, H heads, D width, P width of one head.

    soft         a = softmax(scores)
    monotonic    the same within a window around the position of the target word (Luong et al.,
                 arXiv 1508.04025)
    predictive   the same within a window around p = (length - 1) * sigmoid(v . tanh(W q)), times
                 exp(-(s - p)^2 / (2 (reach / 2)^2)), made a distribution again (Luong et al.)
    sampled      one place, drawn from softmax(scores) and reinforced by how well the word was told from
                 it (Xu et al., arXiv 1502.03044); translating takes the likeliest
    gumbel       one place, the likeliest after Gumbel noise, with the gradient of the softmax (Jang et
                 al., arXiv 1611.01144); translating takes the likeliest
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.nets import layers, scores
from trmt.nets.base import Memory
from trmt.nets.scores import Score, Similarity

SMALL = 400  # multiplications of a product that torch 2.13 makes without a library for matrices

Focus = Literal["soft", "monotonic", "predictive", "sampled", "gumbel"]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How a decoder looks at the states of an encoder."""

    width: int = 512
    longest: int = 1024  # places there are for the score "location", and a limit for translations
    score: Score = "additive"
    focus: Focus = "soft"
    heads: int = 1
    static: bool = False  # look once, with the decoder's first state, and not at each step
    reach: int = 10  # of the windows, to each side
    temperature: float = 1.0  # of Gumbel's softmax
    entropy: float = 0.01  # how much sampled looks are rewarded for keeping their minds open

    def check_attention(self) -> None:
        """Refuse what does not go together."""
        if self.width % self.heads:
            raise ConfigError(f"width = {self.width} cannot be divided into heads = {self.heads}; change one")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"network.temperature = {self.temperature} is out of range; set it above 0")
        if not 0 <= self.entropy < math.inf:
            raise ConfigError(f"network.entropy = {self.entropy} is out of range; set it to at least 0")
        if self.static and self.focus in ("monotonic", "sampled"):
            raise ConfigError(
                f'static = true looks once, focus = "{self.focus}" anew for each target token; change one'
            )


@dataclass(frozen=True)
class Glance:
    """What a look at the source found, and how it went about it."""

    context_SQD: Tensor
    weights_SHQL: Tensor
    log_drawn_SQ: Tensor | None = None  # log probability of the places that were drawn
    entropy_SQ: Tensor | None = None  # of what they were drawn from


Look = Callable[[Any, Any, Tensor, Tensor, Memory], Glance]  # (net, config, query, position, memory)


class Attention(nn.Module):
    """What a look at the source learns."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        width = config.width
        self.similarity = Similarity(config.score, width, config.heads, config.longest)
        if config.heads > 1:
            self.value = layers.xavier(nn.Linear(width, width))
        if config.focus == "predictive":
            self.place = layers.xavier(nn.Linear(width, width))
            self.pointer = nn.Parameter(torch.randn(width) * width**-0.5)


class Pooling(nn.Module):
    """Many vectors in one by attention with a query that is learned (Yang et al., NAACL 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.key = layers.xavier(nn.Linear(width, width))
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)


def pooled(net: Any, states_SLD: Tensor, real_SL: Tensor) -> Tensor:
    """The mean of the real states, weighted by how alike they are to the learned query: [S, D]."""
    score_SL = (torch.tanh(net.key(states_SLD)) * net.query).sum(-1) + layers.blocked(real_SL)
    return average(score_SL.softmax(-1), states_SLD)


def average(weights_SL: Tensor, states_SLD: Tensor) -> Tensor:
    """The sum of the states with these weights: [S, D]."""
    rows = -(-SMALL // (layers.KEY_MULTIPLE * states_SLD.shape[-1]))  # as in `steady`
    weights_SQL = weights_SL[:, None].to(states_SLD.dtype).expand(-1, rows, -1)
    return (weights_SQL @ states_SLD)[:, 0]


def prepared(
    net: Any, config: AttentionConfig, states_SLD: Tensor, real_SL: Tensor
) -> tuple[dict[str, Tensor], dict[str, tuple[int, float]]]:
    """What of a source is the same for every look, and along which axes it runs."""
    if states_SLD.shape[1] > config.longest and config.score == "location":
        longest = int(real_SL.sum(1).max())
        if longest > config.longest:
            raise ConfigError(
                f'a source has {longest} pieces, score = "location" places for longest = {config.longest}; '
                "set network.longest higher or choose another score"
            )
    key_SHLP = scores.keys(net.similarity, config.score, states_SLD, config.heads)
    value_SLD = net.value(states_SLD) if config.heads > 1 else states_SLD
    tensors = {
        "keys": key_SHLP,
        "values": layers.heads(value_SLD, config.heads),
        "mask": layers.blocked(real_SL)[:, None, None],
        "lengths": real_SL.sum(1),
    }
    return tensors, {"keys": (2, 0.0), "values": (2, 0.0), "mask": (3, -math.inf)}


def steady(look: Look) -> Look:
    """The look that gives a query the same bits whatever the length of its source is padded to.

    On the CPU, torch multiplies batches of small matrices in another way than larger ones; rows of zeros
    make them large enough. In training that would only cost time.
    """

    def steadied(net: Any, config: Any, query_SQD: Tensor, position_SQ: Tensor, memory: Memory) -> Glance:
        count, part = query_SQD.shape[1], min(query_SQD.shape[-1] // config.heads, layers.KEY_MULTIPLE)
        missing = -(-SMALL // (layers.KEY_MULTIPLE * part)) - count
        if getattr(net, "training", False) or missing <= 0:
            return look(net, config, query_SQD, position_SQ, memory)
        query_SQD, position_SQ = F.pad(query_SQD, (0, 0, 0, missing)), F.pad(position_SQ, (0, missing))
        glance = look(net, config, query_SQD, position_SQ, memory)
        return Glance(glance.context_SQD[:, :count], glance.weights_SHQL[:, :, :count])

    return steadied


@steady
def look(
    net: Any,
    config: AttentionConfig,
    query_SQD: Tensor,
    position_SQ: Tensor,
    memory: Memory,
) -> Glance:
    """Look at a source with a network's attention, from queries at these positions of the target."""
    score_SHQL = scores.scores(net.attention.similarity, config.score, query_SQD, memory["keys"])
    score_SHQL = score_SHQL + memory["mask"]
    if config.focus in ("monotonic", "predictive"):
        score_SHQL = score_SHQL + _window(net.attention, config, query_SQD, position_SQ, memory)
    weights, log_drawn, entropy = weigh(config, score_SHQL, training=getattr(net, "training", False))
    context_SQD = (weights.to(memory["values"].dtype) @ memory["values"]).transpose(1, 2).flatten(2)
    return Glance(context_SQD, weights, log_drawn, entropy)


def _window(net: Any, config: AttentionConfig, query_SQD: Tensor, position_SQ: Tensor, memory: Any) -> Tensor:
    """What a window adds to the scores: [S, 1, Q, L]."""
    end_S1 = (memory["lengths"] - 1)[:, None]
    place_L = torch.arange(memory["keys"].shape[2], device=query_SQD.device)
    if config.focus == "monotonic":
        # A translation longer than its source ends up looking at the end.
        away_SQL = place_L - torch.minimum(position_SQ, end_S1)[..., None]
        return layers.blocked(away_SQL.abs() <= config.reach)[:, None]
    pointed_SQ = (torch.tanh(net.place(query_SQD)) * net.pointer).sum(-1)
    # The CPU's last numbers of an odd count come from another sigmoid: with 16 of each there are none.
    share_SQ = pointed_SQ.float()[..., None].repeat(1, 1, layers.KEY_MULTIPLE).sigmoid()[..., 0]
    away_SQL = place_L - (end_S1 * share_SQ)[..., None]
    bell_SQL = -2 * (away_SQL / config.reach) ** 2
    return (bell_SQL + layers.blocked(away_SQL.abs() <= config.reach))[:, None]


def weigh(
    config: AttentionConfig, score_SHQL: Tensor, *, training: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The weights of the places; of drawn ones, also their log probability and the entropy [S, Q]."""
    if config.focus not in ("sampled", "gumbel"):
        return score_SHQL.softmax(-1), None, None
    if not training:
        return _one(score_SHQL.argmax(-1), score_SHQL), None, None
    if config.focus == "gumbel":
        drawn: Any = F.gumbel_softmax(score_SHQL.float(), config.temperature, hard=True)
        return drawn, None, None
    log_SHQL = score_SHQL.float().log_softmax(-1)
    share_SHQL = log_SHQL.exp()
    place_SHQ = share_SHQL.detach().flatten(0, -2).multinomial(1).view(share_SHQL.shape[:-1])
    log_drawn_SQ = log_SHQL.gather(-1, place_SHQ[..., None])[..., 0].sum(1)
    # Where nothing can be drawn, minus infinity times zero would not be a number.
    entropy_SQ = -(share_SHQL * log_SHQL.clamp(min=-1e4)).sum(-1).sum(1)
    return _one(place_SHQ, score_SHQL), log_drawn_SQ, entropy_SQ


def _one(place_SHQ: Tensor, like_SHQL: Tensor) -> Tensor:
    """All weight at one place."""
    return torch.zeros_like(like_SHQL).scatter(-1, place_SHQ[..., None], 1.0)
