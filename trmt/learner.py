"""A network that learns: gradients of batches, steps of the optimiser, and what resuming needs of them.

Every batch seeds the generator anew from (seed, step, number of the batch), so dropout does not depend on
what was computed before, and a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trmt import bundles, console, optim
from trmt.batches import Batches, Examples, halves
from trmt.config import build
from trmt.engines.device import autocast, choose_device, choose_precision
from trmt.errors import TrmtError
from trmt.objectives.base import Objective, Specials
from trmt.recipe import Recipe
from trmt.registry import OBJECTIVES, resolve
from trmt.tokenizer import BOS, EOS

BAD_STEPS = 20  # steps in a row without a usable gradient after which training has failed


@dataclass
class Learned:
    """What one step saw."""

    nll: Any  # sum of negative log likelihoods; kept as a tensor: a number would make us wait for the device
    tokens: int
    usable: bool  # whether the gradient was finite and the step taken


class Learner:
    """A network with its objective, optimiser, running mean and precision; training ends at step `steps`."""

    def __init__(self, recipe: Recipe, *, steps: int) -> None:
        self.recipe = recipe
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
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.mean = optim.RunningMean(self.net, recipe.optim.ema) if recipe.optim.ema else None
        self.halvings = 0  # how often batches are halved because they did not fit into memory
        self.bad_steps = 0  # in a row

    @property
    def parameters(self) -> int:
        """How many numbers the network learns."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    # Step

    def learn(self, examples: list[Examples], step: int) -> Learned:
        """Step number `step`, counted from 0, over some batches; nothing is dropped when memory is short."""
        tokens = sum(self.objective.tokens(batch) for batch in examples)
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                nll = self._gradients(self._in_parts(examples), tokens, step)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler: the error holds on to the tensors of the attempt that failed.
            self._split_more(max(len(batch) for batch in examples))
        return Learned(nll, tokens, usable=self._update(step))

    def _gradients(self, parts: list[Examples], tokens: int, step: int) -> Any:
        """Gradients of the mean loss; the sum of negative log likelihoods is returned."""
        nll: Any = 0.0
        for number, part in enumerate(parts):
            torch.manual_seed(_seed(self.recipe.training.seed, step, number))
            batch = self.objective.collate(part, self.device)
            with autocast(self.precision, self.device):
                loss = self.objective.loss(self.net, batch)
            self.scaler.scale(loss.total / tokens).backward()
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
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        console.warn(f"out of memory: going on with batches in {2**self.halvings} parts")

    def _update(self, step: int) -> bool:
        """Change the weights, unless the gradient is unusable: then the step is left out."""
        self.scaler.unscale_(self.optimizer)
        usable = bool(self._norm().isfinite())
        optim.set_rate(self.optimizer, self.rate(step + 1))
        if usable:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.mean:
            self.mean.update(step)
        # A loss scale that is still being found meets infinities on purpose, but not so many in a row.
        self.bad_steps = 0 if usable else self.bad_steps + 1
        if self.bad_steps >= BAD_STEPS:
            raise TrmtError(
                f"training fell apart: {BAD_STEPS} steps in a row had no finite gradient; start a new run "
                "with a lower optim.lr or with optim.clip=1.0"
            )
        return usable

    def _norm(self) -> Tensor:
        """The gradient's norm, cut if the recipe says so."""
        if self.recipe.optim.clip:
            return torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.optim.clip)
        grads = [p.grad for p in self.net.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

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
        nll, tokens = 0.0, 0
        for part in (part for examples in batches.whole() for part in self._in_parts([examples])):
            batch = self.objective.collate(part, self.device)
            with autocast(self.precision, self.device):
                loss = self.objective.loss(self.net, batch)
            nll += float(loss.nll)
            tokens += loss.tokens
        return nll / tokens

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
        return named

    def state(self) -> dict[str, Any]:
        """The part of the state that is no tensor."""
        return {
            "scaler": self.scaler.state_dict(),
            "halvings": self.halvings,
            "bad_steps": self.bad_steps,
            "machine": self.machine(),
        }

    def machine(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same to the last bit."""
        return {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "precision": self.precision,
        }

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state` and `tensors`."""
        for key, here in self.machine().items():
            if state["machine"].get(key) != here:
                console.warn(
                    f"this run was saved with {key} {state['machine'].get(key)} and goes on with {here}: "
                    "the same data in the same order, but not the same bits"
                )
        saved = _under(tensors, "live:") | _under(tensors, "buffer:")
        self.net.load_state_dict(self.net.state_dict() | saved)
        optim.restore_moments(self.net, self.optimizer, tensors)
        if self.mean:
            self.mean.restore(_under(tensors, "mean:"))
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.halvings, self.bad_steps = state["halvings"], state["bad_steps"]

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
