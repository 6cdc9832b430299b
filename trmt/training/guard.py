"""Whether a step is any good: decided on the device, where the numbers are; the host hears of it later.

A gradient that is not finite, or far above what gradients were in the steps before, is left out by the
optimiser's own kernel, which leaves weights and moments untouched where it is told of an infinity. So a
step never makes the host wait for the device; it reads the verdicts of many steps at once, before it logs
or saves. Clipping and the loss scale of half precision are one factor in the same kernel.

A spike is a value above the median of the last `WINDOW` steps by more than `DEVIATIONS` robust standard
deviations, and by more than a margin in which nothing is remarkable. Medians cannot be moved by the spikes
themselves, and follow where the level changes for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WINDOW = 128  # steps that say what is usual
ENOUGH = 64  # of them, before anything is called a spike
DEVIATIONS = 8.0
FROM_MAD = 1.4826  # from the median absolute deviation to the standard deviation of a normal distribution
# Natural logarithm of the gradient's norm (ten times the usual), loss in nats per token.
MARGINS = (2.3, 1.0)

FIRST_SCALE, SCALE_STEPS = 2.0**16, 2000  # of half precision: where to begin, finite steps until it doubles

NOT_FINITE, STEEP, HIGH = 1, 2, 4  # what may be said against a step: bits of a verdict


@dataclass(frozen=True)
class Verdict:
    """What is known of a step once the host has looked."""

    step: int  # counted from 1
    bits: int
    norm: float  # of the gradient, before clipping
    loss: float  # nats per token

    @property
    def finite(self) -> bool:
        """Whether the gradient was made of numbers."""
        return not self.bits & NOT_FINITE

    @property
    def steep(self) -> bool:
        """Whether the gradient was far above the usual."""
        return bool(self.bits & STEEP)

    @property
    def high(self) -> bool:
        """Whether the loss was far above the usual: what did that came before."""
        return bool(self.bits & HIGH)


class Guard:
    """Judges each step and takes it, or leaves it out, without waiting for the device."""

    def __init__(self, device: torch.device, *, leaves_out_steep: bool, half: bool) -> None:
        self.leaves_out_steep, self.half = leaves_out_steep, half
        # NaN stands for steps that have not been.
        self.usual = torch.full((2, WINDOW), torch.nan, device=device)
        self.margins = torch.tensor(MARGINS, device=device)
        self.scale = torch.full((), FIRST_SCALE if half else 1.0, device=device)
        self.finite_steps = torch.zeros((), device=device)  # since the scale last changed
        self.sums = torch.zeros(2, device=device)  # of steps taken: negative log likelihood, tokens
        self._unread: list[tuple[int, Tensor]] = []

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose gradient is to be taken: half precision would lose small numbers."""
        return loss * self.scale if self.half else loss

    @torch.no_grad()
    def take(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        norm: Tensor,
        nll: Tensor,
        tokens: int,
        clip: float,
    ) -> None:
        """Step number `step` of the optimiser, unless the gradient, of this norm, is to be left out."""
        norm = norm.float() / self.scale
        loss = nll.float() / tokens
        bits = self._judged(norm, loss)
        finite = (bits & NOT_FINITE) == 0
        left_out = ~finite | ((bits & STEEP) > 0 if self.leaves_out_steep else False)
        divisor = self.scale * (norm / clip).clamp(min=1) if clip else self.scale
        _step(optimizer, left_out, divisor if clip or self.half else None)
        if self.half:
            self._rescale(finite)
        seen = torch.stack([nll.float(), torch.full_like(norm, tokens)])
        self.sums += torch.where(left_out, 0.0, seen)  # a product would keep the NaN
        self._unread.append((step, torch.stack([bits.float(), norm, loss])))

    def _judged(self, norm: Tensor, loss: Tensor) -> Tensor:
        """The verdict's bits; what is finite becomes a part of what is usual."""
        now = torch.stack([norm.log().clamp(min=-100.0), loss])
        finite = norm.isfinite() & loss.isfinite()
        middle, count = _median(self.usual)
        spread, _ = _median((self.usual - middle[:, None]).abs())
        above = now - middle > torch.maximum(DEVIATIONS * FROM_MAD * spread, self.margins)
        spike = above & finite & (count >= ENOUGH)
        later = torch.cat([self.usual[:, 1:], now[:, None]], 1)
        self.usual.copy_(torch.where(finite, later, self.usual))
        return (~finite) * NOT_FINITE + spike[0] * STEEP + spike[1] * HIGH

    def _rescale(self, finite: Tensor) -> None:
        """Halve the scale after an infinity, double it after many steps without one."""
        self.finite_steps = torch.where(finite, self.finite_steps + 1, 0.0)
        doubled = self.finite_steps >= SCALE_STEPS
        self.scale = torch.where(finite, torch.where(doubled, self.scale * 2, self.scale), self.scale / 2)
        self.finite_steps = torch.where(doubled, 0.0, self.finite_steps)

    # What the host asks; each of these waits for the device.

    @property
    def unread(self) -> int:
        """How many verdicts wait to be read."""
        return len(self._unread)

    def verdicts(self) -> list[Verdict]:
        """What became of the steps since this was last asked."""
        waiting, self._unread = self._unread, []
        rows = torch.stack([row for _, row in waiting]).tolist() if waiting else []
        return [
            Verdict(step, int(bits), norm, loss)
            for (step, _), (bits, norm, loss) in zip(waiting, rows, strict=True)
        ]

    def mean_loss(self) -> float | None:
        """Negative log likelihood per token of the steps taken since this was last asked; None for none."""
        nll, tokens = self.sums.tolist()
        self.sums = torch.zeros_like(self.sums)
        return nll / tokens if tokens else None

    def tensors(self) -> dict[str, Tensor]:
        """What going on needs."""
        half = {"scale": self.scale, "finite_steps": self.finite_steps} if self.half else {}
        return {"usual": self.usual, "sums": self.sums, **half}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` returned; in another precision, the scale is found anew."""
        self._unread = []
        names = {"usual", "sums"} | ({"scale", "finite_steps"} if self.half else set())
        for name in names & saved.keys():
            setattr(self, name, saved[name].to(self.usual.device, copy=True))


def _median(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The lower median of each row without its NaN, and how many others there are."""
    count = (~rows.isnan()).sum(1)
    middle = (count - 1).clamp(min=0) // 2
    return rows.sort(1).values.gather(1, middle[:, None])[:, 0], count


def _step(optimizer: Any, left_out: Tensor, divisor: Tensor | None) -> None:
    """A step with gradients divided by `divisor`, or none at all."""
    if optimizer.defaults.get("fused"):
        # What torch's own GradScaler hands to the fused kernels; they take nothing but exactly 1 for a yes.
        optimizer.found_inf, optimizer.grad_scale = left_out.float(), divisor
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale
        return
    if bool(left_out):  # the other kernels cannot be told: the host has to wait
        return
    if divisor is not None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(grads, divisor)
    optimizer.step()
