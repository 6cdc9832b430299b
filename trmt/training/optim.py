"""Optimisers, learning-rate schedules as plain functions of the step, and the running mean of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from trmt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights are changed; the defaults are those of "Attention Is All You Need", section 5.3."""

    name: Literal["adam", "adamw"] = "adam"
    schedule: Literal["paper", "inverse_sqrt", "linear", "cosine", "constant"] = "paper"
    lr: float = 1.0  # the highest learning rate; with schedule = "paper" a factor on the formula's
    warmup: int = 4000  # steps
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-9
    weight_decay: float = 0.0  # only matrices and embeddings decay
    clip: float = 0.0  # the gradient's norm is cut to this; 0 is off
    ema: float = 0.0  # decay of the running mean of weights, which is then what is kept; 0 is off

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"optim.{field.name} = {value} is not a finite number; choose one")
        if self.lr <= 0 or self.warmup < 0 or not 0 <= self.ema < 1 or self.clip < 0:
            raise ConfigError(
                "optim.lr must be above 0, optim.warmup and optim.clip at least 0, "
                "optim.ema from 0 to below 1"
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1) or self.epsilon <= 0 or self.weight_decay < 0:
            raise ConfigError(
                "optim.beta1 and optim.beta2 are from 0 to below 1, "
                "optim.epsilon above 0, and optim.weight_decay at least 0"
            )
        if self.schedule == "paper" and not self.warmup:
            raise ConfigError('optim.schedule = "paper" needs optim.warmup; set it above 0')


def learning_rate(config: OptimConfig, *, width: int, steps: int) -> Callable[[int], float]:
    """The schedule as a function of the step, which counts from 1; `steps` is where training is to end."""
    warmup = max(config.warmup, 1)

    def paper(step: int) -> float:
        return config.lr * width**-0.5 * min(step**-0.5, step * warmup**-1.5)

    def inverse_sqrt(step: int) -> float:
        return config.lr * min(step / warmup, (warmup / step) ** 0.5)

    def progress(step: int) -> float:
        return min(max(step - config.warmup, 0) / max(steps - config.warmup, 1), 1.0)

    def linear(step: int) -> float:
        return config.lr * min(step / warmup, 1 - progress(step))

    def cosine(step: int) -> float:
        return config.lr * min(step / warmup, (1 + math.cos(math.pi * progress(step))) / 2)

    def constant(step: int) -> float:
        return config.lr * min(step / warmup, 1.0)

    table = {
        "paper": paper,
        "inverse_sqrt": inverse_sqrt,
        "linear": linear,
        "cosine": cosine,
        "constant": constant,
    }
    if config.schedule in ("linear", "cosine") and not steps:
        raise ConfigError(f'optim.schedule = "{config.schedule}" needs to know the end; set training.steps')
    return table[config.schedule]


def optimiser(net: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Adam over the parameters of `net`; its learning rate is set anew before every step."""
    learned = [p for p in net.parameters() if p.requires_grad]
    matrices = [p for p in learned if p.dim() > 1]
    vectors = [p for p in learned if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    fused = next(net.parameters()).device.type in ("cpu", "cuda")
    return kind(
        [group for group in groups if group["params"]],
        lr=1.0,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=fused,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this learning rate from now on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def moments(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's memory by parameter name, for a checkpoint."""
    named = {}
    for name, parameter in net.named_parameters():
        for key, value in optimizer.state[parameter].items():
            named[f"{key}:{name}"] = value
    return named


def restore_moments(net: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Give an optimiser the memory that `moments` returned."""
    # The fused kernels count steps beside the weights, the others on the CPU.
    fused = bool(optimizer.defaults.get("fused"))
    for name, parameter in net.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key}:{name}" in saved:
                device = parameter.device if fused or key != "step" else torch.device("cpu")
                optimizer.state[parameter][key] = saved[f"{key}:{name}"].to(device)


def kept_buffers(net: nn.Module) -> dict[str, Tensor]:
    """What a network keeps beside its weights, by name: statistics that training gathers."""
    kept = net.state_dict().keys()
    return {name: value for name, value in net.named_buffers() if name in kept}


class RunningMean:
    """An exponential running mean of the weights, started at the first step and never biased towards it."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        # The statistics of a batch norm go with the weights they were taken with.
        statistics = {name: value for name, value in kept_buffers(net).items() if value.is_floating_point()}
        averaged = {name: parameter.detach() for name, parameter in net.named_parameters()} | statistics
        self.names, self.live = list(averaged), list(averaged.values())
        self.mean = [tensor.clone() for tensor in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`; early on the mean follows faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    def named(self) -> dict[str, Tensor]:
        """The mean by parameter name."""
        return dict(zip(self.names, self.mean, strict=True))

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from the mean that `named` returned."""
        for name, mean in zip(self.names, self.mean, strict=True):
            mean.copy_(saved[name])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange mean and weights: once to look through the mean's eyes, again to go on."""
        for live, mean in zip(self.live, self.mean, strict=True):
            kept = live.clone()
            live.copy_(mean)
            mean.copy_(kept)
