"""The optimiser, learning-rate schedules as functions of the step, and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.training import sharding
from trmt.training.distributed import Distributed

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # the names that torch's Adam gives its state


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights are updated; the defaults are those of "Attention Is All You Need", section 5.3."""

    name: Literal["adam", "adamw"] = "adam"  # Adam, or AdamW with decoupled weight decay
    schedule: Literal["paper", "inverse_sqrt", "linear", "cosine", "constant"] = "paper"  # learning rate
    lr: float = 1.0  # highest learning rate; with schedule = "paper" a factor on the formula's
    warmup: int = 4000  # steps over which the learning rate rises
    beta1: float = 0.9  # decay of Adam's first moment
    beta2: float = 0.98  # decay of Adam's second moment
    epsilon: float = 1e-9  # added to the denominator of Adam's update
    weight_decay: float = 0.0  # of matrices and embeddings; biases and norms do not decay
    clip: float = 0.0  # the gradient's norm is clipped to this value; 0 is off
    ema: float = 0.0  # decay of a moving average of the weights, which is what bundles get; 0 is off

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


def learning_rate(config: OptimConfig, *, d_model: int, total_steps: int) -> Callable[[int], float]:
    """The schedule as a function of the step, counted from 1; it ends at `total_steps`, 0 if unknown."""
    warmup = max(config.warmup, 1)

    def paper(step: int) -> float:
        return config.lr * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)

    def inverse_sqrt(step: int) -> float:
        return config.lr * min(step / warmup, (warmup / step) ** 0.5)

    def progress(step: int) -> float:
        return min(max(step - config.warmup, 0) / max(total_steps - config.warmup, 1), 1.0)

    def linear(step: int) -> float:
        return config.lr * min(step / warmup, 1 - progress(step))

    def cosine(step: int) -> float:
        return config.lr * min(step / warmup, (1 + math.cos(math.pi * progress(step))) / 2)

    def constant(step: int) -> float:
        return config.lr * min(step / warmup, 1.0)

    schedules = {
        "paper": paper,
        "inverse_sqrt": inverse_sqrt,
        "linear": linear,
        "cosine": cosine,
        "constant": constant,
    }
    if config.schedule in ("linear", "cosine") and not total_steps:
        raise ConfigError(
            f'optim.schedule = "{config.schedule}" needs to know the last step; set training.steps or '
            "training.epochs"
        )
    return schedules[config.schedule]


def build_optimizer(net: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Adam over the parameters of `net`; the learning rate is to be set before every step."""
    trainable = [p for p in net.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.dim() > 1]
    vectors = [p for p in trainable if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer_class = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    fused = next(net.parameters()).device.type in ("cpu", "cuda")
    return optimizer_class(
        [group for group in groups if group["params"]],
        lr=1.0,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=fused,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this learning rate for the next steps."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def moments(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of the optimiser as "<key>:<parameter name>", for a checkpoint."""
    named = {}
    for name, parameter in net.named_parameters():
        for key, value in optimizer.state[parameter].items():
            named[f"{key}:{name}"] = value
    return named


def load_moments(
    net: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor], distributed: Distributed
) -> None:
    """Load what `moments` returned; of sharded parameters the rows of this rank."""
    # The fused kernels count steps on the device of the weights, the others on the CPU.
    fused = bool(optimizer.defaults.get("fused"))
    for name, parameter in net.named_parameters():
        for key in MOMENTS:
            if f"{key}:{name}" not in saved:
                continue
            if key == "step":
                if sharding.saved_shape(saved, f"step:{name}") != torch.Size():
                    raise RuntimeError(f"'step:{name}' is not one number")
                device = parameter.device if fused else torch.device("cpu")
                optimizer.state[parameter][key] = saved[f"{key}:{name}"].to(device)
            else:
                optimizer.state[parameter][key] = torch.zeros_like(parameter)
                sharding.load_tensor(optimizer.state[parameter][key], saved, f"{key}:{name}", distributed)


def saved_buffers(net: nn.Module) -> dict[str, Tensor]:
    """The buffers of a network that belong to its state, by name: statistics of batch norms."""
    saved = net.state_dict().keys()
    return {name: value for name, value in net.named_buffers() if name in saved}


class EMA:
    """An exponential moving average of the weights; in the first steps it follows them faster."""

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        # The statistics of a batch norm are averaged with the weights that they were computed with.
        statistics = {name: value for name, value in saved_buffers(net).items() if value.is_floating_point()}
        averaged = {name: parameter.detach() for name, parameter in net.named_parameters()} | statistics
        self.names, self.weights = list(averaged), list(averaged.values())
        self.averages = [tensor.clone() for tensor in self.weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the weights after `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)

    def named_averages(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return dict(zip(self.names, self.averages, strict=True))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averages and weights: once to validate with the averages, once more to go on training."""
        for weight, average in zip(self.weights, self.averages, strict=True):
            copy = weight.clone()
            weight.copy_(average)
            average.copy_(copy)
