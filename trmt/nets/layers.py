"""What several networks use word for word: attention, positions, norms, freezing.

Axes: S sentence, L source position, T target position, Q queries, J keys, H heads, D width, P width of one
head, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import fields
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.nets.base import Linear

Look = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (query, key, value, mask) -> [S, Q, D]

# On the CPU, attention gives the same bits for any padding when the number of keys is a multiple of this.
KEY_MULTIPLE = 16


def check_sizes(config: Any, *, but: Collection[str] = ()) -> None:
    """Refuse a config whose whole numbers, all sizes, or fractions, all dropouts, are out of range."""
    for name in (field.name for field in fields(config) if field.name not in but):
        value = getattr(config, name)
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ConfigError(f"network.{name} = {value} is too small; set it to at least 1")
        if isinstance(value, float) and not 0 <= value < 1:
            raise ConfigError(f"network.{name} = {value} is out of range; set it from 0 to below 1")


def key_multiple(net: Any) -> int:
    """To what multiple the source is padded: in training nobody needs equal bits, and padding costs time."""
    return 1 if getattr(net, "training", False) else KEY_MULTIPLE


def heads(x_SQD: Tensor, count: int) -> Tensor:
    """[S, Q, D] -> [S, H, Q, P]."""
    return x_SQD.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(
    query_SHQP: Tensor,
    key_SHJP: Tensor,
    value_SHJP: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention, heads joined again: [S, Q, D]."""
    out_SHQP = F.scaled_dot_product_attention(
        query_SHQP, key_SHJP, value_SHJP, attn_mask=mask, is_causal=causal, dropout_p=dropout
    )
    return out_SHQP.transpose(1, 2).flatten(2)


def attention_weights(query_SHQP: Tensor, key_SHJP: Tensor, mask: Tensor | None) -> Tensor:
    """The weights that `attend` uses inside, for those who want to look: [S, H, Q, J]."""
    scores = query_SHQP @ key_SHJP.transpose(-2, -1) / math.sqrt(query_SHQP.shape[-1])
    return (scores if mask is None else scores + mask).softmax(-1)


def blocked(real: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
    """An additive mask: 0 where attention may look, minus infinity elsewhere."""
    return torch.zeros(real.shape, dtype=kind, device=real.device).masked_fill_(~real, -torch.inf)


def sinusoids(positions: int, width: int) -> Tensor:
    """The table of "Attention Is All You Need" 3.5: sine in even columns, cosine in odd ones."""
    return sinusoids_at(torch.arange(positions), width)


def sinusoids_at(position: Tensor, width: int) -> Tensor:
    """The rows of that table for these positions."""
    angle = position[..., None] * rates(width, position.device)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)[..., :width]


def rates(width: int, device: torch.device | None = None) -> Tensor:
    """By which angle each pair of columns of that table turns from one position to the next."""
    return torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864): each pair of columns turned by its position's angle.

    `angle` holds the rows of `sinusoids` of the head's width that belong to the positions of `x`.
    """
    sin, cos = angle.unflatten(-1, (-1, 2)).unbind(-1)
    return turned(x, sin, cos)


def turned(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Each pair of columns turned by the angle of which these are sine and cosine."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class BatchNorm(nn.BatchNorm1d):
    """Each column made of mean 0 and variance 1 over the tokens of a batch, which stand in a row [N, D].

    There is no padding in a row, so only real tokens count. A frozen one uses the running means and does the
    same to a token whatever stands beside it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) < 2:  # one token has no variance
            return _frozen_batch_norm(self)(x)
        return super().forward(x.float())


def norm(kind: Literal["layer", "rms", "batch"], width: int, epsilon: float = 0.0) -> nn.Module:
    """The normalisation layer of this kind; an epsilon of 0 stands for the usual one."""
    if kind == "layer":
        return nn.LayerNorm(width, eps=epsilon or 1e-5)
    if kind == "batch":
        return BatchNorm(width, eps=epsilon or 1e-5)
    return nn.RMSNorm(width, eps=epsilon or 1e-6)


def xavier(linear: nn.Linear, parts: int = 1) -> nn.Linear:
    """Glorot initialisation; a product that merges several is treated as the separate ones it stands for."""
    for part in linear.weight.chunk(parts):
        nn.init.xavier_uniform_(part)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


def freeze(module: nn.Module, linear: Linear) -> Any:
    """A tree of plain functions with the names of `module`'s children, free of module calls.

    The networks write their arithmetic once, against these names: in training they stand for modules,
    in decoding for what this returns.
    """
    if isinstance(module, nn.Linear):
        bias = None if module.bias is None else module.bias.detach()
        product = linear(module.weight.detach(), bias)
        return _with_relu(product) if getattr(module, "relu", False) else product
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return _frozen_norm(module)
    if isinstance(module, BatchNorm):
        return _frozen_batch_norm(module)
    if isinstance(module, nn.Dropout):
        return _same
    if isinstance(module, nn.ModuleList):
        return [freeze(child, linear) for child in module]
    own = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
    return SimpleNamespace(**own, **{name: freeze(child, linear) for name, child in module.named_children()})


def _with_relu(product: Any) -> Any:
    """The product followed by relu; some do it in the same pass."""
    return product.with_relu() if hasattr(product, "with_relu") else lambda x: F.relu(product(x))


def readout(
    product: Any, weight_VD: Tensor, hidden: Tensor, only: Tensor | None, bias_V: Tensor | None = None
) -> Tensor:
    """The logits of the whole vocabulary, or of the ids in `only`; where products can, with the same bits."""
    if only is None:
        return product(hidden)
    if hasattr(product, "only"):
        return product.only(only)(hidden)
    return F.linear(hidden, weight_VD[only], None if bias_V is None else bias_V[only])


def narrowed(product: Any, ids: Tensor) -> Any:
    """The product of the outputs `ids` alone; where its bits would differ, these are selected from all."""
    if hasattr(product, "only"):
        return product.only(ids)
    return lambda hidden: product(hidden).index_select(-1, ids)


def _same(x: Tensor) -> Tensor:
    return x


def _frozen_norm(module: nn.LayerNorm | nn.RMSNorm) -> Any:
    shape, weight, eps = module.normalized_shape, module.weight.detach(), module.eps
    if isinstance(module, nn.RMSNorm):
        return lambda x: F.rms_norm(x, shape, weight, eps)
    bias = module.bias.detach()
    layer_eps = module.eps
    return lambda x: F.layer_norm(x, shape, weight, bias, layer_eps)


def _frozen_batch_norm(module: BatchNorm) -> Any:
    mean, variance = module.running_mean, module.running_var
    assert mean is not None and variance is not None, "it keeps running statistics"
    scale = module.weight.detach() * (variance + module.eps).rsqrt()
    shift = module.bias.detach() - mean * scale
    return lambda x: x * scale + shift
