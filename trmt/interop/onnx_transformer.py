"""The Transformer as ONNX graphs: an encoder, and a decoder with and without what it remembers.

Axes: B batch, L source position, T target position, J keys, H heads, P width of one head, D width,
V vocabulary. Names without axes are those of values in the graph.
"""

from __future__ import annotations

import math
from typing import Any

from trmt.interop.base import rows
from trmt.interop.graph import Graph
from trmt.interop.to_huggingface import begun
from trmt.nets.layers import sinusoids
from trmt.nets.transformer import Transformer
from trmt.text.tokenizer import Tokenizer

FLOAT, INT64 = 1, 7  # TensorProto's numbers of types
BLOCKED = -1e9  # added where attention may not look


def encoder(net: Transformer, tokenizer: Tokenizer) -> Graph:
    """Ids and their mask to what the decoder attends to."""
    graph = Graph()
    ids = graph.input("input_ids", "INT64", ("batch", "source"))
    seen = graph.input("attention_mask", "INT64", ("batch", "source"))
    builder = _Builder(graph, net)
    end = graph.do("Slice", graph.do("Shape", ids), graph.integers(1), graph.integers(2))
    source_VD = rows(net.source_embedding.weight, tokenizer.source)
    x = builder.embedded("source_embedding", source_VD, ids, graph.integers(0), end, side=0)
    mask = builder.over_source(seen)

    def attended(name: str, x: str) -> str:
        query, key, value = builder.merged(name, x, graph.integers(0), end)
        return builder.attention(name, query, key, value, mask)

    for index in range(net.config.encoder_layers):
        name = f"encoder.{index}"
        x = builder.sublayer(f"{name}.own_norm", x, lambda x, name=name: attended(name, x))
        x = builder.sublayer(f"{name}.feed_norm", x, lambda x, name=name: builder.feed(name, x))
    x = builder.last("encoder_norm", x)
    graph.output(x, "last_hidden_state", "FLOAT", ("batch", "source", net.config.width))
    return graph


def decoder(net: Transformer, tokenizer: Tokenizer) -> Graph:
    """Ids, and what was remembered where `use_cache_branch` says that there is something, to logits."""
    graph, config = Graph(), net.config
    seen = graph.input("encoder_attention_mask", "INT64", ("batch", "source"))
    ids = graph.input("input_ids", "INT64", ("batch", "target"))
    hidden = graph.input("encoder_hidden_states", "FLOAT", ("batch", "source", config.width))
    builder = _Builder(graph, net)
    past = [
        [
            builder.past_input(index, side, kind)
            for side in ("decoder", "encoder")
            for kind in ("key", "value")
        ]
        for index in range(config.decoder_layers)
    ]
    cached = graph.input("use_cache_branch", "BOOL", (1,))
    begin = builder.used(past[0][0], cached)
    count = graph.do("Slice", graph.do("Shape", ids), graph.integers(1), graph.integers(2))
    end = graph.do("Add", begin, count)
    target_VD = begun(rows(net.target_embedding.weight, tokenizer.target), tokenizer.target)
    x = builder.embedded("target_embedding", target_VD, ids, begin, end, side=1)
    causal, mask = builder.causal(begin, end), builder.over_source(seen)
    memory = builder.memory(hidden, cached, [layer[2:] for layer in past])

    def look_back(index: int, x: str) -> str:
        query, key, value = builder.merged(f"decoder.{index}", x, begin, end)
        key = builder.extended(past[index][0], key, begin)
        value = builder.extended(past[index][1], value, begin)
        builder.present(key, index, "decoder", "key")
        builder.present(value, index, "decoder", "value")
        return builder.attention(f"decoder.{index}", query, key, value, causal)

    def look_over(index: int, x: str) -> str:
        query = builder.heads(builder.linear(f"decoder.{index}.query", x))
        key, value = memory[index]
        return builder.attention(f"decoder.{index}", query, key, value, mask, out="cross_out")

    for index in range(config.decoder_layers):
        name = f"decoder.{index}"
        x = builder.sublayer(f"{name}.own_norm", x, lambda x, index=index: look_back(index, x))
        x = builder.sublayer(f"{name}.cross_norm", x, lambda x, index=index: look_over(index, x))
        x = builder.sublayer(f"{name}.feed_norm", x, lambda x, name=name: builder.feed(name, x))
        for kind, value in zip(("key", "value"), memory[index], strict=True):
            builder.present(value, index, "encoder", kind)
    logits = builder.logits(builder.last("decoder_norm", x), target_VD, tokenizer)
    graph.output(logits, "logits", "FLOAT", ("batch", "target", tokenizer.target.vocabulary))
    # Programs go by the order of outputs too: logits first, then layer by layer.
    graph.outputs.insert(0, graph.outputs.pop())
    return graph


class _Builder:
    """The parts of a Transformer as nodes of a graph."""

    def __init__(self, graph: Graph, net: Transformer) -> None:
        self.graph, self.net, self.config = graph, net, net.config
        self.state: dict[str, Any] = net.state_dict()

    # Products and norms

    def linear(self, name: str, x: str, graph: Graph | None = None) -> str:
        graph = graph or self.graph
        weight = graph.weight(f"{name}.weight", self.state[f"{name}.weight"].t())
        bias = graph.weight(f"{name}.bias", self.state[f"{name}.bias"])
        return graph.do("Add", graph.do("MatMul", x, weight), bias)

    def norm(self, name: str, x: str) -> str:
        graph, module = self.graph, self.net.get_submodule(name)
        scale = graph.weight(f"{name}.weight", self.state[f"{name}.weight"])
        epsilon = float(module.eps)  # type: ignore[arg-type]
        if self.config.norm == "layer":
            bias = graph.weight(f"{name}.bias", self.state[f"{name}.bias"])
            return graph.do("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon)
        square = graph.do("ReduceMean", graph.do("Mul", x, x), axes=[-1], keepdims=1)
        root = graph.do("Sqrt", graph.do("Add", square, graph.number(epsilon)))
        return graph.do("Mul", graph.do("Div", x, root), scale)

    def sublayer(self, norm: str, x: str, inner: Any) -> str:
        if self.config.norm_place == "pre":
            return self.graph.do("Add", x, inner(self.norm(norm, x)))
        return self.norm(norm, self.graph.do("Add", x, inner(x)))

    def last(self, norm: str, x: str) -> str:
        return self.norm(norm, x) if self.config.norm_place == "pre" else x

    def feed(self, name: str, x: str) -> str:
        graph = self.graph
        inner = self.linear(f"{name}.feed.inner", x)
        if self.config.activation == "swiglu":
            gate, value = graph.many("Split", 2, inner, axis=-1)
            inner = graph.do("Mul", self._swish(gate), value)
        elif self.config.activation == "swish":
            inner = self._swish(inner)
        elif self.config.activation == "gelu":
            error = graph.do("Erf", graph.do("Mul", inner, graph.number(math.sqrt(0.5))))
            half = graph.do("Mul", inner, graph.number(0.5))
            inner = graph.do("Mul", half, graph.do("Add", error, graph.number(1.0)))
        else:
            inner = graph.do("Relu", inner)
        return self.linear(f"{name}.feed.outer", inner)

    def _swish(self, x: str) -> str:
        return self.graph.do("Mul", x, self.graph.do("Sigmoid", x))

    # Embeddings and logits

    def embedded(self, name: str, weight: Any, ids: str, begin: str, end: str, *, side: int) -> str:
        graph = self.graph
        found = graph.do("Gather", graph.weight(name, weight), ids, axis=0)
        x = graph.do("Mul", found, graph.number(math.sqrt(self.config.width)))
        if self.config.positions == "rotary":
            return x
        learned = self.config.positions == "learned"
        table = (
            self.state["positions"][side] if learned else sinusoids(self.config.longest, self.config.width)
        )
        return graph.do("Add", x, self._slice(graph.weight("positions", table), begin, end, axis=0))

    def logits(self, x: str, target_VD: Any, tokenizer: Tokenizer) -> str:
        graph = self.graph
        weight = graph.weight("target_embedding", target_VD)
        if self.config.tied == "none":
            weight = graph.weight("output", rows(self.net.output.weight, tokenizer.target))
        found = graph.do("MatMul", x, graph.do("Transpose", weight, perm=[1, 0]))
        if self.net.output_bias is None:
            return found
        bias = graph.weight("output_bias", rows(self.net.output_bias, tokenizer.target))
        return graph.do("Add", found, bias)

    # Attention

    def heads(self, x: str) -> str:
        """[B, T, D] -> [B, H, T, P]."""
        graph = self.graph
        shape = graph.integers(0, 0, self.config.heads, self.config.width // self.config.heads)
        return graph.do("Transpose", graph.do("Reshape", x, shape), perm=[0, 2, 1, 3])

    def merged(self, name: str, x: str, begin: str, end: str) -> tuple[str, str, str]:
        """Queries, keys and values from their merged product."""
        parts = self.graph.many("Split", 3, self.linear(f"{name}.own", x), axis=-1)
        query, key, value = (self.heads(part) for part in parts)
        if self.config.positions == "rotary":
            query, key = (self._rotated(part, begin, end) for part in (query, key))
        return query, key, value

    def _rotated(self, x: str, begin: str, end: str) -> str:
        """Each pair of columns turned by its position's angle."""
        graph, part = self.graph, self.config.width // self.config.heads
        table = sinusoids(self.config.longest, part)
        sine, cosine = (
            self._slice(graph.weight(name, table[:, first::2]), begin, end, axis=0)
            for first, name in enumerate(("sine", "cosine"))
        )
        pairs = graph.do("Reshape", x, graph.integers(0, 0, 0, part // 2, 2))
        even, odd = (graph.do("Gather", pairs, graph.integer(place), axis=-1) for place in (0, 1))
        turned = (
            graph.do("Sub", graph.do("Mul", even, cosine), graph.do("Mul", odd, sine)),
            graph.do("Add", graph.do("Mul", even, sine), graph.do("Mul", odd, cosine)),
        )
        last = graph.integers(-1)
        both = graph.do("Concat", *(graph.do("Unsqueeze", each, last) for each in turned), axis=-1)
        return graph.do("Reshape", both, graph.integers(0, 0, 0, part))

    def attention(
        self, name: str, query: str, key: str, value: str, mask: str, *, out: str = "own_out"
    ) -> str:
        graph, part = self.graph, self.config.width // self.config.heads
        scores = graph.do("MatMul", query, graph.do("Transpose", key, perm=[0, 1, 3, 2]))
        scores = graph.do("Add", graph.do("Mul", scores, graph.number(part**-0.5)), mask)
        found = graph.do("MatMul", graph.do("Softmax", scores, axis=-1), value)
        joined = graph.do("Transpose", found, perm=[0, 2, 1, 3])
        return self.linear(f"{name}.{out}", graph.do("Reshape", joined, graph.integers(0, 0, -1)))

    def over_source(self, seen: str) -> str:
        """What to add to scores over the source, [B, 1, 1, L], from a mask of ones and zeros."""
        graph = self.graph
        hidden = graph.do("Sub", graph.number(1.0), graph.do("Cast", seen, to=FLOAT))
        blocked = graph.do("Mul", hidden, graph.number(BLOCKED))
        return graph.do("Unsqueeze", blocked, graph.integers(1, 2))

    def causal(self, begin: str, end: str) -> str:
        """What to add to scores so that nobody sees what comes later, [T, J]."""
        graph = self.graph
        first, last = (graph.do("Squeeze", place) for place in (begin, end))
        query = graph.do("Range", first, last, graph.integer(1))
        key = graph.do("Range", graph.integer(0), last, graph.integer(1))
        late = graph.do(
            "Less",
            graph.do("Unsqueeze", query, graph.integers(1)),
            graph.do("Unsqueeze", key, graph.integers(0)),
        )
        return graph.do("Mul", graph.do("Cast", late, to=FLOAT), graph.number(BLOCKED))

    # What is remembered

    def past_input(self, index: int, side: str, kind: str) -> str:
        part = self.config.width // self.config.heads
        length = "past" if side == "decoder" else "past_source"
        shape = ("batch", self.config.heads, length, part)
        return self.graph.input(f"past_key_values.{index}.{side}.{kind}", "FLOAT", shape)

    def present(self, value: str, index: int, side: str, kind: str) -> None:
        part = self.config.width // self.config.heads
        length = "past_and_target" if side == "decoder" else "source"
        shape = ("batch", self.config.heads, length, part)
        self.graph.output(value, f"present.{index}.{side}.{kind}", "FLOAT", shape)

    def used(self, past: str, cached: str) -> str:
        """How many positions of the past count: none where there is nothing but a filler."""
        graph = self.graph
        length = graph.do("Slice", graph.do("Shape", past), graph.integers(2), graph.integers(3))
        return graph.do("Mul", length, graph.do("Cast", cached, to=INT64))

    def extended(self, past: str, new: str, used: str) -> str:
        kept = self._slice(past, self.graph.integers(0), used, axis=2)
        return self.graph.do("Concat", kept, new, axis=2)

    def memory(self, hidden: str, cached: str, past: list[list[str]]) -> list[list[str]]:
        """Keys and values of the source for each layer: as remembered, or computed for all at once."""
        layers = self.config.decoder_layers
        old, new = Graph(self.graph.whole), Graph(self.graph.whole)
        remembered = [old.do("Identity", value) for layer in past for value in layer]
        part = self.config.width // self.config.heads
        both = self.linear("memory", hidden, new)
        shape = new.integers(0, 0, 2 * layers, self.config.heads, part)
        turned = new.do("Transpose", new.do("Reshape", both, shape), perm=[2, 0, 3, 1, 4])
        computed = [new.do("Gather", turned, new.integer(place), axis=0) for place in range(2 * layers)]
        values = self.graph.many(
            "If", 2 * layers, cached, then_branch=old.branch(remembered), else_branch=new.branch(computed)
        )
        return [values[2 * index : 2 * index + 2] for index in range(layers)]

    def _slice(self, value: str, begin: str, end: str, *, axis: int) -> str:
        return self.graph.do("Slice", value, begin, end, self.graph.integers(axis))
