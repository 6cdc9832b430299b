"""Recipes: the whole configuration of a training run, as one tree of dataclasses.

A recipe is a TOML file, one of trmt/recipes/ by name or any by path; `--set key=value` changes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from trmt.bundles.upgrade import upgrade_recipe
from trmt.config import MAX_BEAM, Tree, Within, apply_settings, build, merge, read_toml, to_tree
from trmt.errors import ConfigError
from trmt.registry import NETWORKS, OBJECTIVES, join_variants, resolve, split_variants, suggestion
from trmt.sets.batches import BatchConfig
from trmt.training.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long to train, on which device, and which checkpoints to keep."""

    steps: int = 0  # ends training after so many steps; 0 is off
    epochs: int = 0  # ends training after so many passes over the data; 0 is off
    patience: int = 10  # ends training after so many validations without a better validation.metric; 0 is off
    seed: int = 1  # of initial weights, dropout and the order of the data
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto takes a GPU if there is one
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: the fastest on the device
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on a GPU, where it pays
    deterministic: bool = False  # identical results on a GPU in each run, at some cost in speed
    on_spike: Literal["skip", "rollback", "stop", "ignore"] = "skip"  # reaction to spikes of gradient or loss
    shard: bool = False  # split weights and optimiser over the processes (FSDP), for large networks
    log_every: int = 50  # steps between log entries
    save_every: int = 0  # steps between checkpoints; 0 saves at each validation only
    keep_best: int = 5  # checkpoints with the best validation scores that are kept
    keep_last: int = 2  # newest checkpoints that are kept, from which training can resume

    def __post_init__(self) -> None:
        if min(self.steps, self.epochs, self.patience, self.seed, self.save_every, self.keep_best) < 0:
            raise ConfigError(
                "training.steps, epochs, patience, seed, save_every and keep_best must be at least 0"
            )
        if self.log_every < 1 or self.keep_last < 1:
            raise ConfigError("training.log_every and training.keep_last must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """How often to validate on the dev set, and with which metric."""

    every: int = 1000  # steps between validations
    metric: Literal["chrf", "bleu", "loss"] = "chrf"  # selects the best checkpoints and counts for patience
    sentences: int = 500  # of the dev set that are translated, at most; 0 computes the loss only
    beam: Annotated[int, Within(1, MAX_BEAM)] = 1  # beam size of these translations; 1 is greedy search
    samples: int = 3  # translations that are displayed and stored as golden sentences

    def __post_init__(self) -> None:
        if self.every < 1 or self.sentences < 0 or self.beam < 1 or self.samples < 0:
            raise ConfigError(
                "validation.every and validation.beam must be at least 1, validation.sentences and "
                "validation.samples at least 0"
            )
        if self.metric != "loss" and not self.sentences:
            raise ConfigError(
                f'validation.metric = "{self.metric}" needs translations: set validation.sentences '
                'above 0, or validation.metric = "loss"'
            )


@dataclass(frozen=True, kw_only=True)
class VectorsConfig:
    """Word vectors that embeddings are initialised with."""

    source: str = ""  # a word2vec or GloVe file; "train" trains vectors on the prepared set; "" is random
    target: str = ""  # the same for the target side
    frozen: bool = False  # whether these embeddings are excluded from training

    def __post_init__(self) -> None:
        if self.frozen and not (self.source or self.target):
            raise ConfigError(
                "vectors.frozen = true would freeze random embeddings; set vectors.source or vectors.target"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The whole configuration of a run."""

    description: str = ""  # one sentence for people
    architecture: str = "transformer"  # name of the network's architecture
    objective: str = "translation"  # name of the training objective
    network: dict[str, Any] = field(default_factory=dict)  # the options of the architecture
    loss: dict[str, Any] = field(default_factory=dict)  # the options of the objective
    vectors: VectorsConfig = field(default_factory=VectorsConfig)  # initial embeddings
    batches: BatchConfig = field(default_factory=BatchConfig)  # how pairs are put into batches
    optim: OptimConfig = field(default_factory=OptimConfig)  # optimiser and learning rate
    training: TrainingConfig = field(default_factory=TrainingConfig)  # length, device and checkpoints
    validation: ValidationConfig = field(default_factory=ValidationConfig)  # frequency and metric

    def __post_init__(self) -> None:
        if not (self.training.steps or self.training.epochs or self.training.patience):
            raise ConfigError(
                "nothing would end this training: set training.steps, training.epochs or training.patience"
            )
        if self.batches.subword_alpha and self.loss.get("alignment_weight"):
            raise ConfigError(
                "loss.alignment_weight needs the pieces of the prepared set, and batches.subword_alpha draws "
                "others; set one of them to 0"
            )


# Settings that may differ when a run is resumed; any other one would make it another run.
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

# Recipes that are selected by the number of pairs, from few to many
SELECTED = (
    "transformer-low-resource",
    "transformer-tiny",
    "transformer-small",
    "transformer-base",
    "transformer-big",
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
    defaults: Tree | None = None,
    overrides: Tree | None = None,
) -> Recipe:
    """The recipe of this name or path, with settings applied.

    `network` overrides values of its network table; with `architecture` it replaces that table. `variants`
    are added to a Transformer. `defaults` are values of keys that the recipe does not have, `overrides`
    replace those it has; settings override both.
    """
    if is_file(name):
        tree = read_toml(Path(name))
    elif name in names():
        tree = read_toml(Path(str(files("trmt") / "recipes" / f"{name}.toml")))
    else:
        raise ConfigError(f"there is no recipe {name!r}; {suggestion(name, names())}, or name a .toml file")
    tree = upgrade_recipe(tree)
    if architecture is not None:
        tree = {**tree, "architecture": architecture, "network": {}}
    tree = merge(merge(defaults or {}, tree), merge(overrides or {}, {"network": network or {}}))
    tree = upgrade_recipe(apply_settings(tree, settings or []))
    base, others = split_variants(str(tree.get("architecture", Recipe.architecture)))
    if variants and base == "transformer":
        tree["architecture"] = join_variants(base, [*dict.fromkeys([*variants, *others])])
    return build(Recipe, tree, where="recipe")


def read_recipe(path: Path) -> Recipe:
    """The recipe of a run, from its config.toml; a run of a version without patience has none."""
    tree = merge({"training": {"patience": 0}}, upgrade_recipe(read_toml(path)))
    return build(Recipe, tree, where=str(path))


def is_file(name: str) -> bool:
    """Whether the name of a recipe is the path of a file, and not one of those that come with trmt."""
    return name.endswith(".toml")


def recipe_from(tree: Any, *, where: str) -> Recipe:
    """The recipe in a checkpoint."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} has a checkpoint without a recipe; name another run folder")
    return build(Recipe, upgrade_recipe(tree), where=where)


def with_defaults(recipe: Recipe, *, trust_code: bool = False) -> Recipe:
    """The recipe with every option of its network and of its objective, defaults included."""
    network = resolve(NETWORKS, recipe.architecture, trust_code=trust_code).config_class
    loss = resolve(OBJECTIVES, recipe.objective, trust_code=trust_code).config_class
    return replace(
        recipe,
        network=to_tree(build(network, recipe.network, where="network")),
        loss=to_tree(build(loss, recipe.loss, where="loss")),
    )


def fitting_recipe(pairs: int, *, gpu: bool) -> str:
    """The name of the recipe for a set of so many pairs; large ones need much data and a GPU."""
    low_resource, tiny, small, base, big = SELECTED
    if pairs < 10_000:
        return low_resource
    if pairs < 100_000:
        return tiny
    if pairs < 1_000_000 or not gpu:
        return small
    return base if pairs < 20_000_000 else big


def differences(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """The settings in which two recipes differ, as dotted name -> (before, now)."""
    old, new = flat(to_tree(before)), flat(to_tree(now))
    return {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}


def flat(tree: Tree, prefix: str = "") -> Tree:
    """The values of a tree by dotted name."""
    found: Tree = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def safe_name(text: str) -> str:
    """`text` with all characters replaced that a folder's name should not have."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "run"
