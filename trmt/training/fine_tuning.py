"""The schedule of fine-tuning: a low learning rate, a short warm-up, few steps, frequent validations.

Weights that are trained already need small changes: with the rate and the length of a recipe that trains
random weights they are mostly forgotten. Recipes that come with trmt are for random weights; so `--init-from`
a whole model replaces these settings of theirs. A recipe file of the user's own is taken as it is, and so is
every recipe for a model that was pretrained on documents, or of which only the encoder is taken over.
"""

from __future__ import annotations

import math
from pathlib import Path

from trmt.config import Tree
from trmt.sets.record import is_of_documents
from trmt.sets.shards import SIDES, PreparedSet
from trmt.training.optim import learning_rate
from trmt.training.recipe import Recipe, flat

RATE = 0.1  # of the highest rate of the recipe
WARMUP = 100  # steps, at most
EPOCHS = 10
STEPS = (200, 20_000)  # the fewest and the most
VALIDATIONS = 20
PATIENCE = 5
KEYS = (
    "optim.schedule",
    "optim.lr",
    "optim.warmup",
    "training.steps",
    "training.epochs",
    "training.patience",
    "validation.every",
)


def is_pretrained(bundle: Path) -> bool:
    """Whether the run folder of a bundle records that it was trained on documents."""
    return any(map(is_of_documents, (bundle, bundle.resolve().parent)))


def schedule(recipe: Recipe, data: PreparedSet) -> Tree:
    """The settings with which a model is fine-tuned on this set, in place of those of a recipe."""
    a_pass = steps_per_pass(recipe, data)
    fewest, most = STEPS
    limit = min(most, recipe.training.steps or most)
    steps = min(max(EPOCHS * a_pass, fewest), limit)
    return {
        "optim": {
            "schedule": "inverse_sqrt",
            "lr": float(f"{RATE * highest_rate(recipe):.2g}"),
            "warmup": min(WARMUP, max(steps // 10, 1)),
        },
        "training": {"steps": steps, "epochs": 0, "patience": PATIENCE},
        "validation": {"every": max(steps // VALIDATIONS, 1)},
    }


def highest_rate(recipe: Recipe) -> float:
    """The highest learning rate of a recipe."""
    d_model = int(recipe.network.get("d_model", 512))
    rate = learning_rate(recipe.optim, d_model=d_model, total_steps=10**9)
    return rate(max(recipe.optim.warmup, 1))


def steps_per_pass(recipe: Recipe, data: PreparedSet) -> int:
    """About the number of steps in which a batch of the recipe's size passes over the pairs once."""
    split = data.split("train")
    source, target = (split.lengths(f"{side}.ids") for side in SIDES)
    tokens = int(source.clip(min=target).sum()) + len(split)
    return max(math.ceil(tokens / (recipe.batches.tokens * recipe.batches.accumulate)), 1)


def describe(changes: Tree) -> str:
    """The schedule in one line."""
    values = ", ".join(f"{key} = {value}" for key, value in flat(changes).items())
    return f"fine-tuning: {values} (--set changes them)"
