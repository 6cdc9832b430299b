"""Translation: predict each target token from the source and the tokens before it.

Axes: N all target tokens of a batch in a row, V vocabulary, D width.

The loss of a token with label smoothing e (arXiv 1512.00567) is

    (1 - e) * -log p(y)  +  e / V * sum over the vocabulary of -log p(v)

with V the tokenizer's vocabulary. Padding never gets here: hidden states have a row for each real token,
and `readout` has a column for each real id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trmt.arch.base import Ragged, Seq2Seq, Source
from trmt.batches import Column, Examples
from trmt.errors import ConfigError
from trmt.objectives.base import Loss, Objective, Specials


@dataclass(frozen=True, kw_only=True)
class TranslationConfig:
    """The options of the translation loss."""

    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"loss.label_smoothing = {self.label_smoothing} is out of range; set it from 0 to below 1"
            )


@dataclass(frozen=True)
class TranslationBatch:
    """A batch as the network wants it: the target twice, shifted by one."""

    source: Source
    before: Ragged  # begins with bos
    after_N: Tensor  # ends with eos


class Translation(Objective):
    """Label-smoothed cross-entropy of the target."""

    config_class = TranslationConfig

    def __init__(self, config: TranslationConfig, specials: Specials) -> None:
        self.config, self.specials = config, specials

    def tokens(self, examples: Examples) -> int:
        column = examples.columns["target.ids"]
        return int(column.lengths.sum()) + len(column.lengths)  # each sentence ends with eos

    def collate(self, examples: Examples, device: torch.device) -> TranslationBatch:
        source, target = examples.columns["source.ids"], examples.columns["target.ids"]
        ends = np.cumsum(target.lengths)
        before = _inserted(target, ends - target.lengths, self.specials.bos)
        after = _inserted(target, ends, self.specials.eos)
        source = _inserted(source, np.cumsum(source.lengths), self.specials.eos)
        return TranslationBatch(
            Source(*_tensors(source)).to(device, non_blocking=True),
            Ragged(*_tensors(before)).to(device, non_blocking=True),
            torch.from_numpy(after.ids).to(device, non_blocking=True),
        )

    def loss(self, net: Seq2Seq, batch: TranslationBatch) -> Loss:
        output = net(batch.source, batch.before)
        if output.aux:
            raise ConfigError(
                f"the network has losses of its own ({', '.join(sorted(output.aux))}), which the objective "
                "translation does not add up; choose another objective or network"
            )
        logits_NV = net.readout(output.hidden).float()
        smoothed: Any = SmoothedCrossEntropy.apply  # torch leaves it untyped
        total, nll = smoothed(logits_NV, batch.after_N, self.config.label_smoothing)
        return Loss(total, nll.detach(), batch.after_N.shape[0])


class SmoothedCrossEntropy(torch.autograd.Function):
    """The loss of the file's head and the plain negative log likelihood, both summed.

    Written by hand because composed operations would go over the [N, V] logits three more times.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_N: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        lse_N = logits_NV.logsumexp(1)
        nll_N = lse_N - logits_NV.gather(1, target_N[:, None])[:, 0]
        spread_N = lse_N - logits_NV.mean(1)
        ctx.save_for_backward(logits_NV, lse_N, target_N)
        ctx.smoothing = smoothing
        nll = nll_N.sum()
        ctx.mark_non_differentiable(nll)
        return (1 - smoothing) * nll + smoothing * spread_N.sum(), nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, lse_N, target_N = ctx.saved_tensors
        smoothing = ctx.smoothing
        out_NV = (logits_NV - lse_N[:, None]).exp_()
        out_NV.sub_(smoothing / out_NV.shape[1])
        out_NV.scatter_add_(
            1, target_N[:, None], torch.full_like(target_N[:, None], smoothing - 1, dtype=out_NV.dtype)
        )
        return out_NV.mul_(grad), None, None


def _inserted(column: Column, places: np.ndarray, token: int) -> Column:
    """Every sentence one longer, with `token` at the given places of the row."""
    return Column(np.insert(column.ids.astype(np.int64), places, token), column.lengths + 1)


def _tensors(column: Column) -> tuple[Tensor, Tensor, int]:
    lengths = column.lengths.astype(np.int64)
    return torch.from_numpy(column.ids), torch.from_numpy(lengths), int(lengths.max())
