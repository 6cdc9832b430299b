"""The contracts of networks; read this first.

Axes: S sentence, K hypothesis, L source position, T target position, N all tokens of a batch in a row,
D hidden size, V vocabulary.

Training calls `Seq2Seq.forward` (a source and a target prefix -> hidden states) and `readout` (hidden states
-> logits). Decoding goes through a `Stepper`, a frozen copy of the network: `start` encodes the source and
returns a `State`, `step` appends tokens to every hypothesis. A state has two halves. The encoder's belongs to
a sentence and is shared by its hypotheses (encoder output, cross-attention keys and values); the decoder's
belongs to each hypothesis (a KV cache, hidden vectors). Search calls `reorder`, `keep` and `replace` of a
state and nothing else; networks know nothing of search, text or special ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.nets.ragged import Ragged, Source
from trmt.nets.readout import Fp32Readout

Product = Callable[[Tensor], Tensor]  # x -> x @ weight.T + bias, on the last axis
Precision = Literal["fp32", "int8"]
UNLIMITED = 1 << 30  # positions


class Products(Protocol):
    """Makes the matrix products of a frozen network from their weights; `relu` adds one behind the product.

    int8 products declare `precision = "int8"`: what lies between them is then computed in double precision
    and rounded once, so that every implementation rounds activations to the same int8 values.
    """

    @property
    def precision(self) -> Precision: ...

    def __call__(self, weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> Product: ...


# What comes out


@dataclass(frozen=True)
class WantedWeights:
    """The attention weights that a caller wants in the `Output`, which are computed for it alone."""

    cross: bool = False
    encoder: bool = False  # self-attention of the encoder
    decoder: bool = False  # self-attention of the decoder
    layer: int | None = None  # of cross-attention only this layer, if negative counted from the last,
    head: int | None = None  # and of it only this head

    def cross_layers(self, layers: int) -> range:
        """The layers whose cross-attention is wanted."""
        if self.layer is None:
            return range(layers if self.cross else 0)
        layer = layer_index(self.layer, layers)
        return range(layer, layer + 1)

    def cross_heads(self, heads: int) -> slice:
        """The heads whose cross-attention is wanted."""
        if self.head is None:
            return slice(None)
        head = layer_index(self.head, heads)
        return slice(head, head + 1)


NO_WEIGHTS = WantedWeights()


def layer_index(layer: int, layers: int) -> int:
    """A layer counted from 0, whether it was counted from the first or, if negative, from the last."""
    return min(layer, layers - 1) if layer >= 0 else max(layers + layer, 0)


def stack_weights(weights: Sequence[Tensor]) -> Tensor | None:
    """The weights of all layers as `Output` has them; None if there are none."""
    return torch.stack(list(weights)) if weights else None


@dataclass(frozen=True)
class Output:
    """What a network computes for a batch.

    `hidden` has one row for each target token. `aux` holds named losses of the network's own, weighted sums
    over the batch, which an objective adds to its own. Attention weights are there if wanted and if the
    network has them; it may return more layers and heads than were wanted.
    """

    hidden: Tensor  # [N, D]
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    cross_attention: Tensor | None = None  # [layers, S, heads, T, L]
    encoder_attention: Tensor | None = None  # [layers, S, heads, L, L]
    decoder_attention: Tensor | None = None  # [layers, S, heads, T, T]


# The state of decoding


@dataclass(frozen=True)
class EncoderMemory:
    """The encoder's half of a state: tensors that begin with the sentence axis.

    `source_axes` gives, for each tensor that has one, its source axis and the value of padding on it.
    """

    tensors: Mapping[str, Tensor]
    source_axes: Mapping[str, tuple[int, float]]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def keep(self, sentences: Tensor) -> EncoderMemory:
        """Only these sentences, in this order."""
        kept = {name: tensor.index_select(0, sentences) for name, tensor in self.tensors.items()}
        return EncoderMemory(kept, self.source_axes)

    def view(self, sentences: int, source_length: int) -> EncoderMemory:
        """A view of the first sentences and the first source positions."""

        def cut(name: str, tensor: Tensor) -> Tensor:
            tensor = tensor[:sentences]
            if name not in self.source_axes:
                return tensor
            axis = self.source_axes[name][0]
            return tensor.narrow(axis, 0, min(source_length, tensor.shape[axis]))

        return EncoderMemory({name: cut(name, x) for name, x in self.tensors.items()}, self.source_axes)

    def replace(self, slots: Tensor, other: EncoderMemory) -> EncoderMemory:
        """The other's sentences in these slots; in place, unless the other's sources are longer."""
        pairs = {name: self._same_length(name, mine, other[name]) for name, mine in self.tensors.items()}
        replaced = {name: mine.index_copy_(0, slots, theirs) for name, (mine, theirs) in pairs.items()}
        return EncoderMemory(replaced, self.source_axes)

    def _same_length(self, name: str, *both: Tensor) -> list[Tensor]:
        if name not in self.source_axes:
            return list(both)
        axis, padding = self.source_axes[name]
        length = max(tensor.shape[axis] for tensor in both)
        # F.pad counts axes from the last one, two numbers for each.
        before = [0, 0] * (both[0].dim() - 1 - axis)
        return [
            F.pad(tensor, [*before, 0, length - tensor.shape[axis]], value=padding)
            if tensor.shape[axis] < length
            else tensor
            for tensor in both
        ]


class DecoderState(Protocol):
    """The decoder's half of a state: a KV cache, hidden vectors, whatever a hypothesis carries along."""

    def reorder(self, parents_SK: Tensor) -> DecoderState:
        """Each hypothesis continues the one that its entry names."""

    def keep(self, sentences: Tensor) -> DecoderState:
        """Only these sentences, in this order."""

    def replace(self, slots: Tensor, other: Any) -> DecoderState:
        """The sentences of another state of the same class in these slots."""

    def view(self, sentences: int, columns: int) -> DecoderState:
        """A view of the first sentences, of which attention covers the first target positions only."""


@dataclass(frozen=True)
class HiddenVectors:
    """A decoder state of plain tensors [S, K, ...]: hidden and cell vectors, windows of inputs."""

    tensors: tuple[Tensor, ...]

    def reorder(self, parents_SK: Tensor) -> HiddenVectors:
        sentence_S1 = torch.arange(parents_SK.shape[0], device=parents_SK.device)[:, None]
        return HiddenVectors(tuple(tensor[sentence_S1, parents_SK] for tensor in self.tensors))

    def keep(self, sentences: Tensor) -> HiddenVectors:
        return HiddenVectors(tuple(tensor.index_select(0, sentences) for tensor in self.tensors))

    def replace(self, slots: Tensor, other: HiddenVectors) -> HiddenVectors:
        pairs = zip(self.tensors, other.tensors, strict=True)
        return HiddenVectors(tuple(mine.index_copy(0, slots, theirs) for mine, theirs in pairs))

    def view(self, sentences: int, columns: int) -> HiddenVectors:
        return HiddenVectors(tuple(tensor[:sentences] for tensor in self.tensors))


class State:
    """The state of decoding some sentences: both halves, and how many tokens each sentence has.

    Whatever takes a state consumes it, because tensors may be written in place; using it again raises.
    Positions are counted per sentence, so that sentences that were added later decode beside older ones.
    """

    def __init__(self, memory: EncoderMemory, decoder: Any, position_S: Tensor) -> None:
        self._memory, self._decoder, self._position_S = memory, decoder, position_S
        self._consumed = False

    def take(self) -> tuple[EncoderMemory, Any, Tensor]:
        """The parts of the state, for whoever consumes it."""
        if self._consumed:
            raise RuntimeError("this decoding state was consumed before")
        self._consumed = True
        return self._memory, self._decoder, self._position_S

    def __len__(self) -> int:
        return self._position_S.shape[0]

    def reorder(self, parents_SK: Tensor) -> State:
        """Each hypothesis continues the one that its entry in `parents_SK` names."""
        memory, decoder, position_S = self.take()
        return State(memory, decoder.reorder(parents_SK), position_S)

    def keep(self, sentences: Tensor) -> State:
        """Only these sentences, in this order."""
        memory, decoder, position_S = self.take()
        return State(memory.keep(sentences), decoder.keep(sentences), position_S.index_select(0, sentences))

    def replace(self, slots: Tensor, other: State) -> State:
        """The sentences of `other` in these slots; both must hold as many hypotheses."""
        memory, decoder, position_S = self.take()
        their_memory, their_decoder, their_position_S = other.take()
        positions = position_S.index_copy(0, slots, their_position_S)
        return State(memory.replace(slots, their_memory), decoder.replace(slots, their_decoder), positions)


@dataclass(frozen=True)
class Decoding:
    """What a decoder state has to hold."""

    hypotheses: int
    max_tokens: int
    reorders: bool = True  # False: the caller promises not to reorder, and the state may be laid out for that
    static: bool = (
        False  # tensors keep their shapes and no step needs a device sync, so steps can be replayed
    )


# Networks


class Network(nn.Module):
    """What every network says of itself, whether it translates or only encodes."""

    config: Any  # an instance of config_class
    config_class: ClassVar[type]
    takes_encoder: ClassVar[bool] = False  # whether it can start from the encoder that `trmt pretrain` trains
    attends_packed: ClassVar[bool] = False  # whether some attention runs over packed tokens
    packs_tokens: ClassVar[bool] = False  # whether `forward` computes no padding: batches may mix lengths
    # Whether `forward` calls each module inside a ModuleList that has a matrix exactly once (for sharding).
    layers_called_once: ClassVar[bool] = False
    couples_batch: bool = False  # whether in training a sentence's output depends on its neighbours
    # Whether torch.compile makes few graphs of it, whatever the lengths of sentences are; a network that
    # loops over positions is compiled again for each length.
    pays_to_compile: ClassVar[bool] = False

    @property
    def counts_tokens(self) -> bool:
        """Whether training counts all tokens it is given, so that no batch may be filled up to a shape."""
        return self.couples_batch

    def packs_attention(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether, in training, attention computes no padding either: batches may be filled up to a shape."""
        return False

    @property
    def max_positions(self) -> int:
        """The most tokens a sentence may have."""
        return int(getattr(getattr(self, "config", None), "max_positions", UNLIMITED))

    def check_length(self, source: Ragged) -> None:
        """Refuse a source that has more tokens than there are positions."""
        if source.longest > self.max_positions:
            raise ConfigError(
                f"a source has {source.longest} tokens, the network has {self.max_positions} positions"
            )


class Seq2Seq(Network, ABC):
    """A network that maps a source and a target prefix to the next target token.

    `output` is the module whose `weight` [V, D] makes logits of hidden states; `output_bias`, if there is
    one, is added to them.
    """

    output: nn.Embedding
    output_bias: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("output_bias", None)

    @abstractmethod
    def forward(self, source: Source, target: Ragged, *, want: WantedWeights = NO_WEIGHTS) -> Output:
        """Teacher forcing: hidden states [N, D], one row for each token of `target`, in its order."""

    @abstractmethod
    def start(self, source: Source, decoding: Decoding) -> tuple[EncoderMemory, DecoderState]:
        """Encode the source; both halves of the state before the first target token."""

    @abstractmethod
    def step(
        self, tokens_SKT: Tensor, memory: EncoderMemory, decoder: Any, position_S: Tensor
    ) -> tuple[Tensor, DecoderState]:
        """Append T tokens to hypotheses that have `position_S`: their hidden states [S, K, T, D]."""

    def readout(self, hidden: Tensor) -> Tensor:
        """The logits of the vocabulary."""
        return F.linear(hidden, self.output.weight, self.output_bias)

    def readout_matrix(self) -> Tensor | None:
        """The matrix [V, D] if `readout` is nothing but the product with it; a loss then goes in chunks."""
        return self.output.weight if self.output_bias is None else None

    def same_beside_others(self, decoding: Decoding) -> bool:
        """Whether a sentence gets the same bits whatever the lengths of those decoded beside it are."""
        return True

    def frozen(self, products: Products) -> Stepper:
        """A stepper with today's weights, whose matrix products are made by `products`."""
        return Stepper(self, products)


class Stepper:
    """A network frozen for inference: it starts and advances states, and reads out logits."""

    static: bool = True  # whether `start` can make static states

    def __init__(self, net: Seq2Seq, products: Products) -> None:
        self.net = freeze(net, products)
        bias = None if net.output_bias is None else net.output_bias.detach()
        weight = net.output.weight.detach()
        half = weight.element_size() == 2
        # From hidden states to logits
        self.readout: Product = Fp32Readout(weight, bias) if half else products(weight, bias)

    def start(self, source: Source, decoding: Decoding) -> State:
        """The state of these sentences before their first token."""
        if decoding.max_tokens > self.net.max_positions:
            raise ConfigError(
                f"{decoding.max_tokens} target positions are asked for, the network has "
                f"{self.net.max_positions}; lower --max-length"
            )
        return State(*self.encoded(source, decoding), torch.zeros_like(source.lengths_S))

    def encoded(self, source: Source, decoding: Decoding) -> tuple[EncoderMemory, DecoderState]:
        """Both halves of that state."""
        return self.net.start(source, decoding)

    def step(self, tokens_SKT: Tensor, state: State) -> tuple[Tensor, State]:
        """Append T tokens to every hypothesis: their hidden states [S, K, T, D], and the new state."""
        memory, decoder, position_S = state.take()
        hidden_SKTD, decoder = self.net.step(tokens_SKT, memory, decoder, position_S)
        return hidden_SKTD, State(memory, decoder, position_S + tokens_SKT.shape[2])

    def same_beside_others(self, decoding: Decoding) -> bool:
        """Whether a sentence gets the same bits whatever the lengths of those decoded beside it are."""
        return self.net.same_beside_others(decoding)


M = TypeVar("M", bound=nn.Module)


def freeze(module: M, products: Products) -> M:
    """A copy of a module for inference, whose linear layers are made by `products`; parameters are shared.

    A module with a method `frozen_as` says itself what becomes of it.
    """
    if frozen_as := getattr(module, "frozen_as", None):
        return cast(M, frozen_as(products))
    if isinstance(module, nn.Linear):
        bias = None if module.bias is None else module.bias.detach()
        return cast(M, FrozenLinear(products(module.weight.detach(), bias)))
    return frozen_copy(module, products)


def frozen_copy(module: M, products: Products) -> M:
    """The same class in eval mode, its parameters without gradients, its children frozen."""
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy.training = False
    copy.__dict__["_parameters"] = {
        name: None if parameter is None else parameter.detach()
        for name, parameter in module._parameters.items()
    }
    copy.__dict__["_modules"] = {
        name: None if child is None else freeze(child, products) for name, child in module._modules.items()
    }
    return copy


def to_half(net: nn.Module, dtype: torch.dtype) -> None:
    """Convert a network to 16 bits, in place.

    What a module names in `keeps_fp32` stays: positions, whose angles 16 bits cannot tell apart.
    """
    for module in net.modules():
        keeps_fp32 = getattr(module, "keeps_fp32", ())
        for name, parameter in module.named_parameters(recurse=False):
            if name not in keeps_fp32 and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if name not in keeps_fp32 and buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))


class FrozenLinear(nn.Module):
    """A linear layer in inference."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)
