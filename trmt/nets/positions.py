"""How a Transformer knows where a piece stands: told with its embedding, or when attention looks.

Axes: S sentence, L source position, Q queries, J keys, H heads, P width of one head, R distances that are
told apart, D width.

With e the embedding of the piece at position p, which attention looks at with queries q, keys k, values v:

    none         nobody knows
    sinusoidal   e + sine(p)              "Attention Is All You Need", 3.5
    learned      e + a vector of p        or, with position_join = "concatenate", beside fewer columns of e
    complex      e turned by w p          Wang et al., arXiv 1912.12333
    rotary       q and k turned by w p    Su et al., arXiv 2104.09864
    relative     q . (k + a) / sqrt(P)    and v + b, with vectors a and b for each distance up to `reach`;
                                          Shaw et al., arXiv 1803.02155
    t5           q . k / sqrt(P) + c      a number for each head and bucket of distances; Raffel et al.,
                                          arXiv 1910.10683
    alibi        q . k / sqrt(P) - m d    d the distance, m the slope of the head; Press et al., arXiv
                                          2108.12409

A complex embedding has width / 2 complex numbers r exp(i (w p + t)), whose real and imaginary parts stand
side by side. Amplitude r and phase t are of each piece and column, kept as the vector of the piece at
position 0, so that it can be shared with the output's; so are the frequencies w, which are learned too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trmt.errors import ConfigError
from trmt.nets import layers

Kind = Literal["none", "sinusoidal", "learned", "complex", "rotary", "relative", "t5", "alibi"]
TABLED = ("sinusoidal", "learned")  # a vector for each position, of which there are so many
BIASED = ("t5", "alibi")  # a number added to the scores of attention
UNBOUNDED = 1 << 30  # positions, where none needs a place in a table


@dataclass(frozen=True, kw_only=True)
class PositionConfig:
    """How pieces are told apart by where they stand."""

    width: int = 512
    heads: int = 8
    longest: int = 1024  # positions there are, with positions = "sinusoidal" or "learned"; others go on
    positions: Kind = "sinusoidal"
    position_join: Literal["add", "concatenate"] = "add"  # of the vector of a position to that of a piece
    position_width: int = 64  # columns of the positions with position_join = "concatenate"
    reach: int = 16  # pieces, beyond which positions = "relative" tells no distances apart
    buckets: int = 32  # of distances with positions = "t5"; in the encoder half of them for each side
    farthest: int = 128  # pieces, beyond which positions = "t5" tells no distances apart

    def check_positions(self) -> None:
        """Refuse what does not go together."""
        if self.width % self.heads:
            raise ConfigError(f"width = {self.width} cannot be divided into heads = {self.heads}; change one")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ConfigError('positions = "rotary" turns pairs of columns: width / heads must be even')
        if self.positions == "complex" and self.width % 2:
            raise ConfigError(
                f'positions = "complex" turns pairs of columns, and width = {self.width} is odd; change one'
            )
        if self.position_join == "concatenate":
            self._check_columns()
        if self.positions == "t5" and (self.buckets % 4 or self.farthest <= self.buckets // 2):
            raise ConfigError(
                f'positions = "t5" needs buckets in fours and farthest beyond half of them, and buckets = '
                f"{self.buckets}, farthest = {self.farthest}; change one"
            )

    def _check_columns(self) -> None:
        if not self.has_table:
            raise ConfigError(
                f'position_join = "concatenate" puts vectors of positions beside pieces, and positions = '
                f'"{self.positions}" has none; set positions = "sinusoidal" or "learned"'
            )
        if self.position_width >= self.width:
            raise ConfigError(
                f"position_width = {self.position_width} leaves no columns of width = {self.width} for "
                "pieces; change one"
            )

    @property
    def has_table(self) -> bool:
        """Whether there is a vector for each position, and no position beyond."""
        return self.positions in TABLED

    @property
    def limit(self) -> int:
        """The most pieces a sentence may have."""
        return self.longest if self.has_table else UNBOUNDED

    @property
    def piece_width(self) -> int:
        """How many columns of an embedding tell the piece."""
        return self.width - self.position_width * (self.position_join == "concatenate")


def make(net: nn.Module, config: Any, *, decodes: bool) -> None:
    """The tensors that positions need in a network, for its encoder and if it `decodes` for both sides."""
    sides, part = 1 + decodes, config.width // config.heads
    columns = config.position_width if config.position_join == "concatenate" else config.width
    if config.positions == "learned":
        net.positions = nn.Parameter(torch.randn(sides, config.longest, columns) * config.width**-0.5)
    elif config.positions == "sinusoidal":
        net.register_buffer("table", layers.sinusoids(config.longest, columns), persistent=False)
    elif config.positions == "rotary":
        net.register_buffer("table", layers.sinusoids(config.longest, part), persistent=False)
    elif config.positions == "alibi":
        net.register_buffer("table", slopes(config.heads), persistent=False)
    elif config.positions == "complex":
        net.source_turns = _turns(config.source_vocabulary, config.width)
        if decodes:
            tied = config.tied == "all"
            net.target_turns = net.source_turns if tied else _turns(config.target_vocabulary, config.width)
    elif config.positions == "t5":
        net.biases = nn.Parameter(torch.randn(sides, config.buckets, config.heads) * config.width**-0.5)
    elif config.positions == "relative":
        net.encoder_apart = _apart(config.encoder_layers, 2 * config.reach + 1, part)
        if decodes:
            net.decoder_apart = _apart(config.decoder_layers, config.reach + 1, part)


def _turns(vocabulary: int, width: int) -> nn.Parameter:
    """The frequencies of each piece, at first the same for all: those of the sinusoids.

    They have an axis more than they need, because int8 holds matrices and would hold these too roughly.
    """
    return nn.Parameter(layers.rates(width).repeat(1, vocabulary, 1))


def _apart(count: int, distances: int, part: int) -> nn.Parameter:
    """For each layer the vectors of distances, for keys and for values."""
    return nn.Parameter(torch.randn(count, 2, distances, part) * part**-0.5)


def slopes(heads: int) -> Tensor:
    """The slopes of ALiBi: for 2^n heads a geometric row; others take every second of the next longer row."""
    whole = 1 << (heads.bit_length() - 1)
    row = [2 ** (-8 * number / whole) for number in range(1, whole + 1)]
    longer = [2 ** (-4 * number / whole) for number in range(1, 2 * whole + 1, 2)]
    return torch.tensor(row + longer[: heads - whole])


# With the embedding


def placed(net: Any, config: Any, x: Tensor, ids: Tensor, position: Any, *, side: int) -> Tensor:
    """Scaled embeddings `x` with what tells their positions, which are a tensor, or one number for all."""
    if config.positions == "complex":
        turns = net.target_turns if side else net.source_turns
        position = position[..., None] if isinstance(position, Tensor) else position
        angle = F.embedding(ids, turns[0]) * position
        return layers.turned(x, angle.sin(), angle.cos())
    if not config.has_table:
        return x
    place = net.table[position] if config.positions == "sinusoidal" else net.positions[side, position]
    if config.position_join == "add":
        return x + place
    return torch.cat([x[..., : config.piece_width], place.expand(*x.shape[:-1], -1)], -1)


def grid(config: Any, ids_SL: Tensor) -> Tensor:
    """The positions [L] of a grid; padding beyond the last one stands there too."""
    return torch.arange(ids_SL.shape[1], device=ids_SL.device).clamp(max=config.limit - 1)


# When attention looks


def angles(net: Any, position: Any, *, upto: int) -> Tensor:
    """The angles of rotary positions, which are below `upto`: beyond the table they are computed."""
    table = net.table
    if upto <= len(table):
        # Those of sentences that are done may be anywhere.
        return table[position.clamp(max=len(table) - 1) if isinstance(position, Tensor) else position]
    place = torch.as_tensor(position, device=table.device)
    return layers.sinusoids_at(place, table.shape[1]).to(table.dtype)


def by_distance(config: Any) -> bool:
    """Whether attention asks how far apart query and key are."""
    return config.positions in BIASED or config.positions == "relative"


def distances(queries: int, keys: int, device: torch.device) -> Tensor:
    """From each of the first queries to each of the first keys of a sentence: [1, Q, J]."""
    query_Q, key_J = torch.arange(queries, device=device), torch.arange(keys, device=device)
    return (key_J - query_Q[:, None])[None]


def look(
    net: Any,
    config: Any,
    layer: int,
    distance_SQJ: Tensor,
    *,
    side: int,
    dropout: float = 0.0,
    steady: bool = False,
) -> layers.Look:
    """What looks by distance, in place of `layers.attend`; `steady` gives the same bits for any padding."""
    if config.positions in BIASED:
        bias = biases(net, config, distance_SQJ, side=side)
        return lambda query, key, value, mask: layers.attend(
            query, key, value, (mask + bias).to(query.dtype), dropout=dropout
        )
    apart = (net.decoder_apart if side else net.encoder_apart)[layer]
    index_SQJ = _clipped(config, distance_SQJ, side=side)
    compute = _steadied if steady and distance_SQJ.device.type == "cpu" else related
    return lambda query, key, value, mask: compute((query, key, value), mask, apart, index_SQJ, dropout)


def weights(
    net: Any, config: Any, layer: int, query_SHQP: Tensor, key_SHJP: Tensor, mask: Tensor, *, side: int
) -> Tensor:
    """Where a layer looks by distance in sentences that stand in a grid: [S, H, Q, J]."""
    distance_SQJ = distances(query_SHQP.shape[2], key_SHJP.shape[2], query_SHQP.device)
    if config.positions in BIASED:
        bias = biases(net, config, distance_SQJ, side=side)
        return layers.attention_weights(query_SHQP, key_SHJP, mask + bias)
    apart = (net.decoder_apart if side else net.encoder_apart)[layer]
    return _related_weights(query_SHQP, key_SHJP, mask, apart[0], _clipped(config, distance_SQJ, side=side))


def _clipped(config: Any, distance_SQJ: Tensor, *, side: int) -> Tensor:
    return distance_SQJ.clamp(-config.reach, 0 if side else config.reach) + config.reach


def biases(net: Any, config: Any, distance_SQJ: Tensor, *, side: int) -> Tensor:
    """What is added to the scores of each head: [S, H, Q, J]."""
    if config.positions == "alibi":
        return -net.table[:, None, None] * distance_SQJ[:, None].abs()
    index_SQJ = bucket(distance_SQJ, buckets=config.buckets, farthest=config.farthest, both_sides=not side)
    return F.embedding(index_SQJ, net.biases[side]).permute(0, 3, 1, 2)


def bucket(distance: Tensor, *, buckets: int, farthest: int, both_sides: bool) -> Tensor:
    """T5's buckets: near distances have their own, farther ones share them by their logarithm."""
    before = (-distance).clamp(min=0)
    first = torch.zeros_like(distance)
    if both_sides:
        buckets //= 2
        first, before = (distance > 0) * buckets, distance.abs()
    near = buckets // 2
    share = torch.log(before.clamp(min=1).float() / near) / math.log(farthest / near)
    shared = near + (share * (buckets - near)).long()
    return first + torch.where(before < near, before, shared.clamp(max=buckets - 1))


def related(
    parts: tuple[Tensor, Tensor, Tensor], mask: Tensor, apart: Tensor, index_SQJ: Tensor, dropout: float
) -> Tensor:
    """Attention whose keys and values have a vector of their distance added: [S, Q, D]."""
    query_SHQP, key_SHJP, value_SHJP = parts
    key_RP, value_RP = apart
    weight_SHQJ = _related_weights(query_SHQP, key_SHJP, mask, key_RP, index_SQJ)
    weight_SHQJ = F.dropout(weight_SHQJ, dropout) if dropout else weight_SHQJ
    index = index_SQJ[:, None].expand_as(weight_SHQJ)
    share_SHQR = weight_SHQJ.new_zeros(*weight_SHQJ.shape[:3], len(value_RP)).scatter_add(
        -1, index, weight_SHQJ
    )
    out_SHQP = weight_SHQJ.to(value_SHJP.dtype) @ value_SHJP + share_SHQR.to(value_RP.dtype) @ value_RP
    return out_SHQP.transpose(1, 2).flatten(2)


def _related_weights(
    query_SHQP: Tensor, key_SHJP: Tensor, mask: Tensor, key_RP: Tensor, index_SQJ: Tensor
) -> Tensor:
    # Each query with each distance once, and then as often as there are keys at it.
    distant_SHQR = query_SHQP @ key_RP.t()
    index = index_SQJ[:, None].expand(*query_SHQP.shape[:2], -1, -1)
    score_SHQJ = query_SHQP @ key_SHJP.transpose(-2, -1) + distant_SHQR.gather(-1, index)
    return (score_SHQJ / math.sqrt(query_SHQP.shape[-1]) + mask).softmax(-1)


def _steadied(
    parts: tuple[Tensor, Tensor, Tensor], mask: Tensor, apart: Tensor, index_SQJ: Tensor, dropout: float
) -> Tensor:
    """The same in double precision, rounded once: then it does not matter in which order sums are made."""
    query, key, value = (part.double() for part in parts)
    return related((query, key, value), mask.double(), apart.double(), index_SQJ, dropout).to(parts[0].dtype)
