"""The options with which tests make each registered network.

A registered network that is not in the table is tested with its defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trmt.registry import ARCHITECTURES


@dataclass(frozen=True)
class Variant:
    """A network and its options, and which attention weights it returns if they are wanted."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: frozenset[str] | None = None  # of cross, encoder and decoder; None: nothing is known

    def __str__(self) -> str:
        return "-".join([self.name, *map(str, self.options.values())])


def each(name: str, weights: str, *options: Mapping[str, Any]) -> list[Variant]:
    """The network with each of these options; `weights` are names with spaces between them."""
    return [Variant(name, one, frozenset(weights.split())) for one in options]


# The defaults first; every option occurs in some combination with the others.
TABLE: Mapping[str, list[Variant]] = {
    "transformer": each(
        "transformer",
        "cross encoder decoder",
        {},
        {"norm_position": "pre", "norm": "rms", "activation": "swiglu", "positions": "rotary"},
        {"positions": "learned", "activation": "gelu", "tied": "none", "decoder_layers": 1},
        {"norm_position": "pre", "activation": "swish", "tied": "target", "output_bias": True, "heads": 1},
        {"embedding_norm": True, "embedding_scale": False, "position_offset": 2, "norm_epsilon": 1e-3},
    ),
    "ssru": each(
        "ssru",
        "cross encoder",
        {},
        {"norm_position": "pre", "norm": "rms", "positions": "learned", "decoder_layers": 1},
        {"positions": "rotary", "activation": "gelu", "tied": "none", "heads": 4},
    ),
}


def variants(*, defaults: bool = False) -> list[Variant]:
    """All registered networks with all their options, or with `defaults` each network once."""
    found = [TABLE.get(name, [Variant(name)]) for name in ARCHITECTURES]
    return [variant for several in found for variant in several[: 1 if defaults else None]]
