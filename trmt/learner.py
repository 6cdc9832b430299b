"""A network that learns: gradients of batches, steps of the optimiser, and what resuming needs of them.

Every batch seeds the generator anew from (seed, step, number of the batch), so dropout does not depend on
what was computed before, and a resumed run draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trmt import bundles, console, optim
from trmt.batches import Batches, Examples, Room, halves
from trmt.config import build
from trmt.engines.device import autocast, be_deterministic, choose_device, choose_precision, compiled
from trmt.errors import TrmtError
from trmt.guard import Guard
from trmt.objectives.base import Objective, Specials
from trmt.recipe import Recipe
from trmt.registry import OBJECTIVES, resolve
from trmt.tokenizer import BOS, EOS


@dataclass
class Learned:
    """What one step saw."""

    nll: Any  # sum of negative log likelihoods; kept as a tensor: a number would make us wait for the device
    tokens: int


class Learner:
    """A network with its objective, optimiser, running mean and precision; training ends at step `steps`."""

    def __init__(self, recipe: Recipe, *, steps: int) -> None:
        self.recipe = recipe
        if recipe.training.deterministic:
            be_deterministic()
        self.device = choose_device(recipe.training.device)
        self.precision = choose_precision(recipe.training.precision, self.device)
        torch.manual_seed(recipe.training.seed)
        self.net = bundles.build_network(recipe.architecture, recipe.network, trust_code=True)
        self.net.to(self.device).train()
        width = int(getattr(self.net.config, "width", 512))
        self.rate = optim.learning_rate(recipe.optim, width=width, steps=steps)
        objective = resolve(OBJECTIVES, recipe.objective, trust_code=True)
        loss = build(objective.config_class, recipe.loss, where="loss")
        self.objective: Objective = objective(loss, Specials(bos=BOS, eos=EOS))
        self.optimizer = optim.optimiser(self.net, recipe.optim)
        self.guard = Guard(
            self.device,
            leaves_out_steep=recipe.training.on_spike != "ignore",
            half=self.precision == "fp16",
        )
        self.mean = optim.RunningMean(self.net, recipe.optim.ema) if recipe.optim.ema else None
        self.compiles = recipe.training.compile == "on" or (
            recipe.training.compile == "auto" and self.device.type == "cuda"
        )
        self._forward: Any = compiled(self.net) if self.compiles else self.net
        self.room: Room | None = None  # what every batch fits into, if there is such a thing
        self.halvings = 0  # how often batches are halved because they did not fit into memory

    @property
    def parameters(self) -> int:
        """How many numbers the network learns."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    def _room(self) -> Room | None:
        """The one shape of all batches, for which a network is compiled; elsewhere it only costs time."""
        return self.room.part(2**self.halvings) if self.compiles and self.room else None

    # Step

    def learn(self, examples: list[Examples], step: int) -> Learned:
        """Step number `step`, counted from 0, over some batches; nothing is dropped when memory is short.

        Whether the step was taken is for the guard to say, later.
        """
        learned = self._gradients_that_fit(examples, step)
        self._update(step, learned)
        return learned

    def _gradients_that_fit(self, examples: list[Examples], step: int) -> Learned:
        """Gradients of the mean loss, from parts of the batches where the whole does not fit into memory."""
        tokens = sum(self.objective.tokens(batch) for batch in examples)
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return Learned(self._gradients(self._in_parts(examples), tokens, step), tokens)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler: the error holds on to the tensors of the attempt that failed.
            self._split_more(max(len(batch) for batch in examples))

    def _gradients(self, parts: list[Examples], tokens: int, step: int) -> Any:
        """Gradients of the mean loss; the sum of negative log likelihoods is returned."""
        nll: Any = 0.0
        for number, part in enumerate(parts):
            torch.manual_seed(_seed(self.recipe.training.seed, step, number))
            batch = self.objective.collate(part, self.device, room=self._room())
            with autocast(self.precision, self.device):
                loss = self.objective.loss(self._forward, batch)
            self.guard.scaled(loss.total / tokens).backward()
            nll = nll + loss.nll
        return nll

    def _in_parts(self, examples: list[Examples]) -> list[Examples]:
        for _ in range(self.halvings):
            examples = [half for batch in examples for half in (halves(batch) if len(batch) > 1 else [batch])]
        return examples

    def _split_more(self, pairs: int) -> None:
        """Go on with smaller parts of batches, the largest of which has so many pairs."""
        if 2**self.halvings >= pairs:
            raise TrmtError(
                "a single pair does not fit into memory; use a smaller network, or prepare the data again "
                "with a lower --max-length"
            )
        self.halvings += 1
        self.optimizer.zero_grad(set_to_none=True)
        self._free()
        console.warn(f"out of memory: going on with batches in {2**self.halvings} parts")

    def _free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _update(self, step: int, learned: Learned) -> None:
        """Change the weights, unless the guard leaves the step out."""
        optim.set_rate(self.optimizer, self.rate(step + 1))
        self.guard.take(
            self.optimizer,
            step=step + 1,
            norm=self._norm(),
            nll=learned.nll,
            tokens=learned.tokens,
            clip=self.recipe.optim.clip,
        )
        if self.mean:
            self.mean.update(step)

    def _norm(self) -> Tensor:
        """The gradient's norm."""
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    def rehearse(self, batches: Batches) -> None:
        """Gradients of the largest batches, thrown away: memory that is too short shows before step 1.

        Nothing but the number of parts can have changed afterwards: every step draws from a generator that
        it seeds itself, and what networks keep besides weights is put back.
        """
        kept = {name: buffer.clone() for name, buffer in self.net.named_buffers()}
        # The optimiser's memory is there from the first step on, and has to fit beside the gradients.
        missing = [] if self.optimizer.state else [*self.net.parameters()] * 2
        reserved = [torch.empty_like(parameter) for parameter in missing]
        for pairs in batches.largest():
            # From the second batch of a step on, gradients are there beside the activations.
            self._gradients_that_fit([batches.load(pairs)] * min(batches.config.accumulate, 2), step=0)
        del reserved
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in self.net.named_buffers():
                buffer.copy_(kept[name])

    # Look

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """The weights that are kept, in eval mode; afterwards everything is as it was."""
        if self.mean:
            self.mean.swap()
        self.net.eval()
        try:
            yield
        finally:
            self.net.train()
            if self.mean:
                self.mean.swap()

    @torch.no_grad()
    def dev_loss(self, batches: Batches) -> float:
        """Negative log likelihood per token of a dev set, in nats."""
        found = [sums for examples in batches.whole() for sums in self._dev_sums_that_fit(examples)]
        return math.fsum(torch.stack([nll for nll, _ in found]).tolist()) / sum(count for _, count in found)

    def _dev_sums_that_fit(self, examples: Examples) -> list[tuple[Tensor, int]]:
        """The sums over the parts of a batch, which are made smaller until they fit into memory."""
        waiting, done = self._in_parts([examples])[::-1], []
        while waiting:
            part = waiting.pop()
            try:
                done.append(self._dev_sums(part))
                continue
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
            # Outside the handler: the error holds on to the tensors of the attempt that failed.
            self._free()
            waiting += halves(part)[::-1]
        return done

    def _dev_sums(self, part: Examples) -> tuple[Tensor, int]:
        batch = self.objective.collate(part, self.device)
        with autocast(self.precision, self.device):
            loss = self.objective.loss(self.net, batch)
        return loss.nll, loss.tokens

    # Save and restore

    def weights(self) -> dict[str, Tensor]:
        """What a bundle keeps: the running mean if there is one."""
        live = dict(self.net.state_dict())
        return live | self.mean.named() if self.mean else live

    def tensors(self) -> dict[str, Tensor]:
        """What going on needs, each tensor once."""
        named: dict[str, Tensor] = {
            f"live:{name}": parameter for name, parameter in self.net.named_parameters()
        }
        kept = self.net.state_dict()
        named |= {f"buffer:{name}": value for name, value in self.net.named_buffers() if name in kept}
        named |= optim.moments(self.net, self.optimizer)
        if self.mean:
            named |= {f"mean:{name}": tensor for name, tensor in self.mean.named().items()}
        return named | {f"guard:{name}": tensor for name, tensor in self.guard.tensors().items()}

    def state(self) -> dict[str, Any]:
        """The part of the state that is no tensor."""
        return {"halvings": self.halvings, "machine": self.machine()}

    def machine(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same to the last bit."""
        return {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "precision": self.precision,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state` and `tensors`."""
        for key, here in self.machine().items():
            saved_with = state["machine"].get(key, here)
            if saved_with != here:
                console.warn(
                    f"this run was saved with {key} {saved_with} and goes on with {here}: "
                    "the same data in the same order, but not the same bits"
                )
        saved = _under(tensors, "live:") | _under(tensors, "buffer:")
        self.net.load_state_dict(self.net.state_dict() | saved)
        optim.restore_moments(self.net, self.optimizer, tensors)
        if self.mean:
            self.mean.restore(_under(tensors, "mean:"))
        self.guard.restore(_under(tensors, "guard:"))
        self.halvings = state["halvings"]

    def start_from(self, weights: Mapping[str, Tensor], *, where: str) -> None:
        """Begin with these weights instead of random ones."""
        bundles.load_weights(self.net, weights, where=where)
        if self.mean:
            self.mean = optim.RunningMean(self.net, self.mean.decay)

    # Plan

    def activation_bytes(self, batches: Batches) -> int:
        """What the largest batch keeps for its backward pass, from measuring an eighth of it."""
        plan = [pairs for step in batches.plan(0) for pairs in step]
        largest = max(plan, key=lambda pairs: len(pairs) * int(batches.lengths[pairs].max()))
        part = largest[: max(len(largest) // 8, 1)]
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            batch = self.objective.collate(batches.load(part), self.device)
            with autocast(self.precision, self.device):
                loss = self.objective.loss(self.net, batch)
        own = {parameter.untyped_storage().data_ptr() for parameter in self.net.parameters()}
        del loss
        return sum(size for place, size in kept.items() if place not in own) * len(largest) // len(part)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _seed(*keys: int) -> int:
    """A seed that belongs to these keys alone."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU's allocator raises a plain RuntimeError.
    return "can't allocate memory" in str(error) or "out of memory" in str(error).lower()
