"""The options with which tests make each registered network.

A registered network that is not in the table is tested with its defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from trmt.registry import ARCHITECTURES, installed


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


SELF = "cross encoder decoder"  # the weights of Transformers

# The defaults first; every option occurs in some combination with the others.
TABLE: Mapping[str, list[Variant]] = {
    "transformer": each(
        "transformer",
        SELF,
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
    "transformer-no-positions": [
        *each("transformer-no-positions", SELF, {}),
        *each("transformer-no-positions+no-residual+same-layer", SELF, {}),
    ],
    "transformer-complex": [
        *each("transformer-complex", SELF, {}),
        *each("transformer-complex+hard", SELF, {"heads": 1}),
        *each("transformer-complex+no-residual", SELF, {"tied": "target", "norm_position": "pre"}),
    ],
    "transformer-concatenated": [
        *each("transformer-concatenated", SELF, {}),
        *each(
            "transformer-concatenated+hard",
            SELF,
            {"cross_attention": "sampled", "tied": "none"},
        ),
        *each(
            "transformer-concatenated+batch-norm+same-layer+hard+unscaled",
            SELF,
            {
                "position_columns": 4,
                "positions": "learned",
                "norm_position": "pre",
                "cross_attention": "sampled",
            },
        ),
    ],
    "transformer-relative": [
        *each("transformer-relative", SELF, {}),
        *each(
            "transformer-relative+same-layer", SELF, {"max_distance": 3, "norm_position": "pre", "heads": 4}
        ),
        *each("transformer-relative+unscaled+batch-norm", SELF, {"max_distance": 1}),
    ],
    "transformer-t5": [
        *each("transformer-t5", SELF, {}),
        *each("transformer-t5+unscaled", SELF, {"buckets": 8, "max_distance": 6, "norm_position": "pre"}),
    ],
    "transformer-alibi": [
        *each("transformer-alibi", SELF, {}),
        *each("transformer-alibi+batch-norm", SELF, {"heads": 16, "tied": "none"}),
    ],
    **{
        f"transformer-{name}": each(f"transformer-{name}", SELF, {}, {"norm_position": "pre"})
        for name in ("batch-norm", "unscaled", "same-layer")
    },
    # Without residual connections, deeper decoders hardly depend on the last token.
    "transformer-no-residual": each(
        "transformer-no-residual", SELF, {"decoder_layers": 1, "norm_position": "pre"}
    ),
    "transformer-hard": each("transformer-hard", SELF, {}, {"cross_attention": "sampled"}),
    "universal": each(
        "universal",
        SELF,
        {},
        {"halting": "fixed", "norm_position": "pre", "norm": "rms", "activation": "swiglu"},
    ),
    "rnn": [
        *each(
            "rnn",
            "",
            {"context": "start", "cell": "lstm", "encoder_direction": "backward"},
            {"context": "start", "cell": "rnn", "encoder_direction": "forward", "summary": "mean"},
            {"context": "every", "cell": "gru", "summary": "max", "residual": True},
            {"context": "every", "cell": "lstm", "summary": "attention", "decoder_layers": 3},
        ),
        *each(
            "rnn",
            "cross",
            {},
            {"decoder_layers": 1, "encoder_layers": 1, "heads": 1, "tied": "none"},
            {"score": "dot", "attention_step": "after", "cell": "lstm", "residual": True},
            {"score": "scaled", "cell": "rnn"},
            {"score": "general", "attention_step": "after", "input_feeding": True, "cell": "lstm"},
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
    "conv": each("conv", "cross", {}, {"kernel": 5, "tied": "none"}),
    "conv-encoder-attention": [
        *each(
            "conv-encoder-attention",
            "cross encoder",
            {"encoder_attention": "before"},
            {"encoder_attention": "after"},
        ),
        *each("conv-encoder-attention", "cross", {"encoder_attention": "pooling"}),
    ],
}


def variants(*, defaults: bool = False) -> list[Variant]:
    """All registered networks with all their options, or with `defaults` each network once."""
    found = [TABLE.get(name, [Variant(name)]) for name in installed(ARCHITECTURES)]
    return [variant for several in found for variant in several[: 1 if defaults else None]]


def parametrised(*, defaults: bool = False) -> list[ParameterSet]:
    """The variants as parameters of tests, which are slow tests for networks that are for study."""
    return [
        pytest.param(variant, id=str(variant), marks=_marks(variant.name))
        for variant in variants(defaults=defaults)
    ]


def every_network() -> list[ParameterSet]:
    """The names of all registered networks as parameters of tests, slow ones for networks for study."""
    return [pytest.param(name, marks=_marks(name)) for name in installed(ARCHITECTURES)]


def _marks(name: str) -> Sequence[pytest.MarkDecorator]:
    return () if ARCHITECTURES.get(name, "").startswith("trmt.nets") else (pytest.mark.slow,)
