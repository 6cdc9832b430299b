"""Self-attention that depends on the distance of query and key: the base of ALiBi, T5 and relative positions.

Axes: S sentence, L source position, Q queries, J keys, N tokens in a row, H heads, P head dimension, D hidden
size.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.nets import layers
from trmt.nets.kv_cache import KVCache
from trmt.nets.layers import Spans, split_heads
from trmt.nets.transformer import TransformerEncoder, Weights

QKV = tuple[Tensor, Tensor, Tensor]  # queries [S, H, Q, P], keys and values [S, H, J, P]


class DistanceAttention(TransformerEncoder):
    """A Transformer whose self-attention is computed in grids, from the distances of queries and keys."""

    def packs_attention(self, device: torch.device, dtype: torch.dtype) -> bool:
        return False

    @abstractmethod
    def attend(
        self, layer: int, qkv: QKV, mask: Tensor, distance_SQJ: Tensor, *, decoder: bool, dropout: float = 0.0
    ) -> Tensor:
        """The attention of a layer, heads joined: [S, Q, D]. A key of distance -1 stands before its query."""

    @abstractmethod
    def weights(self, layer: int, qkv: QKV, mask: Tensor, distance_SQJ: Tensor, *, decoder: bool) -> Tensor:
        """The attention weights of a layer: [S, H, Q, J]."""

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
        dropout = self.config.attention_dropout if self.training else 0.0

        def grid(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            distance, qkv = distances(query.shape[2], key.shape[2], query.device), (query, key, value)
            if weights is not None:
                weights.append(self.weights(layer, qkv, mask, distance, decoder=causal))
            return self.attend(layer, qkv, mask, distance, decoder=causal, dropout=dropout)

        # Weights are wanted in one grid.
        attend = layers.attend_packed if weights is None else layers.attend_padded
        query, key, value = qkv_N3D.unflatten(-1, (3, self.config.heads, -1)).unbind(1)
        return attend(query, key, value, spans, spans, causal=causal, grid=grid)

    def grid_self_attention(self, layer: int, qkv_SL3D: Tensor, position_L: Tensor, mask: Tensor) -> Tensor:
        """Self-attention of the encoder over padded sources."""
        query, key, value = (split_heads(x, self.config.heads) for x in qkv_SL3D.chunk(3, -1))
        distance = distances(qkv_SL3D.shape[1], qkv_SL3D.shape[1], qkv_SL3D.device)
        return self.attend(layer, (query, key, value), mask, distance, decoder=False)

    def cached_self_attention(
        self, layer: int, qkv_SQ3D: Tensor, position_SQ: Tensor, cache: KVCache
    ) -> Tensor:
        """Self-attention of the decoder over the KV cache, to which the newest tokens are added."""
        qkv_3SHQP = qkv_SQ3D.unflatten(-1, (3, self.config.heads, -1)).permute(2, 0, 3, 1, 4)
        distance_SQJ = cache.distances()

        def grid(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
            return self.attend(layer, (query, key, value), mask, distance_SQJ, decoder=True)

        return cache.attend(layer, qkv_3SHQP[0], qkv_3SHQP[1:], grid)


class BiasedAttention(DistanceAttention):
    """A Transformer that adds a number to each score, which depends on the distance and the head."""

    @abstractmethod
    def bias(self, distance_SQJ: Tensor, *, decoder: bool) -> Tensor:
        """What is added to scores: [S, H, Q, J]."""

    def attend(
        self, layer: int, qkv: QKV, mask: Tensor, distance_SQJ: Tensor, *, decoder: bool, dropout: float = 0.0
    ) -> Tensor:
        mask = (mask + self.bias(distance_SQJ, decoder=decoder)).to(qkv[0].dtype)
        if not dropout:
            return self.grid_attention()(*qkv, mask)
        out_SHQP = F.scaled_dot_product_attention(*qkv, attn_mask=mask, dropout_p=dropout)
        return out_SHQP.transpose(1, 2).flatten(2)

    def weights(self, layer: int, qkv: QKV, mask: Tensor, distance_SQJ: Tensor, *, decoder: bool) -> Tensor:
        query, key, _ = qkv
        return layers.attention_weights(query, key, mask + self.bias(distance_SQJ, decoder=decoder))


def distances(queries: int, keys: int, device: torch.device) -> Tensor:
    """From each of the first queries to each of the first keys of a sentence: [1, Q, J]."""
    query_Q, key_J = torch.arange(queries, device=device), torch.arange(keys, device=device)
    return (key_J - query_Q[:, None])[None]
