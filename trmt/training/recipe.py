"""Recipes: everything a training run is configured by, as one tree of dataclasses.

A recipe is a TOML file, one of trmt/recipes/ by name or any by path; `--set key=value` changes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from trmt.bundles.upgrade import upgrade_recipe
from trmt.config import Tree, build, merged, read_toml, tree_of, with_settings
from trmt.errors import ConfigError
from trmt.registry import join_variants, split_variants, suggestion
from trmt.sets.batches import BatchConfig
from trmt.training.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train, on what, and what to keep."""

    steps: int = 0  # where to end; 0 leaves that to epochs or patience
    epochs: int = 0  # the same, counted in passes over the data
    patience: int = 0  # validations without improvement after which to end; 0 is off
    seed: int = 1
    device: str = "auto"  # cuda, mps, cpu, ...; auto takes the best there is
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # merge the network's operations; auto: on a GPU
    deterministic: bool = False  # the same bits on a GPU each time, for some speed
    on_spike: Literal["skip", "rollback", "stop", "ignore"] = "skip"  # of the gradient or the loss
    shard: bool = False  # of several processes, each keeps a slice of every tensor: for large networks
    log_every: int = 50  # steps
    save_every: int = 0  # steps between checkpoints; 0 saves at each validation
    keep_best: int = 5
    keep_last: int = 2

    def __post_init__(self) -> None:
        if min(self.steps, self.epochs, self.patience, self.seed, self.save_every, self.keep_best) < 0:
            raise ConfigError(
                "training's steps, epochs, patience, seed, save_every and keep_best are at least 0"
            )
        if self.log_every < 1 or self.keep_last < 1:
            raise ConfigError("training.log_every and training.keep_last are at least 1")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """How often to look, and by what to judge."""

    every: int = 1000  # steps
    metric: Literal["chrf", "bleu", "loss"] = "chrf"  # chooses the best checkpoints and counts patience
    sentences: int = 500  # of the dev set, at most, that are really translated; 0: only the loss
    beam: int = 1
    samples: int = 3  # translations shown and kept as golden sentences

    def __post_init__(self) -> None:
        if self.every < 1 or self.sentences < 0 or self.beam < 1 or self.samples < 0:
            raise ConfigError("validation.every and validation.beam are at least 1, the others at least 0")
        if self.metric != "loss" and not self.sentences:
            raise ConfigError(
                f'validation.metric = "{self.metric}" needs translations: set validation.sentences '
                'above 0, or validation.metric = "loss"'
            )


@dataclass(frozen=True, kw_only=True)
class VectorsConfig:
    """What embeddings begin with instead of chance."""

    source: str = ""  # a file of word2vec or GloVe; "train" makes vectors from the prepared set; "" is chance
    target: str = ""
    frozen: bool = False  # whether they stay as they are

    def __post_init__(self) -> None:
        if self.frozen and not (self.source or self.target):
            raise ConfigError(
                "vectors.frozen = true would keep embeddings of chance; name vectors.source or vectors.target"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run is configured by."""

    description: str = ""
    architecture: str = "transformer"
    objective: str = "translation"
    network: dict[str, Any] = field(default_factory=dict)  # the architecture's own fields
    loss: dict[str, Any] = field(default_factory=dict)  # the objective's own fields
    vectors: VectorsConfig = field(default_factory=VectorsConfig)
    batches: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        ends = (self.training.steps, self.training.epochs, self.training.patience)
        if not any(ends):
            raise ConfigError(
                "nothing would end this training: set training.steps, training.epochs or training.patience"
            )
        if self.batches.subword_alpha and self.loss.get("alignment_weight"):
            raise ConfigError(
                "loss.alignment_weight is for the pieces that were prepared, and batches.subword_alpha draws "
                "others; set one of them to 0"
            )


# A resumed run may differ in these and stay the same run; anything else would make it another one.
MAY_CHANGE = frozenset(
    {
        "description",
        "training.steps",
        "training.epochs",
        "training.patience",
        "training.device",
        "training.precision",
        "training.compile",
        "training.deterministic",
        "training.on_spike",
        "training.shard",
        "training.log_every",
        "training.keep_best",
        "training.keep_last",
        "validation.samples",
    }
)


def names() -> list[str]:
    """The recipes that come with trmt."""
    return sorted(
        file.name.removesuffix(".toml")
        for file in (files("trmt") / "recipes").iterdir()
        if file.name.endswith(".toml")
    )


def load_recipe(
    name: str,
    settings: list[str] | None = None,
    *,
    network: Tree | None = None,
    architecture: str | None = None,
    variants: Sequence[str] = (),
) -> Recipe:
    """The recipe of this name or path, with settings applied.

    `network` is laid over its network table; with `architecture`, they take the place of the recipe's. A
    Transformer gets these variants.
    """
    if name.endswith(".toml"):
        tree = read_toml(Path(name))
    elif name in names():
        tree = read_toml(Path(str(files("trmt") / "recipes" / f"{name}.toml")))
    else:
        raise ConfigError(f"there is no recipe {name!r}; {suggestion(name, names())}, or name a .toml file")
    tree = upgrade_recipe(tree)
    if architecture is not None:
        tree = {**tree, "architecture": architecture, "network": {}}
    tree = merged(tree, {"network": network or {}})
    tree = upgrade_recipe(with_settings(tree, settings or []))
    base, others = split_variants(str(tree.get("architecture", Recipe.architecture)))
    if variants and base == "transformer":
        tree["architecture"] = join_variants(base, [*dict.fromkeys([*variants, *others])])
    return build(Recipe, tree, where="recipe")


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file."""
    return build(Recipe, upgrade_recipe(read_toml(path)), where=str(path))


def fitting(pairs: int, *, gpu: bool) -> str:
    """The recipe for so many pairs: small data starves big networks, and a CPU cannot feed them."""
    if pairs < 100_000:
        return "transformer-tiny"
    if pairs < 1_000_000 or not gpu:
        return "transformer-small"
    return "transformer-base" if pairs < 20_000_000 else "transformer-big"


def differences(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """The settings in which two recipes differ, by dotted name."""
    old, new = flat(tree_of(before)), flat(tree_of(now))
    return {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}


def flat(tree: Tree, prefix: str = "") -> Tree:
    """The values of a tree by their dotted names."""
    found: Tree = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def safe_name(text: str) -> str:
    """`text` as the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "run"
