"""A Transformer, or one with an SSRU decoder, decoded by C kernels: the source in one call, a step in one
call.

Axes: S sentence, K hypothesis, T target position, C columns of the cache, L source position, N source tokens
in a row, D hidden size, A layers of the decoder.
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

from trmt.errors import BundleError
from trmt.native import products
from trmt.native.addresses import address, check_returned, is_plain, pointer
from trmt.native.products import PackedProduct, PackedProducts
from trmt.nets.base import Decoding, EncoderMemory, FrozenLinear, State, Stepper
from trmt.nets.ragged import Source
from trmt.nets.ssru import SSRUDecoder
from trmt.nets.transformer import Decoder, DecoderLayer, Encoder, Transformer, TransformerConfig

FIRST_COLUMNS = 32  # of a cache that is no longer empty
LANES = 8  # doubles that a kernel takes at a time, at most


def steps_natively(net: nn.Module) -> bool:
    """Whether there is a kernel for this network; subclasses that compute something else have none."""
    if type(net) is not Transformer and type(net) is not SSRUDecoder:
        return False
    config = net.config
    return (
        config.activation == "relu"
        and config.embedding_scale
        and not config.embedding_norm
        and config.positions != "rotary"
        and config.head_dim % LANES == 0
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("self_in", "self_out", "cross_query", "cross_out", "inner", "outer")
    )


class _Network(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "width", "heads", "feed_forward")),
        *((name, ctypes.c_int64) for name in ("pre_norm", "ssru", "processor")),
        *((name, ctypes.c_int64) for name in ("vocabulary", "max_positions")),
        ("epsilon", ctypes.c_double),
        ("embedding_scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("embedding", "positions", "layer", "norms")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sentences", "hypotheses", "columns", "length")),
        *((name, ctypes.c_int64) for name in ("slots", "sources")),
        *((name, ctypes.c_void_p) for name in ("tokens", "position", "ancestors", "slot", "cache")),
        *((name, ctypes.c_void_p) for name in ("source", "memory", "mask", "hidden")),
    )


class _Sources(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sentences", "length", "tokens")),
        *((name, ctypes.c_void_p) for name in ("ids", "starts", "memory", "mask")),
    )


class NativeNetwork:
    """An encoder or a decoder as the kernels take it; `frozen` is the copy whose products are packed."""

    def __init__(self, net: Transformer, half: Encoder | Decoder, frozen: Encoder | Decoder) -> None:
        config = net.config
        norms = [norm for layer in half.layers for norm in _norms(layer)]
        norms += [half.norm] if half.norm is not None else []
        rows = [_products(layer) for layer in frozen.layers]
        positions, tokens = half.embedding.positions, half.embedding.tokens.weight.detach()
        assert positions is not None and rows[0][0] is not None
        width, vocabulary, max_positions = config.d_model, len(tokens), positions.shape[1]
        decoder = isinstance(half, Decoder)
        ssru = decoder and isinstance(net, SSRUDecoder)
        for row in rows:
            for product, sizes in zip(row, _sizes(config, decoder=decoder, ssru=ssru), strict=True):
                check_sizes(product, sizes)
        self.layers = (_Layer * len(rows))(
            *(_Layer(*(each and each.address for each in row)) for row in rows)
        )
        parts = [(norm.weight, getattr(norm, "bias", None)) for norm in norms]
        self.norms = (_Norm * len(norms))(
            *(_Norm(*(each if each is None else address(each, width) for each in pair)) for pair in parts)
        )
        self.kept = parts, rows, positions, tokens  # what the pointers point to
        self.network = _Network(
            len(rows),
            width,
            config.heads,
            config.feed_forward,
            half.norm is not None,
            ssru,
            rows[0][0].processor,
            vocabulary,
            max_positions,
            float(norms[0].eps or 0),
            math.sqrt(width),
            address(tokens, vocabulary, width),
            address(positions, 1, max_positions, width),
            ctypes.addressof(self.layers),
            ctypes.addressof(self.norms),
        )
        self.address = ctypes.addressof(self.network)


def _norms(layer: Any) -> list[Any]:
    """The norms of a layer in the order of its sublayers."""
    cross = [layer.cross_norm] if isinstance(layer, DecoderLayer) else []
    return [layer.self_norm, *cross, layer.feed_forward_norm]


def _products(layer: Any) -> list[PackedProduct | None]:
    """The products of a layer in the order of `_Layer`."""
    names = ("self_qkv", "self_out", "cross_query", "cross_out")
    if hasattr(layer, "ssru"):
        names = ("ssru", *names[1:])
    linears = [getattr(layer, name, None) for name in names]
    linears += [layer.feed_forward.inner, layer.feed_forward.outer]
    return [
        linear.product
        if isinstance(linear, FrozenLinear) and isinstance(linear.product, PackedProduct)
        else None
        for linear in linears
    ]


def check_sizes(product: PackedProduct | None, sizes: tuple[int, int] | None) -> None:
    """Refuse a product that has not these outputs and inputs, which the kernels take it to have."""
    found = None if product is None else (product.outputs, product.inputs)
    if found != sizes:
        raise BundleError(
            f"a layer has weights of the sizes {found or 'none'}, but the network needs {sizes or 'none'}; "
            "they belong to another network"
        )


def _sizes(config: TransformerConfig, *, decoder: bool, ssru: bool) -> list[tuple[int, int] | None]:
    """The outputs and inputs of a layer's products, in the order of `_Layer`."""
    width, square = config.d_model, (config.d_model, config.d_model)
    own = [((2 if ssru else 3) * width, width), None if ssru else square]
    cross = [square if decoder else None] * 2
    return [*own, *cross, (config.feed_forward, width), (width, config.feed_forward)]


@dataclass(frozen=True)
class SourceMemory(EncoderMemory):
    """Cross-attention keys and values; they stay where they are when sentences leave.

    `kv` holds them [.., 2 * A, L, D] for every layer of the decoder, `mask` is added to scores. `slot_S` says
    which of them belong to each sentence.
    """

    slot_S: Tensor

    @classmethod
    def of(cls, kv: Tensor, mask: Tensor) -> SourceMemory:
        """Every sentence in its own slot."""
        return cls(
            {"kv": kv, "mask": mask}, {"kv": (2, 0.0), "mask": (3, -math.inf)}, torch.arange(len(mask))
        )

    def compact(self) -> SourceMemory:
        """The same without what belongs to no sentence any more."""
        if torch.equal(self.slot_S, torch.arange(len(self["mask"]))):
            return self
        kept = super().keep(self.slot_S)
        return SourceMemory.of(kept["kv"], kept["mask"])

    def keep(self, sentences: Tensor) -> SourceMemory:
        return replace(self, slot_S=self.slot_S.index_select(0, sentences))

    def replace(self, slots: Tensor, other: EncoderMemory) -> SourceMemory:
        assert isinstance(other, SourceMemory)
        replaced = super().replace(self.slot_S[slots], other.compact())
        return SourceMemory(replaced.tensors, replaced.source_axes, self.slot_S)


@dataclass
class NativeCache:
    """The decoder's half of the state: a KV cache and its table of ancestors, or the cells of an SSRU.

    Column c of a sentence in `cache` holds the keys and values of its hypotheses at position c. `reorder`
    moves none of it: `ancestors_SKC` names the hypothesis that made column c of the history of hypothesis k.
    `keep` neither: `slot_S` says which of the cached sentences is which. An SSRU has cells [A, slots, K, D]
    instead of columns.
    """

    cache: Tensor  # [A, 2, slots, C, K, D], or cells
    ancestors_SKC: Tensor
    slot_S: Tensor
    network: NativeNetwork
    longest: int | None = 0  # tokens of the longest hypothesis; None: to be asked of the positions
    call: _Call | None = None  # the last call of the kernel

    @classmethod
    def empty(cls, network: NativeNetwork, sentences: int, hypotheses: int) -> NativeCache:
        """A cache for so many sentences; it grows as it fills."""
        sizes = network.network
        if sizes.ssru:
            cache = torch.zeros(sizes.layers, sentences, hypotheses, sizes.width)
        else:
            cache = torch.zeros(sizes.layers, 2, sentences, 0, hypotheses, sizes.width)
        ancestors_SKC = torch.zeros(sentences, hypotheses, 0, dtype=torch.int32)
        return cls(cache, ancestors_SKC, torch.arange(sentences), network)

    @property
    def recurrent(self) -> bool:
        """Whether there are cells instead of columns."""
        return self.cache.dim() == 4

    @property
    def columns(self) -> int:
        """How many tokens of each hypothesis there is space for."""
        return self.ancestors_SKC.shape[2]

    @property
    def slots(self) -> int:
        """How many sentences there is space for."""
        return self.cache.shape[1 if self.recurrent else 2]

    def advance(self, position_S: Tensor, count: int) -> None:
        """Make space for `count` tokens more of hypotheses that have `position_S` tokens."""
        before = int(position_S.max()) if self.longest is None else self.longest
        self.longest = before + count
        self.reserve(self.longest)

    def reserve(self, columns: int) -> None:
        """Make space for so many tokens."""
        if columns <= self.columns:
            return
        columns = max(columns, 2 * self.columns, FIRST_COLUMNS)
        self.ancestors_SKC = F.pad(self.ancestors_SKC, [0, columns - self.columns])
        if not self.recurrent:
            layers, _, _, before, hypotheses, width = self.cache.shape
            # NumPy's zeros, unlike PyTorch's, take up memory only where something is written.
            shape = (layers, 2, len(self.slot_S), columns, hypotheses, width)
            wider = torch.from_numpy(np.zeros(shape, np.float32))
            wider[:, :, :, :before] = self.cache.index_select(2, self.slot_S)
            self.cache, self.slot_S = wider, torch.arange(len(self.slot_S))

    def reorder(self, parents_SK: Tensor) -> NativeCache:
        parents_SK = parents_SK.contiguous()
        parents = address(parents_SK, *self.ancestors_SKC.shape[:2], dtype=torch.long)
        loaded = products.library()
        assert loaded is not None
        step = _Step(*parents_SK.shape, self.columns, 0, self.slots)
        step.ancestors, step.slot = self.ancestors_SKC.data_ptr(), self.slot_S.data_ptr()
        step.cache = self.cache.data_ptr()
        check_returned(loaded.trmt_reorder(self.network.address, ctypes.addressof(step), parents))
        return self

    def keep(self, sentences: Tensor) -> NativeCache:
        self.slot_S = self.slot_S.index_select(0, sentences)
        self.ancestors_SKC = self.ancestors_SKC.index_select(0, sentences)
        self.longest = None
        return self

    def replace(self, slots: Tensor, other: NativeCache) -> NativeCache:
        columns = other.columns
        self.reserve(columns)
        if self.recurrent:
            self.cache.index_copy_(1, self.slot_S[slots], other.cache.index_select(1, other.slot_S))
        else:
            theirs = other.cache.index_select(2, other.slot_S)
            self.cache[:, :, :, :columns].index_copy_(2, self.slot_S[slots], theirs)
        self.ancestors_SKC[:, :, :columns].index_copy_(0, slots, other.ancestors_SKC)
        self.longest = None
        return self

    def view(self, sentences: int, columns: int) -> NativeCache:
        raise NotImplementedError("native states are not static")


@dataclass(frozen=True)
class _Call:
    """Pointers for the kernel, and the tensors they point to."""

    step: _Step
    tensors: tuple[Tensor, ...]

    def still(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether these are the same tensors."""
        return all(mine is theirs for mine, theirs in zip(self.tensors, tensors, strict=True))


class NativeStepper(Stepper):
    """A stepper whose encoder and decoding steps are one call each."""

    static = False

    def __init__(self, net: Transformer, packed: PackedProducts) -> None:
        super().__init__(net, packed)
        assert isinstance(self.net, Transformer) and isinstance(self.net.cross_kv, FrozenLinear)
        assert isinstance(self.net.cross_kv.product, PackedProduct)
        self.encoder = NativeNetwork(net, net.encoder, self.net.encoder)
        self.decoder = NativeNetwork(net, net.decoder, self.net.decoder)
        self.cross_kv = self.net.cross_kv.product
        width = net.config.d_model
        check_sizes(self.cross_kv, (2 * net.config.decoder_layers * width, width))
        self.loaded: Any = products.library()
        self.width = net.config.d_model

    def encoded(self, source: Source, decoding: Decoding) -> tuple[SourceMemory, NativeCache]:
        cache = NativeCache.empty(self.decoder, len(source), decoding.hypotheses)
        return self.encode(source), cache

    def encode(self, source: Source) -> SourceMemory:
        """The cross-attention keys and values of these sources."""
        self.net.check_length(source)
        ids_N, starts = source.packed()
        ids_N = ids_N.contiguous()
        address(ids_N, len(ids_N), dtype=torch.long)
        address(starts, len(source) + 1, dtype=torch.long)
        kv = torch.empty(len(source), 2 * self.decoder.network.layers, source.longest, self.width)
        mask = torch.empty(len(source), 1, 1, source.longest)
        pointers = map(pointer, (ids_N, starts, kv, mask))
        sources = _Sources(len(source), source.longest, len(ids_N), *pointers)
        arguments = self.encoder.address, self.cross_kv.address, ctypes.addressof(sources)
        check_returned(self.loaded.trmt_encode(*arguments))
        return SourceMemory.of(kv, mask)

    def step(self, tokens_SKT: Tensor, state: State) -> tuple[Tensor, State]:
        memory, cache, position_S = state.take()
        cache.advance(position_S, tokens_SKT.shape[2])
        hidden = []
        for tokens_SK in tokens_SKT.unbind(2):
            tokens_SK = tokens_SK.contiguous()
            hidden_SKD = torch.empty(*tokens_SK.shape, self.width)
            step = self.prepared(tokens_SK, position_S, cache, memory)
            step.hidden = hidden_SKD.data_ptr()
            check_returned(self.loaded.trmt_step(self.decoder.address, ctypes.addressof(step)))
            hidden.append(hidden_SKD)
            position_S.add_(1)  # in place: the kernel has its address
        return torch.stack(hidden, 2), State(memory, cache, position_S)

    def prepared(
        self, tokens_SK: Tensor, position_S: Tensor, cache: NativeCache, memory: EncoderMemory
    ) -> _Step:
        """The arguments of a step with these tokens, still without the address of its result."""
        assert isinstance(memory, SourceMemory)
        sources = memory.slot_S, memory["kv"], memory["mask"]
        tensors = (position_S, cache.ancestors_SKC, cache.slot_S, cache.cache, *sources)
        call = cache.call
        if call is None or not call.still(tensors):
            assert all(is_plain(tensor) for tensor in tensors)
            kv = memory["kv"]
            address(kv, len(kv), 2 * self.decoder.network.layers, kv.shape[2], self.width)
            step = _Step(*tokens_SK.shape, cache.columns, kv.shape[2], cache.slots, len(kv))
            names = ("position", "ancestors", "slot", "cache", "source", "memory", "mask")
            for name, tensor in zip(names, tensors, strict=True):
                setattr(step, name, tensor.data_ptr())
            call = cache.call = _Call(step, tensors)
        call.step.tokens = address(tokens_SK, *cache.ancestors_SKC.shape[:2], dtype=torch.long)
        return call.step

    def same_beside_others(self, decoding: Decoding) -> bool:
        return True
