"""Hard attention over the source: every head of every layer sees one place, as trmt/nets/focus.py draws it.

Axes: S sentence, Q queries, L source position, T target position, N target tokens of a batch in a row,
M source tokens in a row, H heads, P width of one head, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trmt.errors import ConfigError
from trmt.lab.reinforce import Draw, reinforced
from trmt.nets import attention, layers
from trmt.nets.attention import Spans
from trmt.nets.base import Ragged
from trmt.nets.focus import AttentionConfig, Glance, weigh


@dataclass(frozen=True, kw_only=True)
class FocusConfig:
    """Where a decoder's layers look."""

    cross_focus: Literal["soft", "sampled", "gumbel"] = "soft"  # the hard ones as in focus.py
    attention_dropout: float = 0.0
    temperature: float = 1.0  # of Gumbel's softmax
    entropy: float = 0.01  # how much sampled looks are rewarded for keeping their minds open

    def check_focus(self) -> None:
        """Refuse what does not go together."""
        if self.cross_focus != "soft" and self.attention_dropout:
            raise ConfigError(
                f'cross_focus = "{self.cross_focus}" looks at one place, of which attention_dropout = '
                f"{self.attention_dropout} would leave nothing; set one to its default"
            )
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"network.temperature = {self.temperature} is out of range; set it above 0")
        if not 0 <= self.entropy < math.inf:
            raise ConfigError(f"network.entropy = {self.entropy} is out of range; set it to at least 0")


def look(
    config: Any,
    query_SHQP: Tensor,
    key_SHLP: Tensor,
    value_SHLP: Tensor,
    mask: Tensor,
    *,
    training: bool = False,
) -> Glance:
    """A look at one place for each head: drawn in training, the likeliest in translating."""
    # So exact that no order of adding up makes another place the likeliest.
    exact = not training and query_SHQP.device.type == "cpu"
    query, key = (x.double() if exact else x for x in (query_SHQP, key_SHLP))
    score_SHQL = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1]) + mask
    focus = AttentionConfig(focus=config.cross_focus, temperature=config.temperature)
    weights, log_drawn, entropy = weigh(focus, score_SHQL, training=training)
    context_SHQP = weights.to(value_SHLP.dtype) @ value_SHLP
    return Glance(context_SHQP.transpose(1, 2).flatten(2), weights.float(), log_drawn, entropy)


class Glances:
    """The looks of all layers at the sources of a batch, in training."""

    def __init__(self, net: Any, spans: Spans, over: Spans) -> None:
        self.net, self.config, self.spans, self.over = net, net.config, spans, over
        self.glances: list[Glance] = []
        self.first_ND: Tensor | None = None  # the queries of the first layer, before anything is drawn

    def over_row(self, query_ND: Tensor, memory_M2D: Tensor) -> Tensor:
        """What the next layer finds, in a row: [N, D]."""
        if self.first_ND is None:
            self.first_ND = query_ND.detach()
        heads = self.config.heads
        query_NHP = query_ND.unflatten(-1, (heads, -1))
        key_MHP, value_MHP = memory_M2D.unflatten(-1, (2, heads, -1)).unbind(1)

        def at_one_place(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            self.glances.append(look(self.config, query, key, value, mask, training=self.net.training))
            return self.glances[-1].context_SQD

        parts = (query_NHP, key_MHP, value_MHP)
        return attention.attend_in_grid(parts, self.spans, self.over, causal=False, look=at_one_place)

    @property
    def weights(self) -> list[Tensor]:
        """Where each layer looked: [S, H, T, L]."""
        return [glance.weights_SHQL for glance in self.glances]

    def losses(
        self, readout: Callable[[Tensor], Tensor], hidden_ND: Tensor, target: Ragged
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        """What drawing costs; nothing where a gradient goes through it."""
        drawn = [glance.log_drawn_SQ for glance in self.glances if glance.log_drawn_SQ is not None]
        entropy = [glance.entropy_SQ for glance in self.glances if glance.entropy_SQ is not None]
        if not drawn or self.first_ND is None:
            return {}
        cells_N = target.cells_N(max(self.spans.longest, 1))
        log_drawn_N, entropy_N = (torch.stack(each).sum(0).flatten()[cells_N] for each in (drawn, entropy))
        draw = Draw(log_drawn_N, entropy_N, self.net.baseline(self.first_ND)[..., 0])
        # From the second layer on, tokens look back at what those before them have found.
        lasting = self.config.decoder_layers > 1
        return reinforced(readout, hidden_ND, target, draw, lasting=lasting, entropy=self.config.entropy)


def over_grid(config: Any, query_SHQP: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """What a layer finds in translating: [S, Q, D]."""
    return look(config, query_SHQP, key, value, mask).context_SQD


def weights_over(config: Any, query_SHQP: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Where it looks: [S, H, Q, L]."""
    if config.cross_focus == "soft":
        return layers.attention_weights(query_SHQP, key, mask)
    return look(config, query_SHQP, key, key, mask).weights_SHQL
