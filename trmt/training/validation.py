"""The dev set through the eyes of the weights of the moment: what is found there, and which score counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trmt import console
from trmt.config import to_tree
from trmt.devices.memory import is_out_of_memory
from trmt.errors import TrmtError
from trmt.nets.base import Seq2Seq
from trmt.sets.batches import Batches
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer
from trmt.training.learner import DevLoss, Learner
from trmt.training.recipe import Recipe

NOT_ONE_FITS = "not even a single sentence of the dev set fits into memory; training goes on without it"
RIGHT = "percent of texts of which it was told rightly whether they go on, dev set"


@dataclass(frozen=True)
class Validation:
    """What translating the dev set found: scores with signatures, and some translations."""

    scores: tuple[dict[str, Any], ...] = ()
    samples: tuple[dict[str, Any], ...] = ()


Validate = Callable[[Seq2Seq, Tokenizer, PreparedSet, Recipe], Validation]


@dataclass(frozen=True)
class Seen(Validation):
    """What a look found, the score first that the run chooses by; `judged` says whether it is there."""

    judged: bool = False


class DevSet:
    """Looks at a dev set; in a team every process takes part, and only the leader translates.

    `validate` translates and scores; without it only the loss is looked at.
    """

    def __init__(
        self,
        batches: Batches,
        learner: Learner,
        recipe: Recipe,
        tokenizer: Tokenizer,
        validate: Validate | None,
    ) -> None:
        self.batches, self.learner, self.recipe = batches, learner, recipe
        self.tokenizer, self.validate = tokenizer, validate

    def look(self) -> Seen:
        """The loss, scores and translations with the weights that are there now."""
        lost = self._loss()
        found = self._validation() if lost is not None and math.isfinite(lost.loss) else Validation()
        scores: list[dict[str, Any]] = []
        if lost is not None:
            scores += [{"metric": "loss", "value": lost.loss, "signature": "nats per target token, dev set"}]
            if lost.right is not None:
                scores += [{"metric": "right", "value": 100 * lost.right, "signature": RIGHT}]
        scores += found.scores
        metric = self.recipe.validation.metric
        scores.sort(key=lambda score: score["metric"] != metric)
        judged = bool(scores) and (scores[0]["metric"] == metric or math.isnan(scores[0]["value"]))
        return Seen(tuple(scores), found.samples, judged)

    def _loss(self) -> DevLoss | None:
        """The loss, or None where memory is too short for it."""
        try:
            loss = self.learner.dev_loss(self.batches)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            console.warn(NOT_ONE_FITS)
            return None
        if not math.isfinite(loss.loss):
            console.warn("the dev loss is not a number; nothing is translated with these weights")
        return loss

    def _validation(self) -> Validation:
        if not self.validate:
            return Validation()
        net, validate = self.learner.to_translate_with(), self.validate

        def translated() -> Mapping[str, Any]:
            return to_tree(self._translated(validate, net))

        found = self.learner.team.lead(translated)
        return Validation(tuple(found["scores"]), tuple(found["samples"]))

    def _translated(self, validate: Validate, net: Seq2Seq) -> Validation:
        try:
            return validate(net, self.tokenizer, self.batches.data, self.recipe)
        except (MemoryError, RuntimeError, TrmtError) as error:
            if not is_out_of_memory(error):
                raise
        console.warn(NOT_ONE_FITS)
        return Validation()
