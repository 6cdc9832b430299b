"""Skipping bad steps without synchronising: the decision is made on the device, the host reads it later.

A step whose gradient is not finite, or far above those of the steps before, is skipped by the optimiser's own
kernel, whose argument `found_inf` leaves weights and moments untouched. So no step makes the host wait for
the device; the host reads the reports of many steps at once, before it logs or saves. Clipping and the loss
scale of fp16 are one factor in the same kernel.

A spike is a value above the median of the last `WINDOW` steps by more than `DEVIATIONS` robust standard
deviations, and by more than a fixed margin. The median is not moved by the spikes themselves, and follows
where the level changes for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WINDOW = 128  # recent steps that a step is compared with
MIN_STEPS = 64  # of them that are needed before anything counts as a spike
DEVIATIONS = 8.0
FROM_MAD = 1.4826  # from the median absolute deviation to the standard deviation of a normal distribution
# Of the natural logarithm of the gradient's norm (a factor of ten), and of the loss in nats per token.
MARGINS = (2.3, 1.0)

INITIAL_SCALE, SCALE_STEPS = 2.0**16, 2000  # fp16 loss scale; finite steps until it is doubled

NOT_FINITE, GRADIENT_SPIKE, LOSS_SPIKE = 1, 2, 4  # flags of a step, combined as bits


@dataclass(frozen=True)
class StepReport:
    """What the device found out about a step."""

    step: int  # counted from 1
    flags: int  # NOT_FINITE, GRADIENT_SPIKE and LOSS_SPIKE as bits
    norm: float  # of the gradient before clipping
    loss: float  # nats per token

    @property
    def finite(self) -> bool:
        """Whether gradient and loss are finite."""
        return not self.flags & NOT_FINITE

    @property
    def gradient_spike(self) -> bool:
        """Whether the gradient's norm is far above those of recent steps."""
        return bool(self.flags & GRADIENT_SPIKE)

    @property
    def loss_spike(self) -> bool:
        """Whether the loss is far above those of recent steps; its cause is an earlier step."""
        return bool(self.flags & LOSS_SPIKE)


class GradientGuard:
    """Clips gradients and updates the weights, or skips the step, without waiting for the device."""

    def __init__(self, device: torch.device, *, skip_spikes: bool, fp16: bool) -> None:
        self.skip_spikes, self.fp16 = skip_spikes, fp16
        # Log norm and loss of recent steps [2, WINDOW]; NaN for steps that have not been taken yet.
        self.recent = torch.full((2, WINDOW), torch.nan, device=device)
        self.margins = torch.tensor(MARGINS, device=device)
        self.scale = torch.full((), INITIAL_SCALE if fp16 else 1.0, device=device)
        self.finite_steps = torch.zeros((), device=device)  # since the scale last changed
        self.sums = torch.zeros(2, device=device)  # negative log likelihood and tokens of the steps taken
        self._pending: list[tuple[int, Tensor]] = []

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss to differentiate: in fp16 scaled, so that small gradients are not lost."""
        return loss * self.scale if self.fp16 else loss

    @torch.no_grad()
    def update(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        norm: Tensor,
        nll: Tensor,
        tokens: int,
        clip: float,
    ) -> None:
        """Clip the gradient, whose norm is given, and take a step of the optimiser or skip it."""
        norm = norm.float() / self.scale
        loss = nll.float() / tokens
        flags = self._flags(norm, loss)
        finite = (flags & NOT_FINITE) == 0
        skipped = ~finite | ((flags & GRADIENT_SPIKE) > 0 if self.skip_spikes else False)
        divisor = self.scale * (norm / clip).clamp(min=1) if clip else self.scale
        _optimizer_step(optimizer, skipped, divisor if clip or self.fp16 else None)
        if self.fp16:
            self._update_scale(finite)
        summands = torch.stack([nll.float(), torch.full_like(norm, tokens)])
        self.sums += torch.where(skipped, 0.0, summands)  # a product would keep the NaN
        self._pending.append((step, torch.stack([flags.float(), norm, loss])))

    def _flags(self, norm: Tensor, loss: Tensor) -> Tensor:
        """The flags of a step; if it is finite, it becomes one of the recent steps."""
        current = torch.stack([norm.log().clamp(min=-100.0), loss])
        finite = norm.isfinite() & loss.isfinite()
        middle, count = _median(self.recent)
        deviation, _ = _median((self.recent - middle[:, None]).abs())
        above = current - middle > torch.maximum(DEVIATIONS * FROM_MAD * deviation, self.margins)
        spike = above & finite & (count >= MIN_STEPS)
        later = torch.cat([self.recent[:, 1:], current[:, None]], 1)
        self.recent.copy_(torch.where(finite, later, self.recent))
        return (~finite) * NOT_FINITE + spike[0] * GRADIENT_SPIKE + spike[1] * LOSS_SPIKE

    def _update_scale(self, finite: Tensor) -> None:
        """Halve the loss scale after an infinity, double it after many steps without one."""
        self.finite_steps = torch.where(finite, self.finite_steps + 1, 0.0)
        doubled = self.finite_steps >= SCALE_STEPS
        self.scale = torch.where(finite, torch.where(doubled, self.scale * 2, self.scale), self.scale / 2)
        self.finite_steps = torch.where(doubled, 0.0, self.finite_steps)

    # What the host reads; each of these waits for the device.

    @property
    def pending(self) -> int:
        """The number of reports that have not been read."""
        return len(self._pending)

    def pop_reports(self) -> list[StepReport]:
        """The reports of the steps since the last call."""
        pending, self._pending = self._pending, []
        rows = torch.stack([row for _, row in pending]).tolist() if pending else []
        return [
            StepReport(step, int(flags), norm, loss)
            for (step, _), (flags, norm, loss) in zip(pending, rows, strict=True)
        ]

    def pop_mean_loss(self) -> float | None:
        """Negative log likelihood per token of the steps taken since the last call; None without any."""
        nll, tokens = self.sums.tolist()
        self.sums = torch.zeros_like(self.sums)
        return nll / tokens if tokens else None

    def tensors(self) -> dict[str, Tensor]:
        """What has to be saved for resuming."""
        scale = {"scale": self.scale, "finite_steps": self.finite_steps} if self.fp16 else {}
        return {"recent": self.recent, "sums": self.sums, **scale}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Load what `tensors` returned; without a saved scale, as from another precision, it starts anew."""
        self._pending = []
        for name, tensor in self.tensors().items():
            if name not in saved:
                continue
            if saved[name].shape != tensor.shape:
                raise RuntimeError(f"'guard:{name}' is of another shape")
            setattr(self, name, saved[name].to(self.recent.device, copy=True))


def _median(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The lower median of each row without its NaN, and the number of the other values."""
    count = (~rows.isnan()).sum(1)
    middle = (count - 1).clamp(min=0) // 2
    return rows.sort(1).values.gather(1, middle[:, None])[:, 0], count


def _optimizer_step(optimizer: Any, skipped: Tensor, divisor: Tensor | None) -> None:
    """A step with gradients divided by `divisor`, or none if `skipped`."""
    if optimizer.defaults.get("fused"):
        # These attributes are how torch's own GradScaler controls the fused kernels; found_inf has to be 1.0.
        optimizer.found_inf, optimizer.grad_scale = skipped.float(), divisor
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale
        return
    if bool(skipped):  # the other kernels have no such argument, so the host has to wait
        return
    if divisor is not None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_div_(grads, divisor)
    optimizer.step()
