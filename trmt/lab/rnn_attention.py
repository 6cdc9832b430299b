"""A recurrent encoder-decoder with attention of other kinds: other scores, windows, one position, only once.

Axes: S sentence, Q queries, L source position, T target position, N target tokens of a batch in a row,
H heads, P head dimension, D hidden size.

Scores of a decoder state q with an encoder state k, beside those of trmt/nets/rnn.py:

    cosine       b q . k / (|q| |k|)            (Graves et al., arXiv 1410.5401; b is learned)
    location     the row of W q for the position of k           (Luong et al., arXiv 1508.04025)

Attention:

    soft         softmax(scores)
    monotonic    the same within a window around the position of the target token (Luong et al.)
    predictive   the same within a window around p = (length - 1) * sigmoid(v . tanh(W q)), times
                 exp(-(s - p)^2 / (2 (window / 2)^2)), normalised (Luong et al.)
    sampled, gumbel   one position is drawn, as in hard_attention.py

With attend_once there is attention of the decoder's first state only, and the context of every step is its
result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.lab.hard_attention import check_hard_attention, draw, reinforce
from trmt.nets import layers
from trmt.nets.base import NO_WEIGHTS, EncoderMemory, Output, WantedWeights
from trmt.nets.layers import KEY_MULTIPLE, split_heads, xavier
from trmt.nets.ragged import Ragged, Source
from trmt.nets.rnn import RNN, Attended, Attention, Encoded, RNNConfig, weighted_values

SHARPNESS = 5.0  # where the factor of cosines begins: a cosine alone cannot tell ten tokens apart


@dataclass(frozen=True, kw_only=True)
class RNNAttentionConfig(RNNConfig):
    """The sizes and options of a recurrent encoder-decoder with attention of any kind."""

    score: Literal["additive", "general", "dot", "scaled", "cosine", "location"] = "additive"  # type: ignore[assignment]
    # over all positions, in a window around the target position or a predicted one, or of one drawn position
    attention: Literal["soft", "monotonic", "predictive", "sampled", "gumbel"] = "soft"
    attend_once: bool = False  # attention of the decoder's first state only
    window: int = 10  # positions on each side that windows cover
    temperature: float = 1.0  # of Gumbel's softmax
    entropy: float = 0.01  # the weight of the entropy of sampled positions, which is rewarded
    not_rates: ClassVar[tuple[str, ...]] = ("temperature", "entropy")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hard_attention(self.temperature, self.entropy)
        if self.attend_once and self.attention in ("monotonic", "sampled"):
            raise ConfigError(
                f'attend_once = true attends once and attention = "{self.attention}" anew for each token; '
                "change one"
            )
        if self.context != "attention" and (self.attention != "soft" or self.attend_once):
            name = "attend_once = true" if self.attend_once else f'attention = "{self.attention}"'
            raise ConfigError(
                f'{name} needs attention, and context = "{self.context}" has none; set context = "attention"'
            )

    @property
    def attends(self) -> bool:
        return super().attends and not self.attend_once

    @property
    def constant_context(self) -> bool:
        return super().constant_context or (self.attend_once and self.attention_step == "before")


@dataclass(frozen=True)
class SampledAttended(Attended):
    """The result of attention to sampled positions."""

    log_prob_SQ: Tensor
    entropy_SQ: Tensor
    baseline_SQ: Tensor


class AnyAttention(Attention):
    """Attention of any kind."""

    def __init__(self, config: RNNAttentionConfig) -> None:
        super().__init__(config)
        self.config = config
        d_model = config.d_model
        if config.score == "cosine":
            self.sharpness = nn.Parameter(torch.full((config.heads, 1, 1), SHARPNESS))
        if config.score == "location":
            self.location = xavier(nn.Linear(d_model, config.heads * config.max_positions))
        if config.attention == "predictive":
            self.centre = xavier(nn.Linear(d_model, d_model))
            self.centre_vector = nn.Parameter(torch.randn(d_model) * d_model**-0.5)
        if config.attention == "sampled":
            self.baseline = nn.Linear(d_model, 1)

    def prepare(self, states_SLD: Tensor, real_SL: Tensor) -> EncoderMemory:
        lengths_S = real_SL.sum(1)
        if self.score == "location" and states_SLD.shape[1] > self.config.max_positions:
            longest = int(lengths_S.max())
            if longest > self.config.max_positions:
                raise ConfigError(
                    f'a source has {longest} tokens, score = "location" positions for '
                    f"{self.config.max_positions}; set network.max_positions higher or choose another score"
                )
        memory = super().prepare(states_SLD, real_SL)
        tensors = {**memory.tensors, "lengths": lengths_S}
        if self.score == "cosine":
            tensors["keys"] = unit_length(tensors["keys"])
        return EncoderMemory(tensors, memory.source_axes)

    def scores(self, query_SQD: Tensor, key_SHLP: Tensor) -> Tensor:
        if self.score == "location":
            row_SHQL = split_heads(self.location(query_SQD), self.heads)
            # A source may be padded beyond the last position there is; padding is masked.
            length = key_SHLP.shape[2]
            return F.pad(row_SHQL, (0, max(length - row_SHQL.shape[-1], 0)))[..., :length]
        if self.score == "cosine":
            query_SHQP = unit_length(split_heads(query_SQD, self.heads)) * self.sharpness
            return query_SHQP @ key_SHLP.transpose(-2, -1)
        return super().scores(query_SQD, key_SHLP)

    def attend(self, query_SQD: Tensor, position_SQ: Tensor, memory: EncoderMemory) -> Attended:
        how = self.config.attention
        score_SHQL = self.scores(query_SQD, memory["keys"]) + memory["mask"]
        if how == "sampled" or how == "gumbel":
            drawn = draw(score_SHQL, how, self.config.temperature, training=self.training)
            context_SQD = weighted_values(drawn.weights_SHQL, memory)
            if drawn.log_prob_SQ is None or drawn.entropy_SQ is None:
                return Attended(context_SQD, drawn.weights_SHQL)
            baseline_SQ = self.baseline(query_SQD.detach())[..., 0]
            samples = drawn.log_prob_SQ, drawn.entropy_SQ, baseline_SQ
            return SampledAttended(context_SQD, drawn.weights_SHQL, *samples)
        if how != "soft":
            score_SHQL = score_SHQL + self.window_scores(query_SQD, position_SQ, memory)
        weights_SHQL = score_SHQL.softmax(-1)
        return Attended(weighted_values(weights_SHQL, memory), weights_SHQL)

    def window_scores(self, query_SQD: Tensor, position_SQ: Tensor, memory: EncoderMemory) -> Tensor:
        """What a window adds to scores: [S, 1, Q, L]."""
        end_S1, window = (memory["lengths"] - 1)[:, None], self.config.window
        position_L = torch.arange(memory["keys"].shape[2], device=query_SQD.device)
        if self.config.attention == "monotonic":
            # A translation longer than its source stays at the end of it.
            away_SQL = position_L - torch.minimum(position_SQ, end_S1)[..., None]
            return layers.additive_mask(away_SQL.abs() <= window)[:, None]
        centre_SQ = (torch.tanh(self.centre(query_SQD)) * self.centre_vector).sum(-1)
        # On the CPU, the last numbers of an odd count come from another sigmoid: of 16 each there are none.
        share_SQ = centre_SQ.float()[..., None].repeat(1, 1, KEY_MULTIPLE).sigmoid()[..., 0]
        away_SQL = position_L - (end_S1 * share_SQ)[..., None]
        bell_SQL = -2 * (away_SQL / window) ** 2
        return (bell_SQL + layers.additive_mask(away_SQL.abs() <= window))[:, None]


def unit_length(x: Tensor) -> Tensor:
    """Vectors of length one; zeros stay zeros."""
    return F.normalize(x, dim=-1, eps=max(1e-12, torch.finfo(x.dtype).tiny))


class RNNAttention(RNN):
    """A recurrent encoder-decoder with attention of any kind."""

    config: RNNAttentionConfig
    config_class = RNNAttentionConfig
    attention_class: type[Attention] = AnyAttention

    @property
    def counts_tokens(self) -> bool:
        return self.config.attention == "sampled"

    def begin(self, states_SLD: Tensor, real_SL: Tensor, memory: EncoderMemory) -> Encoded:
        memory, states = super().begin(states_SLD, real_SL, memory)
        if self.config.attend_once:
            query_S1D = states[-1][0][:, None]
            position_S1 = torch.zeros(query_S1D.shape[:2], dtype=torch.long, device=query_S1D.device)
            attended = self.attention(query_S1D, position_S1, memory)
            # Of the source nothing else is needed any more.
            tensors = {"context": attended.context_SQD[:, 0], "weights": attended.weights_SHQL}
            memory = EncoderMemory(tensors, {"weights": (3, 0.0)})
        return memory, states

    def forward(self, source: Source, target: Ragged, *, want: WantedWeights = NO_WEIGHTS) -> Output:
        hidden_ND, attended, memory = self.teacher_forced(source, target)
        weights = [each.weights_SHQL for each in attended]
        if self.config.attend_once:
            weights = [memory["weights"].expand(-1, -1, target.longest, -1)]
        samples = [each for each in attended if isinstance(each, SampledAttended)]
        return Output(
            hidden_ND,
            self.losses(hidden_ND, target, samples) if samples else {},
            torch.cat(weights, 2)[None] if want.cross and weights else None,
        )

    def losses(self, hidden_ND: Tensor, target: Ragged, samples: list[SampledAttended]) -> dict[str, Tensor]:
        """The losses of sampled positions."""
        cells_N = target.cells_N(target.longest)
        columns = zip(
            *((each.log_prob_SQ, each.entropy_SQ, each.baseline_SQ) for each in samples), strict=True
        )
        log_prob_N, entropy_N, baseline_N = (torch.cat(column, 1).flatten()[cells_N] for column in columns)
        return reinforce(
            self.readout,
            hidden_ND,
            target,
            (log_prob_N, entropy_N, baseline_N),
            changes_later=self.config.stepwise,
            entropy_weight=self.config.entropy,
        )
