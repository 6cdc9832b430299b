"""The Transformer as ONNX graphs: an encoder, and a decoder with a KV cache.

Axes: B batch, L source position, T target position, J keys, H heads, P head dimension, D hidden size,
V vocabulary. Variables without axes are names of values in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from trmt.interop.base import token_rows
from trmt.interop.onnx_graph import OnnxGraph
from trmt.interop.to_huggingface import begin_with_padding
from trmt.nets.transformer import Transformer
from trmt.text.tokenizer import Tokenizer

FLOAT, INT64 = 1, 7  # TensorProto's numbers of dtypes
MASKED = -1e9  # added to attention scores where attention is not allowed


def encoder_graph(net: Transformer, tokenizer: Tokenizer) -> OnnxGraph:
    """From ids and their mask to the encoder output."""
    graph, config = OnnxGraph(), net.config
    ids = graph.input("input_ids", "INT64", ("batch", "source"))
    attention_mask = graph.input("attention_mask", "INT64", ("batch", "source"))
    nodes = _TransformerNodes(graph, net)
    begin, end = graph.int_list(0), nodes.length(ids)
    source_VD = token_rows(net.encoder.embedding.tokens.weight, tokenizer.source)
    x = nodes.embed("encoder", source_VD, ids, begin, end)
    mask = nodes.source_mask(attention_mask)

    def self_attention(layer: str, x: str) -> str:
        query, *kv = nodes.self_qkv(layer, x, begin, end)
        return nodes.linear(f"{layer}.self_out", nodes.attend(query, kv, mask))

    for index in range(config.encoder_layers):
        layer = f"encoder.layers.{index}"
        x = nodes.residual(f"{layer}.self_norm", x, partial(self_attention, layer))
        x = nodes.feed_forward(layer, x)
    graph.output(
        nodes.last_norm("encoder", x), "last_hidden_state", "FLOAT", ("batch", "source", config.d_model)
    )
    return graph


def decoder_graph(net: Transformer, tokenizer: Tokenizer) -> OnnxGraph:
    """From ids, and a KV cache if `use_cache_branch` is true, to logits and the new KV cache."""
    graph, config = OnnxGraph(), net.config
    attention_mask = graph.input("encoder_attention_mask", "INT64", ("batch", "source"))
    ids = graph.input("input_ids", "INT64", ("batch", "target"))
    hidden = graph.input("encoder_hidden_states", "FLOAT", ("batch", "source", config.d_model))
    nodes = _TransformerNodes(graph, net)
    # For each layer: key and value of self-attention, then those of cross-attention.
    past = [nodes.past_inputs(index) for index in range(config.decoder_layers)]
    use_cache = graph.input("use_cache_branch", "BOOL", (1,))
    begin = nodes.cached_length(past[0][0], use_cache)
    end = graph.op("Add", begin, nodes.length(ids))
    target_VD = token_rows(net.decoder.embedding.tokens.weight, tokenizer.target)
    target_VD = begin_with_padding(target_VD, tokenizer.target)
    x = nodes.embed("decoder", target_VD, ids, begin, end)
    causal_mask, source_mask = nodes.causal_mask(begin, end), nodes.source_mask(attention_mask)
    cross_kv = nodes.cross_kv(hidden, use_cache, [layer[2:] for layer in past])

    def self_attention(index: int, x: str) -> str:
        layer = f"decoder.layers.{index}"
        query, *new = nodes.self_qkv(layer, x, begin, end)
        kv = [nodes.append(old, each, begin) for old, each in zip(past[index][:2], new, strict=True)]
        nodes.present_outputs(index, "decoder", kv)
        return nodes.linear(f"{layer}.self_out", nodes.attend(query, kv, causal_mask))

    def cross_attention(index: int, x: str) -> str:
        layer = f"decoder.layers.{index}"
        query = nodes.split_heads(nodes.linear(f"{layer}.cross_query", x))
        return nodes.linear(f"{layer}.cross_out", nodes.attend(query, cross_kv[index], source_mask))

    for index in range(config.decoder_layers):
        layer = f"decoder.layers.{index}"
        x = nodes.residual(f"{layer}.self_norm", x, partial(self_attention, index))
        x = nodes.residual(f"{layer}.cross_norm", x, partial(cross_attention, index))
        x = nodes.feed_forward(layer, x)
        nodes.present_outputs(index, "encoder", cross_kv[index])
    logits = nodes.logits(nodes.last_norm("decoder", x), target_VD, tokenizer)
    graph.output(logits, "logits", "FLOAT", ("batch", "target", tokenizer.target.vocabulary))
    # Programs also rely on the order of outputs: logits first, then layer by layer.
    graph.outputs.insert(0, graph.outputs.pop())
    return graph


class _TransformerNodes:
    """Adds the layers of a Transformer to a graph."""

    def __init__(self, graph: OnnxGraph, net: Transformer) -> None:
        self.graph, self.net, self.config = graph, net, net.config
        self.weights: dict[str, Tensor] = net.state_dict()

    # Linear layers, norms, the feed-forward layer

    def linear(self, name: str, x: str, graph: OnnxGraph | None = None) -> str:
        graph = graph or self.graph
        weight = graph.weight(f"{name}.weight", self.weights[f"{name}.weight"].t())
        bias = graph.weight(f"{name}.bias", self.weights[f"{name}.bias"])
        return graph.op("Add", graph.op("MatMul", x, weight), bias)

    def norm(self, name: str, x: str) -> str:
        graph, module = self.graph, self.net.get_submodule(name)
        scale = graph.weight(f"{name}.weight", self.weights[f"{name}.weight"])
        epsilon = float(module.eps)  # type: ignore[arg-type]
        if self.config.norm == "layer":
            bias = graph.weight(f"{name}.bias", self.weights[f"{name}.bias"])
            return graph.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)
        mean_square = graph.op("ReduceMean", graph.op("Mul", x, x), axes=[-1], keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", mean_square, graph.scalar(epsilon)))
        return graph.op("Mul", graph.op("Div", x, root), scale)

    def residual(self, norm: str, x: str, sublayer: Callable[[str], str]) -> str:
        if self.config.norm_position == "pre":
            return self.graph.op("Add", x, sublayer(self.norm(norm, x)))
        return self.norm(norm, self.graph.op("Add", x, sublayer(x)))

    def last_norm(self, side: str, x: str) -> str:
        return self.norm(f"{side}.norm", x) if self.config.norm_position == "pre" else x

    def feed_forward(self, layer: str, x: str) -> str:
        name = f"{layer}.feed_forward"

        def sublayer(x: str) -> str:
            return self.linear(f"{name}.outer", self._activation(self.linear(f"{name}.inner", x)))

        return self.residual(f"{name}_norm", x, sublayer)

    def _activation(self, x: str) -> str:
        graph = self.graph
        if self.config.activation == "swiglu":
            gate, value = graph.multi_op("Split", 2, x, axis=-1)
            return graph.op("Mul", self._swish(gate), value)
        if self.config.activation == "swish":
            return self._swish(x)
        if self.config.activation == "gelu":
            error = graph.op("Erf", graph.op("Mul", x, graph.scalar(math.sqrt(0.5))))
            half = graph.op("Mul", x, graph.scalar(0.5))
            return graph.op("Mul", half, graph.op("Add", error, graph.scalar(1.0)))
        return graph.op("Relu", x)

    def _swish(self, x: str) -> str:
        return self.graph.op("Mul", x, self.graph.op("Sigmoid", x))

    # Embeddings and logits

    def embed(self, side: str, tokens_VD: Tensor, ids: str, begin: str, end: str) -> str:
        """Embeddings of ids at the positions from `begin` to `end`."""
        graph, positions_1LD = self.graph, getattr(self.net, side).embedding.positions
        tokens = graph.op("Gather", graph.weight(f"{side}.embedding", tokens_VD), ids, axis=0)
        x = graph.op("Mul", tokens, graph.scalar(math.sqrt(self.config.d_model)))
        if positions_1LD is None:
            return x
        table = graph.weight(f"{side}.positions", positions_1LD[0])
        return graph.op("Add", x, self._slice(table, begin, end, axis=0))

    def logits(self, x: str, target_VD: Tensor, tokenizer: Tokenizer) -> str:
        graph = self.graph
        weight = graph.weight("decoder.embedding", target_VD)
        if self.config.tied == "none":
            weight = graph.weight("output.weight", token_rows(self.net.output.weight, tokenizer.target))
        logits = graph.op("MatMul", x, graph.op("Transpose", weight, perm=[1, 0]))
        if self.net.output_bias is None:
            return logits
        bias = graph.weight("output.bias", token_rows(self.net.output_bias, tokenizer.target))
        return graph.op("Add", logits, bias)

    # Attention

    def split_heads(self, x: str) -> str:
        """[B, T, D] -> [B, H, T, P]."""
        shape = self.graph.int_list(0, 0, self.config.heads, self.config.head_dim)
        return self.graph.op("Transpose", self.graph.op("Reshape", x, shape), perm=[0, 2, 1, 3])

    def self_qkv(self, layer: str, x: str, begin: str, end: str) -> tuple[str, str, str]:
        """Queries, keys and values of self-attention for the positions from `begin` to `end`."""
        qkv = self.graph.multi_op("Split", 3, self.linear(f"{layer}.self_qkv", x), axis=-1)
        query, key, value = (self.split_heads(each) for each in qkv)
        if self.config.positions == "rotary":
            query, key = (self._rotate(each, begin, end) for each in (query, key))
        return query, key, value

    def _rotate(self, x: str, begin: str, end: str) -> str:
        """Rotary positions: each pair of columns rotated by the angle of its position."""
        graph, half = self.graph, self.config.head_dim // 2
        table_LP: Any = self.net.rotary_table
        sin, cos = (
            self._slice(graph.weight(name, table_LP[:, first::2]), begin, end, axis=0)
            for first, name in enumerate(("sine", "cosine"))
        )
        pairs = graph.op("Reshape", x, graph.int_list(0, 0, 0, half, 2))
        even, odd = (graph.op("Gather", pairs, graph.int_scalar(index), axis=-1) for index in (0, 1))
        rotated = (
            graph.op("Sub", graph.op("Mul", even, cos), graph.op("Mul", odd, sin)),
            graph.op("Add", graph.op("Mul", even, sin), graph.op("Mul", odd, cos)),
        )
        last = graph.int_list(-1)
        both = graph.op("Concat", *(graph.op("Unsqueeze", each, last) for each in rotated), axis=-1)
        return graph.op("Reshape", both, graph.int_list(0, 0, 0, 2 * half))

    def attend(self, query: str, kv: list[str], mask: str) -> str:
        """Scaled dot-product attention, heads joined again: [B, T, D]."""
        graph, (key, value) = self.graph, kv
        scores = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = graph.op("Add", graph.op("Mul", scores, graph.scalar(self.config.head_dim**-0.5)), mask)
        heads = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
        joined = graph.op("Transpose", heads, perm=[0, 2, 1, 3])
        return graph.op("Reshape", joined, graph.int_list(0, 0, -1))

    def source_mask(self, attention_mask: str) -> str:
        """The additive mask of the source [B, 1, 1, L], from a mask of ones and zeros [B, L]."""
        graph = self.graph
        padding = graph.op("Sub", graph.scalar(1.0), graph.op("Cast", attention_mask, to=FLOAT))
        masked = graph.op("Mul", padding, graph.scalar(MASKED))
        return graph.op("Unsqueeze", masked, graph.int_list(1, 2))

    def causal_mask(self, begin: str, end: str) -> str:
        """The additive causal mask [T, J] of queries from `begin` to `end` and keys from 0 to `end`."""
        graph = self.graph
        first, last = (graph.op("Squeeze", position) for position in (begin, end))
        query = graph.op("Range", first, last, graph.int_scalar(1))
        key = graph.op("Range", graph.int_scalar(0), last, graph.int_scalar(1))
        later = graph.op(
            "Less",
            graph.op("Unsqueeze", query, graph.int_list(1)),
            graph.op("Unsqueeze", key, graph.int_list(0)),
        )
        return graph.op("Mul", graph.op("Cast", later, to=FLOAT), graph.scalar(MASKED))

    # The KV cache

    def past_inputs(self, index: int) -> list[str]:
        """Inputs for the cached keys and values of a layer: of self-attention, then of cross-attention."""
        return [
            self.graph.input(f"past_key_values.{index}.{side}.{name}", "FLOAT", self._cache_shape(length))
            for side, length in (("decoder", "past"), ("encoder", "past_source"))
            for name in ("key", "value")
        ]

    def present_outputs(self, index: int, side: str, kv: list[str]) -> None:
        """Make keys and values of a layer outputs, which are inputs of the next step."""
        shape = self._cache_shape("past_and_target" if side == "decoder" else "source")
        for name, value in zip(("key", "value"), kv, strict=True):
            self.graph.output(value, f"present.{index}.{side}.{name}", "FLOAT", shape)

    def _cache_shape(self, length: str) -> tuple[str | int, ...]:
        return "batch", self.config.heads, length, self.config.head_dim

    def cached_length(self, past: str, use_cache: str) -> str:
        """How many positions of the cache count: none if it is not to be used."""
        length = self.length(past, axis=2)
        return self.graph.op("Mul", length, self.graph.op("Cast", use_cache, to=INT64))

    def append(self, past: str, new: str, count: str) -> str:
        """The first `count` positions of a cache, and new ones behind them."""
        kept = self._slice(past, self.graph.int_list(0), count, axis=2)
        return self.graph.op("Concat", kept, new, axis=2)

    def cross_kv(self, hidden: str, use_cache: str, past: list[list[str]]) -> list[list[str]]:
        """Cross-attention keys and values of each layer: the cached ones, or computed for all at once."""
        layers, heads, head_dim = self.config.decoder_layers, self.config.heads, self.config.head_dim
        cached, computed = OnnxGraph(self.graph.root), OnnxGraph(self.graph.root)
        from_cache = [cached.op("Identity", value) for layer in past for value in layer]
        kv = self.linear("cross_kv", hidden, computed)
        kv = computed.op("Reshape", kv, computed.int_list(0, 0, 2 * layers, heads, head_dim))
        kv = computed.op("Transpose", kv, perm=[2, 0, 3, 1, 4])
        from_source = [
            computed.op("Gather", kv, computed.int_scalar(index), axis=0) for index in range(2 * layers)
        ]
        branches = {
            "then_branch": cached.as_branch(from_cache),
            "else_branch": computed.as_branch(from_source),
        }
        values = self.graph.multi_op("If", 2 * layers, use_cache, **branches)
        return [values[2 * index : 2 * index + 2] for index in range(layers)]

    # Shapes

    def length(self, value: str, axis: int = 1) -> str:
        """The length of an axis, in a list."""
        shape = self.graph.op("Shape", value)
        return self.graph.op("Slice", shape, self.graph.int_list(axis), self.graph.int_list(axis + 1))

    def _slice(self, value: str, begin: str, end: str, *, axis: int) -> str:
        return self.graph.op("Slice", value, begin, end, self.graph.int_list(axis))
