"""Bundles of formats 1 and 2, and recipes of their time, in the words of today.

Options that are networks of their own today change the architecture; options and weights have other names.
What is in today's words is left as it is. Where an option is given under its old and its new name, the old
one wins: it was given later, with `--set`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trmt.config import Tree
from trmt.errors import ConfigError
from trmt.nets.layers import sinusoids
from trmt.registry import join_variants, split_variants

# Architecture -> old names of options and new ones
SIZES = {"width": "d_model", "longest": "max_positions"}
NORMS = {"norm_place": "norm_position", "epsilon": "norm_epsilon"}
RNN = {"reads": "encoder_direction", "place": "attention_step"}
ATTENTION = {"static": "attend_once", "focus": "attention", "reach": "window"}
OPTIONS: Mapping[str, Mapping[str, str]] = {
    "transformer": {**SIZES, **NORMS},
    "masked-encoder": {**SIZES, **NORMS},
    "universal": {**SIZES, **NORMS},
    "rnn": {**SIZES, **RNN},
    "rnn-attention": {**SIZES, **RNN, **ATTENTION},
    "hierarchical": {**SIZES, **RNN, **ATTENTION},
    "conv": SIZES,
    "conv-encoder-attention": SIZES,
}

# Old option of a Transformer and its value -> the variant that it is today
VARIANTS: Mapping[tuple[str, Any], str] = {
    ("positions", "none"): "no-positions",
    ("positions", "complex"): "complex",
    ("positions", "relative"): "relative",
    ("positions", "t5"): "t5",
    ("positions", "alibi"): "alibi",
    ("position_join", "concatenate"): "concatenated",
    ("norm", "batch"): "batch-norm",
    ("residual", False): "no-residual",
    ("score_scale", False): "unscaled",
    ("cross_focus", "sampled"): "hard",
    ("cross_focus", "gumbel"): "hard",
    ("cross_source", "same"): "same-layer",
}
# Variant -> old names of its options and new ones
VARIANT_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "relative": {"reach": "max_distance"},
    "t5": {"buckets": "buckets", "farthest": "max_distance"},
    "concatenated": {"position_width": "position_columns"},
    "hard": {"cross_focus": "cross_attention", "temperature": "temperature", "entropy": "entropy"},
}
# Old options that only variants have, with the value that stands for none of them; ANY: it was not used then
ANY = object()
ONLY_VARIANTS: Mapping[str, Any] = {
    "position_join": "add",
    "residual": True,
    "score_scale": True,
    "cross_focus": "soft",
    "cross_source": "last",
    **dict.fromkeys(("position_width", "reach", "buckets", "farthest", "temperature", "entropy"), ANY),
}
ONLY_RNN_ATTENTION: Mapping[str, Any] = {
    "focus": "soft",
    "static": False,
    **dict.fromkeys(("reach", "temperature", "entropy"), ANY),
}

# Patterns of old names of weights and what replaces them, one after the other
Patterns = Sequence[tuple[str, str]]
LAYER: Patterns = (
    (r"\.own\.", ".self_qkv."),
    (r"\.own_(out|norm)\.", r".self_\1."),
    (r"\.query\.", ".cross_query."),
    (r"\.feed\.", ".feed_forward."),
    (r"\.feed_norm\.", ".feed_forward_norm."),
)
STACKS: Patterns = (
    (r"^source_embedding\.", "encoder.embedding.tokens."),
    (r"^target_embedding\.", "decoder.embedding.tokens."),
    (r"^(encoder|decoder)_norm\.", r"\1.norm."),
    (r"^memory\.", "cross_kv."),
)
TRANSFORMER: Patterns = (
    (r"^(encoder|decoder)\.(\d+)\.", r"\1.layers.\2."),
    *LAYER,
    *STACKS,
    (r"^embedding_norms\.0\.", "encoder.embedding.norm."),
    (r"^embedding_norms\.1\.", "decoder.embedding.norm."),
    (r"^memories\.", "cross_kv.layers."),
    (r"^lower_norms\.", "encoder.lower_norms."),
    (r"^source_turns$", "encoder.embedding.frequencies.weight"),
    (r"^target_turns$", "decoder.embedding.frequencies.weight"),
    (r"^(encoder|decoder)_apart$", r"\1.distance_vectors"),
)
WEIGHTS: Mapping[str, Patterns] = {
    "transformer": TRANSFORMER,
    "masked-encoder": (
        *TRANSFORMER,
        (r"^guess\.", "prediction."),
        (r"^guess_(norm\.|bias)", r"prediction_\1"),
        (r"^summary\.", "pooler."),
        (r"^follows\.", "next_sentence."),
    ),
    "universal": (
        (r"^(encoder|decoder)_layer\.", r"\1.layers.0."),
        *LAYER,
        *STACKS,
        (r"^(encoder|decoder)_halt\.", r"\1.steps.halt."),
    ),
    "rnn": (
        (r"\.layers\.(\d+)\.((?:weight|bias)_[ih]h_l0)_reverse", r".backward_layers.\1.fused.\2"),
        (r"\.layers\.(\d+)\.((?:weight|bias)_[ih]h_l0)", r".layers.\1.fused.\2"),
        (r"^sentences\.", "sentence_encoder."),
        (r"^gathering\.", "sentence_pooling."),
        (r"^first\.", "initial_state."),
        (r"^answer\.", "combine."),
        (r"^baseline\.", "attention.baseline."),
        (r"^above\.", "attention.sentences."),
        (r"^attention\.similarity\.", "attention."),
        (r"^(attention\.(?:sentences\.)?)places\.", r"\1location."),
        (r"^attention\.place\.", "attention.centre."),
        (r"^attention\.pointer$", "attention.centre_vector"),
    ),
    "conv": (
        (r"\.gated\.", ".convolution."),
        (r"^decoder\.(\d+)\.(query|out)\.", r"decoder.\1.cross_\2."),
        (r"^encoder\.(\d+)\.own\.", r"encoder.\1.self_qkv."),
        (r"^encoder\.(\d+)\.own_out\.", r"encoder.\1.self_out."),
        (r"^encoder\.(\d+)\.weigh\.", r"encoder.\1.pooling_key."),
        (r"^encoder\.(\d+)\.vector$", r"encoder.\1.pooling_query"),
        (r"^last\.", "encoder_out."),
    ),
}
FAMILIES = {"rnn-attention": "rnn", "hierarchical": "rnn", "conv-encoder-attention": "conv"}
# Old tables with a part for each side, of the encoder first
POSITIONS = ("encoder.embedding.positions", "decoder.embedding.positions")
SPLIT: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "transformer": {"positions": POSITIONS, "biases": ("encoder.distance_bias", "decoder.distance_bias")},
    "masked-encoder": {"positions": POSITIONS, "biases": ("encoder.distance_bias", "")},
    "conv": {"positions": ("source_positions", "target_positions")},
}


def upgrade_recipe(tree: Tree) -> Tree:
    """A recipe in the words of today."""
    architecture, options = tree.get("architecture", "transformer"), tree.get("network", {})
    if not isinstance(architecture, str) or not isinstance(options, dict):
        return tree  # building the recipe says what is wrong
    now, options = upgrade_network(architecture, options)
    changed: Tree = {"architecture": now} if now != architecture else {}
    if "network" in tree:
        changed["network"] = options
    return {**tree, **changed}


def upgrade_network(architecture: str, options: Mapping[str, Any]) -> tuple[str, Tree]:
    """The architecture and the options of a network in the words of today."""
    base, variants = split_variants(architecture)
    options = dict(options)
    if base in ("transformer", "masked-encoder"):
        variants = [*dict.fromkeys([*variants, *_variants(options)])]
        names = {old: new for each in variants for old, new in VARIANT_OPTIONS.get(each, {}).items()}
        options = _renamed(_without(options, ONLY_VARIANTS, keep=names), names)
        if base == "transformer":
            options = without_segments(options)
        architecture = join_variants(base, variants)
    elif base == "rnn" and _attends_otherwise(options):
        architecture = "rnn-attention"
    elif base == "rnn":
        options = _without(options, ONLY_RNN_ATTENTION)
    elif base == "conv" and options.get("encoder_attention", "none") != "none":
        architecture = "conv-encoder-attention"
    elif base == "conv":
        options.pop("encoder_attention", None)
    return architecture, _renamed(options, OPTIONS.get(split_variants(architecture)[0], {}))


def _variants(options: Tree) -> list[str]:
    return [variant for (name, value), variant in VARIANTS.items() if options.get(name) == value]


def _attends_otherwise(options: Tree) -> bool:
    """Whether old options of an RNN are those of another attention than the plain one."""
    focus, static = options.get("focus", "soft"), options.get("static", False)
    return focus != "soft" or bool(static) or options.get("score") in ("cosine", "location")


def _without(options: Tree, unused: Mapping[str, Any], keep: Mapping[str, str] | None = None) -> Tree:
    """The options but for those that stand for nothing; other values of them are left to be refused."""

    def stays(name: str, value: Any) -> bool:
        if name not in unused or name in (keep or {}):
            return True
        return unused[name] is not ANY and value != unused[name] and (name, value) not in VARIANTS

    return {name: value for name, value in options.items() if stays(name, value)}


def _renamed(options: Tree, names: Mapping[str, str]) -> Tree:
    kept = {name: value for name, value in options.items() if name not in names}
    return {**kept, **{new: options[old] for old, new in names.items() if old in options}}


def without_segments(options: Mapping[str, Any]) -> Tree:
    """The options of a Transformer whose positions hold the vector of segment 0, that of all its sources."""
    options = dict(options)
    segments, positions = options.pop("segments", 1), options.get("positions", "sinusoidal")
    if not isinstance(segments, int) or segments <= 1:
        return options
    if positions not in ("sinusoidal", "learned") or "position_columns" in options:
        what = "concatenated positions" if "position_columns" in options else f"positions = {positions!r}"
        raise ConfigError(
            f"a Transformer cannot take over segments = {segments} with {what}: it adds the vector of the "
            "one segment that it knows to a table of positions; train one without segments"
        )
    return {**options, "positions": "learned"}


def _family(architecture: str) -> str:
    base, _ = split_variants(architecture)
    return FAMILIES.get(base, base)


def upgrade_name(name: str, architecture: str, options: Mapping[str, Any]) -> str:
    """The name of a weight today."""
    if _family(architecture) == "rnn" and options.get("encoder_direction") == "backward":
        name = re.sub(
            r"^(encoder|sentences)\.layers\.(\d+)\.(?=weight|bias)", r"\1.backward_layers.\2.fused.", name
        )
    for pattern, new in WEIGHTS.get(_family(architecture), ()):
        name = re.sub(pattern, new, name)
    return name


def upgrade_tied(tied: Mapping[str, str], architecture: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Which names of weights stand for others, in the names of today."""
    return {
        upgrade_name(name, architecture, options): upgrade_name(other, architecture, options)
        for name, other in tied.items()
    }


def upgrade_weights(
    weights: Mapping[str, Tensor], architecture: str, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The weights of a network with these options, both in the words of today, under the names of today."""
    upgraded: dict[str, Tensor] = {}
    split = SPLIT.get(_family(architecture), {})
    for name, tensor in weights.items():
        if name in split:
            upgraded |= {new: tensor[side : side + 1] for side, new in enumerate(split[name][: len(tensor)])}
        else:
            upgraded[upgrade_name(name, architecture, options)] = tensor
    if _family(architecture) == "transformer" and "segments" in upgraded:
        fold_segments(upgraded, upgraded.pop("segments"), options["max_positions"])
    return upgraded


def fold_segments(weights: dict[str, Tensor], segments: Tensor, count: int) -> None:
    """Add the vector of segment 0 to the encoder's positions; sinusoids of both sides become learned."""
    if POSITIONS[0] not in weights:
        table = sinusoids(count, segments.shape[1])[None]
        weights |= dict.fromkeys(POSITIONS, table)
    weights[POSITIONS[0]] = weights[POSITIONS[0]] + segments[0]
