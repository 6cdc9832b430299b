"""Validation with the current weights: the loss of the dev set, and scores of its translations."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trmt import console
from trmt.bundles import bundles
from trmt.config import to_tree
from trmt.devices.choice import autocast
from trmt.devices.memory import is_out_of_memory
from trmt.errors import TrmtError
from trmt.nets.base import Network, Seq2Seq
from trmt.sets.batches import Batches, RaggedBatch
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer
from trmt.training import sharding
from trmt.training.recipe import Recipe
from trmt.training.state import TrainState

OUT_OF_MEMORY = "not even one sentence of the dev set fits into memory; these weights are not validated"
TIMED_BATCHES = 4  # of the dev set, at most, from which the time of a validation is estimated
TIMED_SENTENCES = 64  # of them, as many as are decoded together
ACCURACY_SIGNATURE = "percent of texts for which it was predicted rightly whether they continue, dev set"


@dataclass(frozen=True)
class ValidationResult:
    """Scores with signatures, and some translations."""

    scores: tuple[dict[str, Any], ...] = ()
    samples: tuple[dict[str, Any], ...] = ()
    has_metric: bool = False  # whether the first score is that of validation.metric


class TranslateDevSet(Protocol):
    """Translates the dev set with a network and scores the translations."""

    def __call__(
        self, net: Seq2Seq, tokenizer: Tokenizer, data: PreparedSet, recipe: Recipe, *, forced: bool = False
    ) -> ValidationResult:
        """With `forced`, each translation has to be its reference, so that it takes as long as a good one."""


class DevLoss(NamedTuple):
    """The loss of the dev set per token in nats, and the accuracy on sequence-level questions, if any."""

    loss: float
    accuracy: float | None


class Validator:
    """Validates on a dev set; with several processes all compute the loss, and only rank 0 translates."""

    def __init__(
        self,
        batches: Batches,
        state: TrainState,
        tokenizer: Tokenizer,
        translate: TranslateDevSet | None,
    ) -> None:
        """Without `translate` only the loss is computed."""
        self.batches, self.state = batches, state
        self.tokenizer, self.translate = tokenizer, translate

    def validate(self) -> ValidationResult:
        """Loss, scores and translations with the current weights; the metric of the recipe comes first."""
        loss = self._loss()
        finite = loss is not None and math.isfinite(loss.loss)
        translated = self._translate() if finite else ValidationResult()
        scores: list[dict[str, Any]] = []
        if loss is not None:
            scores += [{"metric": "loss", "value": loss.loss, "signature": "nats per target token, dev set"}]
            if loss.accuracy is not None:
                value = 100 * loss.accuracy
                scores += [{"metric": "right", "value": value, "signature": ACCURACY_SIGNATURE}]
        scores += translated.scores
        metric = self.state.recipe.validation.metric
        scores.sort(key=lambda score: score["metric"] != metric)
        has_metric = bool(scores) and (scores[0]["metric"] == metric or math.isnan(scores[0]["value"]))
        return ValidationResult(tuple(scores), translated.samples, has_metric)

    def estimate_seconds(self) -> float | None:
        """How long a validation of a trained network takes, from a part of one with the current weights.

        Random weights generate translations of any length; so the references are generated.
        None if that does not fit into memory.
        """
        try:
            with self.state.evaluating():
                return self._loss_seconds() + self._translation_seconds()
        except (MemoryError, RuntimeError, TrmtError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    @torch.no_grad()
    def _loss_seconds(self) -> float:
        every = list(self.batches.iterate_once())
        stride = -(-len(every) // TIMED_BATCHES)
        some = every[stride // 2 :: stride]
        began = time.perf_counter()
        for examples in some:
            loss_sums(self.state, examples)[0].tolist()  # waits for the device
        return (time.perf_counter() - began) * len(every) / len(some)

    def _translation_seconds(self) -> float:
        recipe = self.state.recipe
        if not self.translate or not recipe.validation.sentences:
            return 0.0
        sentences = min(recipe.validation.sentences, len(self.batches.split))
        count = min(TIMED_SENTENCES, sentences)
        short = replace(recipe, validation=replace(recipe.validation, sentences=count, samples=0))
        began = time.perf_counter()
        self.translate(full_network(self.state), self.tokenizer, self.batches.data, short, forced=True)
        return (time.perf_counter() - began) * sentences / count

    def _loss(self) -> DevLoss | None:
        """The loss, or None where it does not fit into memory."""
        try:
            loss = dev_loss(self.state, self.batches)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            console.warn(OUT_OF_MEMORY)
            return None
        if not math.isfinite(loss.loss):
            console.warn("the loss of the dev set is not a number; the dev set is not translated")
        return loss

    def _translate(self) -> ValidationResult:
        if not self.translate:
            return ValidationResult()
        net, translate = full_network(self.state), self.translate

        def translated() -> ValidationResult:
            try:
                return translate(net, self.tokenizer, self.batches.data, self.state.recipe)
            except (MemoryError, RuntimeError, TrmtError) as error:
                if not is_out_of_memory(error):
                    raise
            console.warn(OUT_OF_MEMORY)
            return ValidationResult()

        found = self.state.distributed.on_main(lambda: to_tree(translated()))
        return ValidationResult(tuple(found["scores"]), tuple(found["samples"]))


@torch.no_grad()
def dev_loss(state: TrainState, batches: Batches) -> DevLoss:
    """The loss of a dev set with the current weights; each rank computes its share."""
    found: list[tuple[Tensor, int, int]] = []
    out_of_memory = False
    try:
        found = [sums for examples in batches.iterate_once() for sums in _loss_sums_that_fit(state, examples)]
    except (MemoryError, RuntimeError) as error:
        if state.distributed.world_size == 1 or not is_out_of_memory(error):
            raise
        out_of_memory = True
    if out_of_memory and state.sharded:
        state.micro_batches.raise_out_of_memory(int(batches.config.tokens))
    if state.distributed.all_reduce_flag(out_of_memory):
        raise MemoryError("out of memory")
    sums = torch.stack([sums_2 for sums_2, *_ in found]).T.tolist() if found else [[], []]
    counts = (sum(tokens for _, tokens, _ in found), sum(questions for *_, questions in found))
    totals = state.distributed.all_reduce_numbers(*map(math.fsum, sums), *counts)
    nll, right, tokens, questions = totals
    return DevLoss(nll / tokens, right / questions if questions else None)


def _loss_sums_that_fit(state: TrainState, examples: RaggedBatch) -> list[tuple[Tensor, int, int]]:
    """The loss sums of a batch's micro-batches, which are halved until they fit into memory."""
    micro_batches = state.micro_batches.split([examples])
    if state.sharded:
        return [loss_sums(state, each.examples, is_dummy=each.is_dummy) for each in micro_batches]
    waiting, done = [each.examples for each in micro_batches][::-1], []
    while waiting:
        current = waiting.pop()
        try:
            done.append(loss_sums(state, current))
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(current) == 1:
                raise
        # Outside of the handler, because the error keeps the tensors of the failed attempt alive.
        if state.device.type == "cuda":
            torch.cuda.empty_cache()
        waiting += current.halve()[::-1]
    return done


def loss_sums(state: TrainState, examples: RaggedBatch, *, is_dummy: bool = False) -> tuple[Tensor, int, int]:
    """Sums of the loss and of right answers [2], the number of tokens, and that of questions."""
    batch = state.objective.collate(examples, state.device)
    with autocast(state.precision, state.device):
        loss = state.objective.loss(state.net, batch)
    right = torch.zeros_like(loss.nll) if loss.right is None else loss.right.to(loss.nll.dtype)
    sums_2 = torch.stack([loss.nll, right])
    return (sums_2 * 0, 0, 0) if is_dummy else (sums_2, loss.tokens, loss.questions)


def full_network(state: TrainState) -> Seq2Seq:
    """An ordinary network with the current weights, for rank 0 to translate with; for all ranks to call."""
    net: Network | None = None if state.sharded else state.net
    if state.sharded:
        if state.distributed.is_main:
            recipe = state.recipe
            net = bundles.build_network(recipe.architecture, recipe.network, trust_code=True)
            net.to(state.device).eval()
        sharding.gather_into(net, state.net)
    found = net or state.net
    assert isinstance(found, Seq2Seq), "only translation models are translated with"
    return found
