"""A Transformer with hard cross-attention: every head of every decoder layer attends to one source position.

Axes: S sentence, Q queries, L source position, T target position, N target tokens of a batch in a row,
M source tokens in a row, H heads, P head dimension, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.lab.hard_attention import Draw, check_hard_attention, draw, reinforce
from trmt.nets import layers
from trmt.nets.base import NO_WEIGHTS, Output, WantedWeights, stack_weights
from trmt.nets.layers import Spans
from trmt.nets.ragged import Ragged, Source
from trmt.nets.transformer import Transformer, TransformerConfig, Weights


@dataclass(frozen=True, kw_only=True)
class HardCrossAttentionConfig(TransformerConfig):
    """The sizes and options of a Transformer with hard cross-attention."""

    cross_attention: Literal["sampled", "gumbel"] = "gumbel"  # how positions are drawn
    temperature: float = 1.0  # of Gumbel's softmax
    entropy: float = 0.01  # the weight of the entropy of sampled positions, which is rewarded
    not_rates: ClassVar[tuple[str, ...]] = ("temperature", "entropy")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hard_attention(self.temperature, self.entropy)
        if self.attention_dropout:
            raise ConfigError(
                f'cross_attention = "{self.cross_attention}" attends to one position, of which '
                f"attention_dropout = {self.attention_dropout} would leave nothing; set it to 0"
            )


class HardCrossAttention(Transformer):
    """A Transformer with hard cross-attention."""

    config: HardCrossAttentionConfig
    config_class = HardCrossAttentionConfig

    def __init__(self, config: HardCrossAttentionConfig) -> None:
        super().__init__(config)
        if config.cross_attention == "sampled":
            self.baseline = nn.Linear(config.d_model, 1)

    def packs_attention(self, device: torch.device, dtype: torch.dtype) -> bool:
        return False  # cross-attention is computed in grids

    @property
    def counts_tokens(self) -> bool:
        return self.couples_batch or self.config.cross_attention == "sampled"

    def draw(self, query_SHQP: Tensor, key_SHLP: Tensor, mask: Tensor) -> Draw:
        """One position for each query and head."""
        # In inference so exact that no order of sums makes another position the likeliest
        exact = not self.training and query_SHQP.device.type == "cpu"
        query, key = (x.double() if exact else x for x in (query_SHQP, key_SHLP))
        score_SHQL = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1]) + mask
        how, temperature = self.config.cross_attention, self.config.temperature
        return draw(score_SHQL, how, temperature, training=self.training)

    def forward(self, source: Source, target: Ragged, *, want: WantedWeights = NO_WEIGHTS) -> Output:
        heads, layers_ = self.config.heads, self.config.decoder_layers
        spans, source_spans, position_N = Spans.of(target), Spans.of(source), target.positions_N()
        encoder: Weights = [] if want.encoder else None
        decoder: Weights = [] if want.decoder else None
        kv_M2D = self.cross_kv(self.encode_packed(source, weights=encoder)).chunk(layers_, -1)
        draws: list[Draw] = []
        queries: list[Tensor] = []

        def self_attention(layer: int, qkv_N3D: Tensor) -> Tensor:
            return self.packed_self_attention(layer, qkv_N3D, position_N, spans, causal=True, weights=decoder)

        def grid(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            draws.append(self.draw(query, key, mask))
            return attend_hard(draws[-1], value)

        def cross_attention(layer: int, query_ND: Tensor) -> Tensor:
            queries.append(query_ND)
            key_MHP, value_MHP = kv_M2D[layer].unflatten(-1, (2, heads, -1)).unbind(1)
            query_NHP = query_ND.unflatten(-1, (heads, -1))
            qkv = query_NHP, key_MHP, value_MHP
            return layers.attend_padded(*qkv, spans, source_spans, causal=False, grid=grid)

        hidden_ND = self.decoder(target.ids_N, position_N, self_attention, cross_attention)
        # The baseline is computed from the queries of the first layer, before anything is drawn.
        aux = self.losses(hidden_ND, target, draws, queries[0].detach())
        cross = [each.weights_SHQL.float() for each in draws] if want.cross_layers(layers_) else []
        weights = (stack_weights(each or ()) for each in (cross, encoder, decoder))
        return Output(hidden_ND, aux, *weights)

    def losses(
        self, hidden_ND: Tensor, target: Ragged, draws: list[Draw], query_ND: Tensor
    ) -> dict[str, Tensor]:
        """The losses of sampled positions."""
        log_probs = [each.log_prob_SQ for each in draws if each.log_prob_SQ is not None]
        entropies = [each.entropy_SQ for each in draws if each.entropy_SQ is not None]
        if not log_probs:
            return {}
        cells_N = target.cells_N(max(target.longest, 1))
        log_prob_N, entropy_N = (
            torch.stack(each).sum(0).flatten()[cells_N] for each in (log_probs, entropies)
        )
        # From the second layer on, self-attention carries what was drawn to later tokens.
        return reinforce(
            self.readout,
            hidden_ND,
            target,
            (log_prob_N, entropy_N, self.baseline(query_ND)[..., 0]),
            changes_later=self.config.decoder_layers > 1,
            entropy_weight=self.config.entropy,
        )

    def grid_cross_attention(self, query_SHQP: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        return attend_hard(self.draw(query_SHQP, key, mask), value)


def attend_hard(drawn: Draw, value_SHLP: Tensor) -> Tensor:
    """The values of the positions that were drawn, heads joined: [S, Q, D]."""
    out_SHQP = drawn.weights_SHQL.to(value_SHLP.dtype) @ value_SHLP
    return out_SHQP.transpose(1, 2).flatten(2)
