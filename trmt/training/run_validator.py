"""Validating weights on the dev set of a run in the way in which the run validates its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from torch import Tensor

from trmt.bundles import bundles
from trmt.bundles.schema import StoredScore
from trmt.config import build
from trmt.objectives.base import Specials
from trmt.registry import NETWORKS, OBJECTIVES, resolve
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer
from trmt.training import describing
from trmt.training.optim import OptimConfig
from trmt.training.recipe import Recipe, VectorsConfig
from trmt.training.state import TrainState
from trmt.training.validation import TranslateDevSet, Validator


class RunValidator:
    """Validates weights with the metrics, the sentences and the beam of a run's recipe."""

    def __init__(
        self,
        run: Path,
        data: PreparedSet,
        translate: TranslateDevSet,
        *,
        device: str = "auto",
        trust_code: bool = False,
    ) -> None:
        """`data` is the prepared set of the run, of which the dev set is used."""
        recipe = _for_validation(describing.recipe(run), device)
        # The run folder may come from anywhere.
        resolve(NETWORKS, recipe.architecture, trust_code=trust_code)
        objective = resolve(OBJECTIVES, recipe.objective, trust_code=trust_code)
        tokenizer = Tokenizer.load(data.tokenizer_folder)
        self.tokenizer = tokenizer.fingerprint
        self.state = TrainState(recipe, total_steps=0, specials=Specials.of(tokenizer.target))
        make_batches = objective.batches(build(objective.config_class, recipe.loss, where="loss"))
        batches = make_batches(data, recipe.batches, seed=0, split="dev")
        translates = bool(recipe.validation.sentences)
        self.beam = recipe.validation.beam if translates else 0
        self.validator = Validator(batches, self.state, tokenizer, translate if translates else None)

    def validate(self, weights: Mapping[str, Tensor], *, where: str) -> tuple[StoredScore, ...]:
        """The scores of these weights, the recipe's metric first; none if they cannot be validated."""
        bundles.load_weights(self.state.net, weights, where=where)
        with self.state.evaluating():
            result = self.validator.validate()
        return cast(tuple[StoredScore, ...], result.scores) if result.has_metric else ()


def _for_validation(recipe: Recipe, device: str) -> Recipe:
    """The recipe without what matters only for training, on a device that this machine has."""
    training = replace(
        recipe.training,
        device=device,
        precision="fp32" if recipe.training.precision == "fp32" else "auto",
        compile="off",
        shard=False,
        deterministic=False,
    )
    # The default optimiser has no moving average, which bundles contain already.
    return replace(recipe, training=training, optim=OptimConfig(), vectors=VectorsConfig())
