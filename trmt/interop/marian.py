"""How the weights of Marian's Transformer, as Hugging Face names and stores them, correspond to ours.

Both are the post-norm Transformer of the paper, with three differences. Marian's positional encodings
have all sines in the first half of their columns and all cosines in the second, where ours alternate, so
the columns of hidden states are in another order, and matrices are permuted where they multiply or make
hidden states. Queries, keys and values have separate matrices there. And each decoder layer there has its
own matrices for the keys and values of cross-attention, which here come from one product for all layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trmt.nets.transformer import TransformerConfig


@dataclass(frozen=True)
class MarianModule:
    """A linear layer or norm of Marian, and the chunk of our module that corresponds to it."""

    name: str  # of our module
    chunk: int
    chunks: int  # equal chunks of outputs that our module has
    marian_name: str
    hidden: Literal["inputs", "outputs"]  # which of them are columns of hidden states


def marian_modules(config: TransformerConfig) -> Iterator[MarianModule]:
    """All modules of the layers."""
    for index in range(config.encoder_layers):
        yield from _layer("encoder", index)
    for index in range(config.decoder_layers):
        yield from _layer("decoder", index)
        prefix, marian = f"decoder.layers.{index}.", f"model.decoder.layers.{index}.encoder_attn"
        yield MarianModule(prefix + "cross_query", 0, 1, f"{marian}.q_proj", "inputs")
        for number, name in enumerate("kv"):
            chunk, chunks = 2 * index + number, 2 * config.decoder_layers
            yield MarianModule("cross_kv", chunk, chunks, f"{marian}.{name}_proj", "inputs")
        yield MarianModule(prefix + "cross_out", 0, 1, f"{marian}.out_proj", "outputs")
        yield MarianModule(prefix + "cross_norm", 0, 1, f"{marian}_layer_norm", "outputs")


def _layer(side: str, index: int) -> Iterator[MarianModule]:
    prefix, marian = f"{side}.layers.{index}.", f"model.{side}.layers.{index}."
    for number, name in enumerate("qkv"):
        yield MarianModule(prefix + "self_qkv", number, 3, f"{marian}self_attn.{name}_proj", "inputs")
    yield MarianModule(prefix + "self_out", 0, 1, f"{marian}self_attn.out_proj", "outputs")
    yield MarianModule(prefix + "self_norm", 0, 1, f"{marian}self_attn_layer_norm", "outputs")
    yield MarianModule(prefix + "feed_forward.inner", 0, 1, f"{marian}fc1", "inputs")
    yield MarianModule(prefix + "feed_forward.outer", 0, 1, f"{marian}fc2", "outputs")
    yield MarianModule(prefix + "feed_forward_norm", 0, 1, f"{marian}final_layer_norm", "outputs")


def columns_to_marian(d_model: int) -> Tensor:
    """For each column of Marian's hidden states, the index of the same column in ours: even ones first."""
    return torch.cat([torch.arange(0, d_model, 2), torch.arange(1, d_model, 2)])


def columns_from_marian(d_model: int) -> Tensor:
    """For each column of our hidden states, the index of the same column in Marian's."""
    return columns_to_marian(d_model).argsort()


def layers_to_marian(weights: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The weights of our layers under Marian's names."""
    order = columns_to_marian(config.d_model)
    marian: dict[str, Tensor] = {}
    for module in marian_modules(config):
        for name in ("weight", "bias"):
            tensor = weights[f"{module.name}.{name}"].detach().chunk(module.chunks)[module.chunk]
            marian[f"{module.marian_name}.{name}"] = _permuted(tensor, module, order, name)
    return marian


def layers_from_marian(weights: Mapping[str, Tensor], config: TransformerConfig) -> dict[str, Tensor]:
    """The weights of Marian's layers under our names."""
    order = columns_from_marian(config.d_model)
    ours: dict[str, list[Tensor]] = {}
    for module in sorted(marian_modules(config), key=lambda module: module.chunk):
        for name in ("weight", "bias"):
            tensor = weights[f"{module.marian_name}.{name}"]
            ours.setdefault(f"{module.name}.{name}", []).append(_permuted(tensor, module, order, name))
    return {name: torch.cat(chunks) for name, chunks in ours.items()}


def _permuted(tensor: Tensor, module: MarianModule, order: Tensor, name: str) -> Tensor:
    if module.hidden == "outputs":
        return tensor[order]
    return tensor[:, order] if name == "weight" else tensor
