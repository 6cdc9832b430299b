"""Other losses between predicted and true distributions than the negative log likelihood.

Both compare the network's distribution p with the smoothed one q of the target y, where q(v) is e / V for
each of the V tokens and 1 - e more for y (arXiv 1512.00567). With e = 0 all of q is at y.

Axes: N all target tokens of a batch in a row, C tokens of one chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trmt.nets.base import Seq2Seq
from trmt.objectives.translation import TranslationConfig, TranslationObjective

CHUNK_BYTES = 1 << 26  # of logits that are held at a time


class Divergence(TranslationObjective):
    """The Kullback-Leibler divergence D(q || p): smoothed cross-entropy less the entropy of q.

    Its gradient is that of the cross-entropy; its value is 0 where the network predicts q itself.
    """

    def distance(self, net: Seq2Seq, hidden_ND: Tensor, after_N: Tensor) -> tuple[Tensor, Tensor]:
        total, nll = super().distance(net, hidden_ND, after_N)
        with torch.no_grad():
            vocabulary = net.readout(hidden_ND[:1]).shape[-1]
        return total - entropy(vocabulary, self.config.label_smoothing) * (after_N >= 0).sum(), nll


def entropy(vocabulary: int, smoothing: float) -> float:
    """The entropy of the smoothed distribution of a target, in nats."""
    rest = smoothing / vocabulary
    masses = [(1 - smoothing + rest, 1), (rest, vocabulary - 1)]
    return -sum(count * mass * math.log(mass) for mass, count in masses if mass)


@dataclass(frozen=True, kw_only=True)
class SquaredDistanceConfig(TranslationConfig):
    """The options of the squared distance."""

    label_smoothing: float = 0.0


class SquaredDistance(TranslationObjective):
    """The sum over the vocabulary of (p(v) - q(v))^2, the score of Brier (1950).

    It is at most 2 for a token: tokens that cannot be predicted weigh less than in the cross-entropy.
    """

    config_class = SquaredDistanceConfig

    def distance(self, net: Seq2Seq, hidden_ND: Tensor, after_N: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            vocabulary = net.readout(hidden_ND[:1]).shape[-1]
        size = max(CHUNK_BYTES // (4 * vocabulary), 8)

        def chunk(hidden_CD: Tensor, after_C: Tensor) -> Tensor:
            return squared_distance(net.readout(hidden_CD), after_C, self.config.label_smoothing)

        # Logits are computed again in the backward pass, so that those of a whole batch are never held.
        sums = [
            checkpoint(
                chunk,
                hidden_ND[begin : begin + size],
                after_N[begin : begin + size],
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for begin in range(0, hidden_ND.shape[0], size)
        ]
        total, nll = torch.stack(sums).sum(0).unbind(0)
        return total, nll.detach()


def squared_distance(logits_CV: Tensor, target_C: Tensor, smoothing: float) -> Tensor:
    """The sums of squared distances and of negative log likelihoods; negative targets are left out."""
    log_CV = logits_CV.float().log_softmax(-1)
    real_C = target_C >= 0
    index_C1 = target_C.clamp(min=0)[:, None]
    prob_CV = log_CV.exp()
    # Expanded, the square needs no q, whose values are all the same but for one.
    base, peak = smoothing / log_CV.shape[1], 1 - smoothing
    prob_C = prob_CV.gather(1, index_C1)[:, 0]
    distance_C = (prob_CV - base).square().sum(1) - 2 * peak * (prob_C - base) + peak * peak
    nll_C = -log_CV.gather(1, index_C1)[:, 0]
    return torch.stack([distance_C.where(real_C, 0.0).sum(), nll_C.where(real_C, 0.0).sum()])
