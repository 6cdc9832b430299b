"""A Transformer whose decoder has a simpler simple recurrent unit (Kim et al. 2019, W19-5632) for
self-attention.

With x the input of the sublayer, its output is relu(c), and c a cell for each hypothesis:

    f_t = sigmoid(W_f x_t + b_f)
    c_t = f_t * c_(t-1) + (1 - f_t) * (W x_t + b)

A decoding step costs the same however long the translation is, and there is no KV cache to reorder but one
vector for each layer.

Axes: S sentence, K hypothesis, T target position, N target tokens in a row, Q queries (K * T), D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.nets import layers
from trmt.nets.base import Decoding, EncoderMemory, HiddenVectors
from trmt.nets.layers import Linear, Spans, Sublayer
from trmt.nets.ragged import Source
from trmt.nets.transformer import DecoderLayer, EncoderConfig, Transformer, Weights


class SSRULayer(DecoderLayer):
    """A recurrent unit, cross-attention and a feed-forward layer."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        del self.self_qkv, self.self_out
        self.ssru = Linear(config.d_model, 2 * config.d_model, merged=2)  # gate and input side by side

    def self_sublayer(self, attention: Callable[[Tensor], Tensor]) -> Sublayer:
        return self.self_norm, lambda x: attention(self.ssru(x))


def recur(gate_input_ST: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of T steps [.., T, D] from gates and inputs side by side, and the last cell."""
    gate, x = gate_input_ST.chunk(2, -1)
    keep = torch.sigmoid(gate)
    added = (1 - keep) * x
    cells = []
    for step in range(gate.shape[-2]):
        cell = (keep[..., step, :] * cell + added[..., step, :]).to(cell.dtype)
        cells.append(cell)
    return F.relu(torch.stack(cells, -2)), cell


class SSRUDecoder(Transformer):
    """A Transformer with an SSRU decoder."""

    decoder_layer = SSRULayer
    pays_to_compile = False

    def packs_attention(self, device: torch.device, dtype: torch.dtype) -> bool:
        return False  # the decoder's recurrence runs in a padded grid

    def packed_self_attention(
        self,
        layer: int,
        qkv_N3D: Tensor,
        position_N: Tensor,
        spans: Spans,
        *,
        causal: bool,
        weights: Weights,
    ) -> Tensor:
        if not causal:
            return super().packed_self_attention(
                layer, qkv_N3D, position_N, spans, causal=causal, weights=weights
            )
        gate_input_S1TD, cells_N, _ = layers.to_grid(qkv_N3D.float()[:, None], spans)
        cell_SD = gate_input_S1TD.new_zeros(len(gate_input_S1TD), self.config.d_model)
        out_STD, _ = recur(gate_input_S1TD[:, 0], cell_SD)
        return out_STD.flatten(0, 1)[cells_N]

    def start(self, source: Source, decoding: Decoding) -> tuple[EncoderMemory, HiddenVectors]:
        memory = self.encode(source)
        shape = (len(source), decoding.hypotheses, self.config.d_model)
        cells = (memory["key0"].new_zeros(shape) for _ in range(self.config.decoder_layers))
        return memory, HiddenVectors(tuple(cells))

    def step(
        self, tokens_SKT: Tensor, memory: EncoderMemory, decoder: Any, position_S: Tensor
    ) -> tuple[Tensor, HiddenVectors]:
        cells = list(decoder.tensors)

        def recurrence(layer: int, gate_input_SQ2D: Tensor, position_SQ: Tensor) -> Tensor:
            gate_input_SKT2D = gate_input_SQ2D.view(*tokens_SKT.shape, -1)
            if self.exact:
                gate_input_SKT2D = gate_input_SKT2D.double()
            out_SKTD, cells[layer] = recur(gate_input_SKT2D, cells[layer])
            return out_SKTD.flatten(1, 2)

        return self.decode(tokens_SKT, memory, position_S, recurrence), HiddenVectors(tuple(cells))

    def same_beside_others(self, decoding: Decoding) -> bool:
        return True
