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


ALL = "cross encoder decoder"


def transformers(*variants: tuple[str, Mapping[str, Any]]) -> dict[str, list[Variant]]:
    """Variants of the Transformer, each under the first name that is in its own."""
    table: dict[str, list[Variant]] = {}
    for name, options in variants:
        table.setdefault(f"transformer-{name.partition('+')[0]}", []).extend(
            each(f"transformer-{name}", ALL, options)
        )
    return table


# The defaults first; every option occurs in some combination with the others.
TABLE: Mapping[str, list[Variant]] = {
    "transformer": each(
        "transformer",
        ALL,
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
    "rnn": [
        *each(
            "rnn",
            "cross",
            {},
            {"decoder_layers": 1, "encoder_layers": 1, "heads": 1, "tied": "none"},
            {"decoder_layers": 1, "encoder_layers": 1, "tied": "none"},
            {"score": "dot", "attention_step": "after", "cell": "lstm", "residual": True},
            {"score": "scaled", "cell": "rnn"},
            {"score": "general", "attention_step": "after", "input_feeding": True, "cell": "lstm"},
        ),
        *each(
            "rnn",
            "",
            {"context": "start", "cell": "lstm", "encoder_direction": "backward"},
            {"context": "start", "cell": "rnn", "encoder_direction": "forward", "summary": "mean"},
            {"context": "every", "cell": "gru", "summary": "max", "residual": True},
            {"context": "every", "cell": "lstm", "summary": "attention", "decoder_layers": 3},
        ),
    ],
    "rnn-attention": each(
        "rnn-attention",
        "cross",
        {},
        {"score": "cosine", "attention_step": "after", "heads": 1},
        {"score": "location", "encoder_direction": "forward"},
        {"score": "general", "attention": "monotonic", "attention_step": "after", "window": 2},
        {
            "score": "general",
            "attention": "predictive",
            "window": 2,
            "input_feeding": True,
            "attention_step": "after",
        },
        {"score": "location", "attention": "predictive", "window": 3, "attention_step": "after"},
        {"attention": "sampled", "summary": "mean"},
        {"attention": "sampled", "attention_step": "after", "score": "dot"},
        {"attention": "gumbel", "heads": 1},
        {"attend_once": True},
        {"attend_once": True, "attention_step": "after", "input_feeding": True, "score": "dot"},
        {"attend_once": True, "attention": "gumbel", "attention_step": "after"},
        {"attend_once": True, "attention": "predictive", "window": 4, "summary": "max"},
    ),
    "hierarchical": each(
        "hierarchical",
        "cross",
        {},
        {"mark": 7, "score": "dot", "attention_step": "after", "input_feeding": True},
        {"mark": 7, "score": "location", "summary": "mean", "sentence_layers": 2},
        {"mark": 7, "attend_once": True},
    ),
    "conv": each("conv", "cross", {}),
    "conv-encoder-attention": [
        *each(
            "conv-encoder-attention",
            "cross encoder",
            *({"encoder_attention": at} for at in ("before", "after")),
        ),
        *each("conv-encoder-attention", "cross", {"encoder_attention": "pooling"}),
    ],
    "universal": each(
        "universal",
        ALL,
        {},
        {"halting": "fixed", "norm_position": "pre", "norm": "rms", "activation": "swiglu"},
    ),
    **transformers(
        ("no-positions", {}),
        ("no-positions+no-residual+same-layer", {}),
        ("complex", {}),
        ("complex+hard", {"heads": 1}),
        ("complex+no-residual", {"tied": "target", "norm_position": "pre"}),
        ("concatenated", {}),
        ("concatenated+hard", {"cross_attention": "sampled", "tied": "none"}),
        (
            "concatenated+batch-norm+same-layer+hard+unscaled",
            {
                "position_columns": 4,
                "positions": "learned",
                "norm_position": "pre",
                "cross_attention": "sampled",
            },
        ),
        ("relative", {}),
        ("relative+same-layer", {"max_distance": 3, "norm_position": "pre", "heads": 4}),
        ("relative+unscaled+batch-norm", {"max_distance": 1}),
        ("t5", {}),
        ("t5+unscaled", {"buckets": 8, "max_distance": 6, "norm_position": "pre"}),
        ("alibi", {}),
        ("alibi+batch-norm", {"heads": 16, "tied": "none"}),
        ("batch-norm", {}),
        ("no-residual", {"norm_position": "pre", "decoder_layers": 1}),
        ("unscaled", {}),
        ("hard", {}),
        ("same-layer", {}),
    ),
}


def variants_of(name: str) -> list[Variant]:
    """A registered network with its defaults and then with all its options."""
    return TABLE.get(name, [Variant(name)])


def variants(*, defaults: bool = False) -> list[Variant]:
    """All registered networks with all their options, or with `defaults` each network once."""
    found = [variants_of(name) for name in ARCHITECTURES]
    return [variant for several in found for variant in several[: 1 if defaults else None]]
