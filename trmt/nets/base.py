"""What every network promises; read this first.

Axes: S sentence, K hypothesis, L source position, T target position, N all tokens of a batch in a row,
D width, V vocabulary.

A network maps a `Source` and a target to hidden states (`forward`) and hidden states to logits
(`readout`). For translating it is `frozen` into a `Stepper`, which starts a `State` from a source and
takes it forward a few tokens at a time. Search sees only the state, and of it only `reorder`, `keep`,
`replace`, `join` and `fork`; networks know nothing of search, text or special ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.devices.transfer import to_device

Product = Callable[[Tensor], Tensor]  # x -> x @ weight.T + bias, on the last axis
Linear = Callable[[Tensor, Tensor | None], Product]  # (weight, bias) -> product: fp32, int8, ...


def cells(lengths_S: Tensor, width: int, *, count: int) -> Tensor:
    """Where each of `count` tokens in a row lies in a grid with rows of `width`; no device is waited for."""
    starts_S = lengths_S.cumsum(0) - lengths_S
    shift_S = torch.arange(len(lengths_S), device=lengths_S.device) * width - starts_S
    shift_N = torch.repeat_interleave(shift_S, lengths_S, output_size=count)
    return torch.arange(count, device=lengths_S.device) + shift_N


@dataclass(frozen=True)
class Ragged:
    """Sentences of different lengths, stored one after another without padding."""

    ids_N: Tensor
    lengths_S: Tensor
    longest: int  # kept on the host, so that asking for shapes never waits for a device

    @classmethod
    def of(cls, sentences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Self:
        """The sentences, given as lists of ids."""
        lengths = [len(sentence) for sentence in sentences]
        flat = [token for sentence in sentences for token in sentence]
        return cls(
            to_device(flat, device),
            to_device(lengths, device),
            max(lengths, default=0),
        )

    def __len__(self) -> int:
        return self.lengths_S.shape[0]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """The same sentences on another device."""
        return type(self)(
            self.ids_N.to(device, non_blocking=non_blocking),
            self.lengths_S.to(device, non_blocking=non_blocking),
            self.longest,
        )

    def width(self, multiple: int = 1) -> int:
        """The longest sentence, rounded up to a multiple."""
        return -(-self.longest // multiple) * multiple

    def cells_N(self, width: int) -> Tensor:
        """Where each token lies in the padded [S, width] grid, counted row by row."""
        return cells(self.lengths_S, width, count=self.ids_N.shape[0])

    def positions_N(self) -> Tensor:
        """Which token of its sentence each one is, counted from 0."""
        return self.cells_N(0)

    def padded(self, multiple: int = 1) -> tuple[Tensor, Tensor]:
        """The ids as a grid with zeros behind each sentence, and which cells are real."""
        width = self.width(multiple)
        ids = self.ids_N.new_zeros(len(self) * width)
        ids[self.cells_N(width)] = self.ids_N
        real = torch.arange(width, device=self.ids_N.device) < self.lengths_S[:, None]
        return ids.view(len(self), width), real

    def packed(self) -> tuple[Tensor, Tensor]:
        """The ids in a row and the S + 1 offsets at which sentences begin and end."""
        return self.ids_N, F.pad(self.lengths_S.cumsum(0), (1, 0))


@dataclass(frozen=True)
class Source(Ragged):
    """What a network reads: ids, and by name whatever else belongs to them (tags, segments, factors)."""

    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        moved = super().to(device, non_blocking=non_blocking)
        extras = {name: x.to(device, non_blocking=non_blocking) for name, x in self.extras.items()}
        return replace(moved, extras=extras)


@dataclass(frozen=True)
class Output:
    """What a network returns.

    `hidden` has one row for each target token: [N, D] from `forward`, [S, K, T, D] from `step`.
    `aux` holds named losses of the network's own as (sum, count), weighted already: an objective adds the
    sums to its own, and all are divided by its tokens. `attention` is there only when asked for, and where a
    network has it, as the weights of each layer over the source: [layers, S, heads, T, L] from `forward`,
    with K * T for T from `step`. So are the weights of both sides over themselves, but from `forward` only:
    `encoder_attention` [layers, S, heads, L, L] and `decoder_attention` [layers, S, heads, T, T]. A network
    may take `one_head` for what it says, or give them all.
    """

    hidden: Tensor
    aux: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    attention: Tensor | None = None
    encoder_attention: Tensor | None = None
    decoder_attention: Tensor | None = None


def one_head(layer: int, head: int) -> frozenset[str]:
    """What to want for the attention of one head of one layer alone; the layer may be counted from the last.

    Whoever asks has to see from the result whether there are more.
    """
    return frozenset({"attention", f"layer {layer}", f"head {head}"})


def narrowed(want: Collection[str], layers: int) -> tuple[range, slice]:
    """The layers and the heads whose attention is wanted."""
    numbers = {kind: int(number) for kind, _, number in (each.partition(" ") for each in want) if number}
    if not numbers:
        return range(layers if "attention" in want else 0), slice(None)
    layer = place_of(numbers["layer"], layers)
    return range(layer, layer + 1), slice(numbers["head"], numbers["head"] + 1)


def place_of(layer: int, layers: int) -> int:
    """A layer counted from 0, whether it was counted from the first or, below 0, from the last."""
    return min(layer, layers - 1) if layer >= 0 else max(layers + layer, 0)


def stacked(weights: Sequence[Tensor]) -> Tensor | None:
    """The weights of all layers as `Output` has them; None where nobody asked."""
    return torch.stack(list(weights)) if weights else None


class Own(Protocol):
    """The part of a state that belongs to each hypothesis.

    That of a fixed state also has `front(sentences, columns)`: a view of the first sentences, in which only
    the first columns along the target are looked at.
    """

    def reorder(self, parents_SK: Tensor) -> Own: ...
    def keep(self, sentences: Tensor) -> Own: ...
    def replace(self, places: Tensor, other: Any) -> Own: ...
    def join(self, other: Any) -> Own: ...
    def fork(self) -> Own: ...


@dataclass(frozen=True)
class Memory:
    """The part of a state that the source left; it belongs to a sentence and changes only with it.

    `along_source` gives, for each tensor that runs along the source, the axis that does and the value
    that stands where there is no source.
    """

    tensors: Mapping[str, Tensor]
    along_source: Mapping[str, tuple[int, float]]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def keep(self, sentences: Tensor) -> Memory:
        """The memory of these sentences only."""
        kept = {name: tensor.index_select(0, sentences) for name, tensor in self.tensors.items()}
        return Memory(kept, self.along_source)

    def front(self, sentences: int, width: int) -> Memory:
        """A view of the first sentences, and no more than `width` along the source."""

        def cut(name: str, tensor: Tensor) -> Tensor:
            axis = self.along_source[name][0] if name in self.along_source else None
            front = tensor[:sentences]
            return front if axis is None else front.narrow(axis, 0, min(width, tensor.shape[axis]))

        return Memory({name: cut(name, tensor) for name, tensor in self.tensors.items()}, self.along_source)

    def join(self, other: Memory) -> Memory:
        """Both memories, padded to the longer source."""
        joined = {
            name: torch.cat(self._same_width(name, tensor, other[name]))
            for name, tensor in self.tensors.items()
        }
        return Memory(joined, self.along_source)

    def replace(self, places: Tensor, other: Memory) -> Memory:
        """The other's sentences instead of those at `places`; written in place, unless they are longer."""
        pairs = {name: self._same_width(name, tensor, other[name]) for name, tensor in self.tensors.items()}
        replaced = {name: mine.index_copy_(0, places, theirs) for name, (mine, theirs) in pairs.items()}
        return Memory(replaced, self.along_source)

    def fork(self) -> Memory:
        """A copy."""
        return Memory({name: tensor.clone() for name, tensor in self.tensors.items()}, self.along_source)

    def _same_width(self, name: str, mine: Tensor, theirs: Tensor) -> list[Tensor]:
        if name not in self.along_source:
            return [mine, theirs]
        axis, absent = self.along_source[name]
        width = max(mine.shape[axis], theirs.shape[axis])
        if mine.shape[axis] == theirs.shape[axis]:
            return [mine, theirs]
        # F.pad counts axes from the last one, two numbers for each.
        before = [0, 0] * (mine.dim() - 1 - axis)
        return [
            F.pad(each, [*before, 0, width - each.shape[axis]], value=absent)
            if each.shape[axis] < width
            else each
            for each in (mine, theirs)
        ]


@dataclass(frozen=True)
class Rows:
    """An `Own` of plain tensors [S, K, ...]: hidden vectors, windows of inputs."""

    tensors: tuple[Tensor, ...]

    def reorder(self, parents_SK: Tensor) -> Rows:
        sentence_S1 = torch.arange(parents_SK.shape[0], device=parents_SK.device)[:, None]
        return Rows(tuple(tensor[sentence_S1, parents_SK] for tensor in self.tensors))

    def front(self, sentences: int, columns: int) -> Rows:
        return Rows(tuple(tensor[:sentences] for tensor in self.tensors))

    def keep(self, sentences: Tensor) -> Rows:
        return Rows(tuple(tensor.index_select(0, sentences) for tensor in self.tensors))

    def replace(self, places: Tensor, other: Rows) -> Rows:
        pairs = zip(self.tensors, other.tensors, strict=True)
        return Rows(tuple(mine.index_copy(0, places, theirs) for mine, theirs in pairs))

    def join(self, other: Rows) -> Rows:
        return Rows(tuple(torch.cat(both) for both in zip(self.tensors, other.tensors, strict=True)))

    def fork(self) -> Rows:
        return Rows(tuple(tensor.clone() for tensor in self.tensors))


class State:
    """Where decoding stands: the memory of each sentence and what each hypothesis has seen.

    Whatever takes a state consumes it, because its tensors may be written in place; using it again
    raises. `fork` copies, and leaves the original usable. Positions are counted per sentence, so that
    sentences that joined later stand beside older ones.
    """

    def __init__(self, memory: Memory, own: Own, position_S: Tensor) -> None:
        self._memory, self._own, self._position_S = memory, own, position_S
        self._consumed = False

    def take(self) -> tuple[Memory, Any, Tensor]:
        """The three parts, for the one who consumes this state."""
        if self._consumed:
            raise RuntimeError("this decoding state was consumed before; fork() it to use it twice")
        self._consumed = True
        return self._memory, self._own, self._position_S

    def __len__(self) -> int:
        return self._position_S.shape[0]

    def reorder(self, parents_SK: Tensor) -> State:
        """Each hypothesis continues the one its entry in `parents_SK` names."""
        memory, own, position_S = self.take()
        return State(memory, own.reorder(parents_SK), position_S)

    def keep(self, sentences: Tensor) -> State:
        """Only these sentences, in this order."""
        memory, own, position_S = self.take()
        return State(memory.keep(sentences), own.keep(sentences), position_S.index_select(0, sentences))

    def replace(self, places: Tensor, other: State) -> State:
        """The sentences of `other` instead of those at `places`; both must hold as many hypotheses."""
        memory, own, position_S = self.take()
        their_memory, their_own, their_position_S = other.take()
        positions = position_S.index_copy(0, places, their_position_S)
        return State(memory.replace(places, their_memory), own.replace(places, their_own), positions)

    def join(self, other: State) -> State:
        """The sentences of both states, these first; both must hold as many hypotheses."""
        memory, own, position_S = self.take()
        their_memory, their_own, their_position_S = other.take()
        positions = torch.cat([position_S, their_position_S])
        return State(memory.join(their_memory), own.join(their_own), positions)

    def fork(self) -> State:
        """A copy that can go another way."""
        memory, own, position_S = self.take()
        self._consumed = False
        return State(memory.fork(), own.fork(), position_S.clone())


class Stepper(ABC):
    """A network frozen for inference: it advances states and reads out logits."""

    # Where both are the C kernels' own, the product of `readout` and what makes a step of one token.
    product: Any = None
    kernel: Any = None
    fixes: bool = False  # whether `start` can make states that are fixed

    @abstractmethod
    def start(
        self,
        source: Source,
        *,
        hypotheses: int,
        room: int,
        reorders: bool = True,
        fixed: bool = False,
    ) -> State:
        """A state for `hypotheses` continuations of each sentence, with space for `room` tokens.

        Without `reorders` the caller promises not to reorder, and the state may be laid out for that. A state
        that is `fixed` goes on with tensors of the same shapes, by steps that read no value from the device;
        so a device can replay them.
        """

    @abstractmethod
    def step(self, tokens_SKT: Tensor, state: State, *, want: Collection[str] = ()) -> tuple[Output, State]:
        """Take every hypothesis T tokens further."""

    @abstractmethod
    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        """The logits of the whole vocabulary, or of the ids in `only`."""

    def narrowed(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """What reads out the logits of these ids alone, with the bits they have among all; for many steps."""
        return lambda hidden: self.readout(hidden).index_select(-1, ids)

    def mixes_ages(self, hypotheses: int, room: int) -> bool:
        """Whether a sentence has the same bits beside others that are up to `room` tokens old."""
        return True


class Network(nn.Module):
    """What every network says of itself, whether it translates or only reads."""

    config: Any
    config_class: ClassVar[type]  # the dataclass its constructor takes
    begins_with_encoder: ClassVar[bool] = False  # True where it can take the encoder of `trmt pretrain`
    in_row: ClassVar[bool] = False  # True where `forward` computes no padding: a batch may hold any lengths
    # True where `forward` calls each module that is in a ModuleList, and has a matrix, exactly once.
    layers_called_once: ClassVar[bool] = False

    @property
    def couples_batch(self) -> bool:
        """Whether in training a sentence's output depends on its neighbours; in eval mode it never may."""
        return False

    @property
    def counts_tokens(self) -> bool:
        """Whether in training it counts all tokens it is given, so that no batch may be filled up."""
        return self.couples_batch

    @property
    def most_tokens(self) -> int:
        """The most tokens a sentence may have."""
        return int(getattr(getattr(self, "config", None), "longest", 1 << 30))


class Seq2Seq(Network, ABC):
    """A network that maps a source and a target prefix to the next target token."""

    @abstractmethod
    def forward(self, source: Source, target: Ragged, *, want: Collection[str] = ()) -> Output:
        """Teacher forcing: hidden states [N, D], one row for each token of `target`, in its order."""

    @abstractmethod
    def readout(self, hidden: Tensor, only: Tensor | None = None) -> Tensor:
        """The logits of the whole vocabulary, or of the ids in `only`."""

    def readout_matrix(self) -> Tensor | None:
        """The matrix [V, D] if `readout` is nothing but the product with it; a loss then goes in chunks."""
        return None

    @abstractmethod
    def frozen(self, linear: Linear) -> Stepper:
        """A stepper with today's weights, whose matrix products are made by `linear`."""
