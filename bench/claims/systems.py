"""The systems that are compared: each one differs from another in one thing, and serves all claims.

A system's recipe is that of its family with a few fields changed. What a family has in common (sizes, data,
batches, optimiser, steps) comes from the scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from claims.scale import Scale

Tree = dict[str, Any]
ANY_ATTENTION = "rnn-attention"
BERT = "bert"  # the system that others begin with


@dataclass(frozen=True, kw_only=True)
class System:
    """One network and how it is trained."""

    name: str
    title: str  # for tables and figures
    family: Literal["recurrent", "conv", "transformer", "masked"] = "transformer"
    architecture: str = ""  # another one than the family's
    network: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)
    data: Literal["train", "little", "documents"] = "train"
    start: Literal["chance", "vectors", "bert"] = "chance"
    deep: bool = False  # as deep as the scale has it


def _recurrent(name: str, title: str, architecture: str = "", **network: Any) -> System:
    return System(name=name, title=title, family="recurrent", architecture=architecture, network=network)


def _transformer(name: str, title: str, architecture: str = "", **network: Any) -> System:
    return System(name=name, title=title, architecture=architecture, network=network)


def _deep(name: str, title: str, architecture: str = "", **network: Any) -> System:
    return System(name=name, title=title, architecture=architecture, network=network, deep=True)


def _little(name: str, title: str, start: Literal["chance", "vectors", "bert"]) -> System:
    return System(name=name, title=title, data="little", start=start)


# Without a word on its side a recurrent network looks with additive attention after its step, and a
# Transformer is pre-norm with sinusoidal positions and warm-up.
ONE_VECTOR = (
    _recurrent("fixed", "fixed vector, at the start", context="start"),
    _recurrent("fixed-every", "fixed vector, at every step", context="every"),
    _recurrent("static", "attention, once", ANY_ATTENTION, attend_once=True),
    _recurrent("rnnsearch", "attention before the step", attention_step="before"),
    System(name="conv", title="convolutions", family="conv"),
)
SIMILARITIES = (
    _recurrent("additive", "additive"),
    _recurrent("dot", "dot", score="dot"),
    _recurrent("scaled", "scaled dot", score="scaled"),
    _recurrent("general", "general", score="general"),
    _recurrent("cosine", "cosine", ANY_ATTENTION, score="cosine"),
    _recurrent("location", "location", ANY_ATTENTION, score="location"),
)
FOCI = (
    _recurrent("monotonic", "monotonic window", ANY_ATTENTION, attention="monotonic", window=5),
    _recurrent("predictive", "predicted window", ANY_ATTENTION, attention="predictive", window=5),
    _recurrent("sampled", "hard, REINFORCE", ANY_ATTENTION, attention="sampled"),
    _recurrent("gumbel", "hard, Gumbel", ANY_ATTENTION, attention="gumbel"),
)
POSITIONS = (
    _transformer("transformer", "sinusoidal"),
    _transformer("learned", "learned", positions="learned"),
    _transformer("rotary", "rotary", positions="rotary"),
    _transformer("none", "none", "transformer-no-positions"),
    _transformer("complex", "complex", "transformer-complex"),
    _transformer("relative", "relative", "transformer-relative"),
    _transformer("t5", "T5 biases", "transformer-t5"),
    _transformer("alibi", "ALiBi", "transformer-alibi"),
    _transformer("concatenated", "sinusoidal, concatenated", "transformer-concatenated"),
)
HEADS = (
    _transformer("heads-1", "1 head", heads=1),
    _transformer("heads-2", "2 heads", heads=2),
    _transformer("heads-8", "8 heads", heads=8),
    _transformer("heads-16", "16 heads", heads=16),
    _transformer("unscaled-1", "1 head, unscaled", "transformer-unscaled", heads=1),
    _transformer("unscaled-16", "16 heads, unscaled", "transformer-unscaled", heads=16),
)
NO_WARMUP = {"warmup": 0}
NORMS = (
    _transformer("batch-norm", "BatchNorm", "transformer-batch-norm"),
    _transformer("post-norm", "post-norm, warm-up", norm_position="post"),
    System(
        name="post-norm-cold",
        title="post-norm, no warm-up",
        network={"norm_position": "post"},
        optim=NO_WARMUP,
    ),
    System(name="pre-norm-cold", title="pre-norm, no warm-up", optim=NO_WARMUP),
)
DEPTH = (
    _deep("deep", "deep"),
    _deep("deep-plain", "deep, no residual connections", "transformer-no-residual"),
    _deep("deep-post", "deep, post-norm", norm_position="post"),
    _transformer("plain", "shallow, no residual connections", "transformer-no-residual"),
)
REST = (
    System(name="unsmoothed", title="no label smoothing", loss={"label_smoothing": 0.0}),
    _transformer("hard-cross", "hard cross-attention", "transformer-hard"),
)
PRETRAINED = System(
    name=BERT,
    title="BERT",
    family="masked",
    loss={"next_sentence": False},
    data="documents",
)
LITTLE = (
    _little("little", "small data, random weights", "chance"),
    _little("little-vectors", "small data, word vectors", "vectors"),
    _little("little-bert", "small data, BERT encoder", "bert"),
)
# In order of value: who stops early has the claims that need the fewest systems.
ALL = (
    *ONE_VECTOR,
    *SIMILARITIES,
    POSITIONS[0],
    *FOCI,
    *POSITIONS[1:],
    *NORMS,
    *DEPTH,
    *HEADS,
    *REST,
    PRETRAINED,
    *LITTLE,
)
BY_NAME = {system.name: system for system in ALL}


def recipe(system: System, scale: Scale, *, seed: int, device: str) -> Tree:
    """Everything a run of this system is configured by, as a recipe file has it."""
    steps = scale.little_steps if system.data == "little" else scale.steps
    optim: Tree = {
        "name": "adamw",
        "schedule": "cosine",
        "lr": LEARNING_RATE[system.family],
        "warmup": steps // 10,
        "epsilon": 1e-8,
        "clip": 1.0,
        "ema": 0.99 if steps >= 300 else 0.0,
    }
    network = NETWORK[system.family](scale, system)
    return {
        "architecture": system.architecture or ARCHITECTURE[system.family],
        "objective": "masked" if system.family == "masked" else "translation",
        "network": {**network, **system.network},
        "loss": dict(system.loss),
        "batches": {"tokens": scale.tokens},
        "optim": {**optim, **system.optim},
        "training": {
            "steps": steps,
            "seed": seed,
            "device": device,
            "log_every": max(steps // 20, 1),
            "keep_last": 1,
            "keep_best": 0,
        },
        "validation": {"every": max(steps // 4, 1), "metric": "loss", "sentences": 0},
    }


def _recurrent_network(scale: Scale, system: System) -> Tree:
    return {
        "d_model": scale.width,
        "cell": "gru",
        "encoder_direction": "both",
        "context": "attention",
        "score": "additive",
        "attention_step": "after",
        "dropout": DROPOUT,
    }


def _conv_network(scale: Scale, system: System) -> Tree:
    layers = scale.layers
    return {
        "d_model": scale.width,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "kernel": 3,
        "dropout": DROPOUT,
        "max_positions": scale.longest,
    }


def _transformer_network(scale: Scale, system: System) -> Tree:
    layers = scale.layers * (scale.deep if system.deep else 1)
    network = {**_encoder(scale, layers), "decoder_layers": layers}
    if system.architecture == "transformer-concatenated":
        network["position_columns"] = scale.width // 4
    return network


def _masked_network(scale: Scale, system: System) -> Tree:
    # The same encoder as that of a Transformer here, so that a cold start is one of the same network.
    same = {"embedding_norm": False, "embedding_scale": True, "segments": 1, "activation": "relu"}
    same |= {"norm_epsilon": 0.0, "positions": "sinusoidal", "attention_dropout": 0.0}
    return {**_encoder(scale, scale.layers), **same}


def _encoder(scale: Scale, layers: int) -> Tree:
    return {
        "d_model": scale.width,
        "feed_forward": 4 * scale.width,
        "heads": 4,
        "encoder_layers": layers,
        "dropout": DROPOUT,
        "norm_position": "pre",
        "max_positions": scale.longest,
    }


DROPOUT = 0.1
ARCHITECTURE = {
    "recurrent": "rnn",
    "conv": "conv",
    "transformer": "transformer",
    "masked": "masked-encoder",
}
NETWORK = {
    "recurrent": _recurrent_network,
    "conv": _conv_network,
    "transformer": _transformer_network,
    "masked": _masked_network,
}
LEARNING_RATE = {"recurrent": 5e-3, "conv": 2e-3, "transformer": 3e-3, "masked": 2e-3}
