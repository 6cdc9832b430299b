"""The Transformer's decoder one token at a time: by one call of a kernel, or the same in plain PyTorch.

Axes: S sentence, K hypothesis, C columns of the cache, L source position, H heads, P width of one head,
D width, A layers.

What lies between the matrix products is computed in double precision and rounded to fp32 once. Then it does
not matter in which order a kernel and PyTorch add: they differ in the last bit of one number in many
millions, and int8 products after it hardly ever see that. This is how int8 gives the same text with and
without kernels.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.native import products
from trmt.native.products import Int8, Native
from trmt.nets.base import Memory

NORMS = ("own_norm", "cross_norm", "feed_norm")
FIRST_COLUMNS = 32  # of a cache that is no longer empty
WIDE = 8  # doubles that the kernel takes at a time, at most


@dataclass
class Cache:
    """Keys and values of every hypothesis, and a table of who descends from whom.

    `pairs_A2SCKD` holds in column c of a sentence what its hypotheses were given at position c. `reorder`
    moves none of it: `table_SKC` says which hypothesis made column c of the history of hypothesis k. Nor does
    `keep`: `place_S` says which of its sentences is which.
    """

    pairs_A2SCKD: Tensor
    table_SKC: Tensor
    place_S: Tensor
    longest: int | None = 0  # tokens of the longest hypothesis; None: it has to be looked up
    call: _Call | None = None  # how the kernel was called last

    @classmethod
    def empty(cls, sizes: tuple[int, int], *, layers: int, width: int) -> Cache:
        """A cache for `sizes` = (sentences, hypotheses); it grows as it fills."""
        sentences, hypotheses = sizes
        return cls(
            torch.zeros(layers, 2, sentences, 0, hypotheses, width),
            torch.zeros(sentences, hypotheses, 0, dtype=torch.int32),
            torch.arange(sentences),
        )

    @property
    def columns(self) -> int:
        """How many tokens of each hypothesis there is space for."""
        return self.table_SKC.shape[2]

    def go_on(self, position_S: Tensor, count: int) -> None:
        """Space for `count` tokens more, which are about to come; so many as `position_S` says are there."""
        before = int(position_S.max()) if self.longest is None else self.longest
        self.longest = before + count
        self.make_room(self.longest)

    def make_room(self, columns: int) -> None:
        """Space for so many tokens."""
        if columns > self.columns:
            self._widen(max(columns, 2 * self.columns, FIRST_COLUMNS))

    def _widen(self, columns: int) -> None:
        layers, parts, _, _, hypotheses, width = self.pairs_A2SCKD.shape
        shape = (layers, parts, len(self.place_S), columns, hypotheses, width)
        # NumPy's zeros, unlike PyTorch's, take up memory only where something is written.
        wider = torch.from_numpy(np.zeros(shape, np.float32))
        wider[:, :, :, : self.columns] = self.pairs_A2SCKD.index_select(2, self.place_S)
        self.pairs_A2SCKD, self.place_S = wider, torch.arange(len(self.place_S))
        self.table_SKC = F.pad(self.table_SKC, [0, columns - self.columns])

    def reorder(self, parents_SK: Tensor) -> Cache:
        if library := products.library():
            parents_SK = parents_SK.contiguous()
            library.trmt_reorder(parents_SK.data_ptr(), *self.table_SKC.shape, self.table_SKC.data_ptr())
        else:
            self.table_SKC = self.table_SKC.gather(1, parents_SK[:, :, None].expand_as(self.table_SKC))
        return self

    def keep(self, sentences: Tensor) -> Cache:
        self.place_S = self.place_S.index_select(0, sentences)
        self.table_SKC = self.table_SKC.index_select(0, sentences)
        self.longest = None
        return self

    def replace(self, places: Tensor, other: Cache) -> Cache:
        columns = other.columns
        self.make_room(columns)
        theirs = other.pairs_A2SCKD.index_select(2, other.place_S)
        self.pairs_A2SCKD[:, :, :, :columns].index_copy_(2, self.place_S[places], theirs)
        self.table_SKC[:, :, :columns].index_copy_(0, places, other.table_SKC)
        self.longest = None
        return self

    def join(self, other: Cache) -> Cache:
        columns = max(self.columns, other.columns)
        for cache in (self, other):
            cache._widen(columns)
        pairs = torch.cat([self.pairs_A2SCKD, other.pairs_A2SCKD], 2)
        table = torch.cat([self.table_SKC, other.table_SKC])
        return Cache(pairs, table, torch.arange(len(table)), None)

    def fork(self) -> Cache:
        return Cache(self.pairs_A2SCKD.clone(), self.table_SKC.clone(), self.place_S.clone(), self.longest)

    def mark(self, position_S: Tensor) -> None:
        """Enter the tokens at `position_S` into the table."""
        column = position_S[:, None, None].expand(-1, self.table_SKC.shape[1], 1)
        own_K = torch.arange(self.table_SKC.shape[1], dtype=torch.int32)
        self.table_SKC.scatter_(2, column, own_K[None, :, None].expand_as(column))

    def put(self, layer: int, key_SKD: Tensor, value_SKD: Tensor, position_S: Tensor) -> None:
        """Store what the tokens at `position_S` gave."""
        for part, new in enumerate((key_SKD, value_SKD)):
            self.pairs_A2SCKD[layer, part, self.place_S, position_S] = new

    def histories(self, layer: int, columns: int) -> tuple[Tensor, Tensor]:
        """The keys and values [S, K, C, D] of each hypothesis and its ancestors."""
        index_SCK = self.table_SKC[:, :, :columns].long().transpose(1, 2)
        pairs_2SCKD = self.pairs_A2SCKD[layer, :, :, :columns].index_select(1, self.place_S)
        index = index_SCK[None, ..., None].expand_as(pairs_2SCKD)
        key_SCKD, value_SCKD = pairs_2SCKD.gather(3, index)
        return key_SCKD.transpose(1, 2), value_SCKD.transpose(1, 2)


@dataclass(frozen=True)
class Remembered(Memory):
    """What the source left, which stays where it is when sentences leave: `place_S` says which is whose.

    `both` are keys and values [.., 2 * A, L, D] for every layer of the decoder, `mask` is added to scores.
    """

    place_S: Tensor

    @classmethod
    def of(cls, both_SALD: Tensor, mask: Tensor) -> Remembered:
        """Every sentence in its own place."""
        along = {"both": (2, 0.0), "mask": (3, -math.inf)}
        return cls({"both": both_SALD, "mask": mask}, along, torch.arange(len(mask)))

    def gathered(self) -> Remembered:
        """The same without what has left."""
        if len(self.place_S) == len(self["mask"]) and torch.equal(
            self.place_S, torch.arange(len(self.place_S))
        ):
            return self
        return self._in_order(super().keep(self.place_S))

    def keep(self, sentences: Tensor) -> Remembered:
        return replace(self, place_S=self.place_S.index_select(0, sentences))

    def join(self, other: Memory) -> Remembered:
        assert isinstance(other, Remembered)
        return self._in_order(super(Remembered, self.gathered()).join(other.gathered()))

    def replace(self, places: Tensor, other: Memory) -> Remembered:
        assert isinstance(other, Remembered)
        replaced = super().replace(self.place_S[places], other.gathered())
        return Remembered(replaced.tensors, replaced.along_source, self.place_S)

    def fork(self) -> Remembered:
        return Remembered(super().fork().tensors, self.along_source, self.place_S.clone())

    @staticmethod
    def _in_order(memory: Memory) -> Remembered:
        return Remembered.of(memory["both"], memory["mask"])


def suits(config: Any, product: Any) -> bool:
    """Whether the decoder of this config, with products of this kind, is stepped by this module."""
    part = config.width // config.heads
    return (
        isinstance(product, Native | Int8)
        and config.activation == "relu"
        and config.embedding_scale
        and not config.embedding_norm
        and config.usual
        and config.has_table
        and part % WIDE == 0
    )


def kernel_for(net: Any, frozen: Any) -> Kernel | None:
    """The kernel for a decoder whose products are the kernels' own."""
    return Kernel(net, frozen) if isinstance(frozen.decoder[0].own, Native) else None


def round_once(net: Any, frozen: Any) -> None:
    """Let the norms of a frozen network compute in double precision."""
    for half in ("encoder", "decoder"):
        for layer, modules in zip(getattr(frozen, half), getattr(net, half), strict=True):
            for name in NORMS:
                if hasattr(modules, name):
                    setattr(layer, name, _norm(getattr(modules, name)))
        if net.config.norm_place == "pre":
            setattr(frozen, f"{half}_norm", _norm(getattr(net, f"{half}_norm")))


def _norm(module: Any) -> Any:
    weight = module.weight.detach().double()
    shape, eps = weight.shape, float(module.eps or 0)
    if isinstance(module, nn.RMSNorm):
        return lambda x: F.rms_norm(x.double(), shape, weight, eps).float()
    bias = module.bias.detach().double()
    return lambda x: F.layer_norm(x.double(), shape, weight, bias, eps).float()


def attend(query_SKD: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Attention that rounds once; keys and values are [S, K or 1, J, D], the additive mask [S, 1, 1, J]."""
    query, key, value = (
        x.unflatten(-1, (heads, -1)).transpose(-3, -2).double() for x in (query_SKD[:, :, None], key, value)
    )
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1]) + mask[:, None]
    return (scores.softmax(-1) @ value).flatten(2).float()


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("own", "own_out", "query", "cross_out", "inner", "outer")
    )


class _Network(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "width", "heads", "feed", "pre_norm", "processor")),
        ("epsilon", ctypes.c_double),
        ("embedding_scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("embedding", "positions", "layer", "norms")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sentences", "hypotheses", "room", "length", "places")),
        *((name, ctypes.c_void_p) for name in ("tokens", "position", "table", "place", "cache")),
        *((name, ctypes.c_void_p) for name in ("source", "memory", "mask", "hidden")),
    )


@dataclass(frozen=True)
class _Call:
    """Pointers for the kernel, and the tensors they point to."""

    step: _Step
    tensors: tuple[Tensor, ...]

    def still(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether these are the same tensors."""
        return all(mine is theirs for mine, theirs in zip(self.tensors, tensors, strict=True))


class Half:
    """The layers of a network's encoder (side 0) or decoder (side 1) as kernels take them.

    `net` is the network, `frozen` its tree of products.
    """

    def __init__(self, net: Any, frozen: Any, *, side: int) -> None:
        config, name = net.config, ("encoder", "decoder")[side]
        modules, layers = getattr(net, name), getattr(frozen, name)
        norms = [getattr(layer, norm) for layer in modules for norm in NORMS if hasattr(layer, norm)]
        pre = config.norm_place == "pre"
        norms += [getattr(net, f"{name}_norm")] if pre else []
        products_of = [
            (
                *(layer.own, layer.own_out, getattr(layer, "query", None)),
                *(getattr(layer, "cross_out", None), layer.feed.inner, layer.feed.outer),
            )
            for layer in layers
        ]
        positions = net.table if config.positions == "sinusoidal" else net.positions.detach()[side]
        embedding = (net.source_embedding, net.target_embedding)[side].weight.detach()
        self.layers = (_Layer * len(products_of))(
            *(_Layer(*(product and product.address for product in row)) for row in products_of)
        )
        self.norms = (_Norm * len(norms))(
            *(_Norm(norm.weight.data_ptr(), _pointer(getattr(norm, "bias", None))) for norm in norms)
        )
        self.kept = norms, products_of, positions, embedding  # what the pointers point to
        self.network = _Network(
            len(layers),
            config.width,
            config.heads,
            config.feed_forward,
            pre,
            layers[0].own.processor,
            float(norms[0].eps or 0),
            math.sqrt(config.width),
            embedding.data_ptr(),
            positions.data_ptr(),
            ctypes.addressof(self.layers),
            ctypes.addressof(self.norms),
        )
        self.address = ctypes.addressof(self.network)


class Kernel(Half):
    """A decoder whose step is one call."""

    def __init__(self, net: Any, frozen: Any) -> None:
        super().__init__(net, frozen, side=1)
        self.function = products.library().trmt_step
        self.width = net.config.width

    def step(self, tokens_SK: Tensor, position_S: Tensor, cache: Cache, memory: Remembered) -> Tensor:
        """The hidden states [S, K, D] after one more token of each hypothesis."""
        tokens_SK = tokens_SK.contiguous()
        hidden_SKD = torch.empty(*tokens_SK.shape, self.width)
        step = self.prepared(tokens_SK, position_S, cache, memory)
        step.hidden = hidden_SKD.data_ptr()
        self.function(self.address, ctypes.addressof(step))
        return hidden_SKD

    def prepared(self, tokens_SK: Tensor, position_S: Tensor, cache: Cache, memory: Remembered) -> _Step:
        """A step with these tokens as the kernel takes it, still without a place for what it finds."""
        sources = memory.place_S, memory.tensors["both"], memory.tensors["mask"]
        tensors = (position_S, cache.table_SKC, cache.place_S, cache.pairs_A2SCKD, *sources)
        call = cache.call
        if call is None or not call.still(tensors):
            call = cache.call = self._call(tokens_SK.shape, tensors)
        call.step.tokens = tokens_SK.data_ptr()
        return call.step

    @staticmethod
    def _call(sizes: tuple[int, ...], tensors: tuple[Tensor, ...]) -> _Call:
        assert all(tensor.is_contiguous() for tensor in tensors)
        cache, memory = tensors[3], tensors[5]
        step = _Step(*sizes, cache.shape[3], memory.shape[2], cache.shape[2])
        names = ("position", "table", "place", "cache", "source", "memory", "mask")
        for name, tensor in zip(names, tensors, strict=True):
            setattr(step, name, tensor.data_ptr())
        return _Call(step, tensors)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
