"""Marian's Transformer as Hugging Face names and stores its weights, beside ours.

Both are the Transformer of the paper with norms after sublayers; three things differ. Marian's positions
have all sines in the first half of the width and all cosines in the second, where ours take turns, so that
whatever reads or writes the width has its columns or rows in another order. Queries, keys and values are
matrices of their own there. And each decoder layer holds what it needs of the source, which here is
computed for all layers at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trmt.nets.transformer import TransformerConfig

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A part of one of our products or norms, and where it is in a Marian model."""

    ours: str
    number: int  # which of so many equal parts it is
    count: int
    theirs: str
    width: Literal["columns", "rows"]  # which of its axes is the network's width


def parts(config: TransformerConfig) -> Iterator[Part]:
    """All that the layers consist of."""
    for index in range(config.encoder_layers):
        yield from _layer("encoder", index)
    for index in range(config.decoder_layers):
        yield from _layer("decoder", index)
        ours, theirs = f"decoder.{index}.", f"model.decoder.layers.{index}.encoder_attn"
        yield Part(ours + "query", 0, 1, f"{theirs}.q_proj", "columns")
        for number, name in enumerate("kv"):
            place = 2 * index + number
            yield Part("memory", place, 2 * config.decoder_layers, f"{theirs}.{name}_proj", "columns")
        yield Part(ours + "cross_out", 0, 1, f"{theirs}.out_proj", "rows")
        yield Part(ours + "cross_norm", 0, 1, f"{theirs}_layer_norm", "rows")


def _layer(side: str, index: int) -> Iterator[Part]:
    ours, theirs = f"{side}.{index}.", f"model.{side}.layers.{index}."
    for number, name in enumerate("qkv"):
        yield Part(ours + "own", number, 3, f"{theirs}self_attn.{name}_proj", "columns")
    yield Part(ours + "own_out", 0, 1, f"{theirs}self_attn.out_proj", "rows")
    yield Part(ours + "own_norm", 0, 1, f"{theirs}self_attn_layer_norm", "rows")
    yield Part(ours + "feed.inner", 0, 1, f"{theirs}fc1", "columns")
    yield Part(ours + "feed.outer", 0, 1, f"{theirs}fc2", "rows")
    yield Part(ours + "feed_norm", 0, 1, f"{theirs}final_layer_norm", "rows")


def halves(width: int) -> Tensor:
    """Where the columns of theirs are in ours: the even ones first."""
    return torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])


def turns(width: int) -> Tensor:
    """Where the columns of ours are in theirs."""
    return halves(width).argsort()


def layers_to_marian(weights: Weights, config: TransformerConfig) -> dict[str, Tensor]:
    """Our layers' weights under Marian's names."""
    order = halves(config.width)
    found: dict[str, Tensor] = {}
    for part in parts(config):
        for kind in ("weight", "bias"):
            tensor = weights[f"{part.ours}.{kind}"].detach().chunk(part.count)[part.number]
            found[f"{part.theirs}.{kind}"] = _ordered(tensor, part, order, kind)
    return found


def layers_from_marian(weights: Weights, config: TransformerConfig) -> dict[str, Tensor]:
    """Marian's layers' weights under our names."""
    order = turns(config.width)
    found: dict[str, list[Tensor]] = {}
    for part in sorted(parts(config), key=lambda part: part.number):
        for kind in ("weight", "bias"):
            tensor = weights[f"{part.theirs}.{kind}"]
            found.setdefault(f"{part.ours}.{kind}", []).append(_ordered(tensor, part, order, kind))
    return {name: torch.cat(tensors) for name, tensors in found.items()}


def _ordered(tensor: Tensor, part: Part, order: Tensor, kind: str) -> Tensor:
    if part.width == "rows":
        return tensor[order]
    return tensor[:, order] if kind == "weight" else tensor
