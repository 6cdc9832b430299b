"""A network that learns: gradients of batches, steps of the optimiser, and what resuming needs of them.

Every batch seeds the generator anew from (seed, step, number of the batch), so dropout does not depend on
what was computed before, and a resumed run draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trmt import console
from trmt.bundles import bundles, init_from
from trmt.config import build
from trmt.devices.choice import autocast, be_deterministic, choose_device, choose_precision, compile_network
from trmt.devices.memory import is_out_of_memory
from trmt.errors import ConfigError
from trmt.nets.base import Network, Seq2Seq
from trmt.objectives.base import Objective, Specials
from trmt.registry import OBJECTIVES, resolve
from trmt.sets.batches import PROBE_SEED, Batches, BatchShape, RaggedBatch
from trmt.text.tokenizer import BOS, EOS
from trmt.training import optim, sharding, word_vectors
from trmt.training.distributed import Team
from trmt.training.guard import Guard
from trmt.training.micro_batches import Parts, Pass
from trmt.training.recipe import Recipe


@dataclass
class Learned:
    """What one step saw."""

    nll: Any  # sum of negative log likelihoods; kept as a tensor: a number would make us wait for the device
    tokens: int


class DevLoss(NamedTuple):
    """The loss per token of a dev set in nats, and the share of right answers to other questions, if any."""

    loss: float
    right: float | None


SPECIALS = Specials(bos=BOS, eos=EOS)  # of the tokenizers that are trained here


class Learner:
    """A network with its objective, optimiser, running mean and precision; training ends at step `steps`.

    In a team every process knows the whole batch and learns from its share of it. Gradients are sums over
    shares divided by the tokens of all; they are added up once everyone has got through.
    """

    def __init__(
        self, recipe: Recipe, *, steps: int, team: Team | None = None, specials: Specials = SPECIALS
    ) -> None:
        self.recipe, self.team = recipe, team or Team()
        if recipe.training.deterministic:
            be_deterministic()
        self.device = self.team.place(choose_device(recipe.training.device))
        self.precision = choose_precision(recipe.training.precision, self.device)
        torch.manual_seed(recipe.training.seed)
        self.net = bundles.build_network(recipe.architecture, recipe.network, trust_code=True)
        word_vectors.check_and_freeze(self.net, recipe)
        self._check_team()
        self.sharded = recipe.training.shard and self.team.size > 1
        if self.sharded:
            self._shard()
        else:
            self.net.to(self.device)
        self.net.train()
        width = int(getattr(self.net.config, "d_model", 512))
        self.rate = optim.learning_rate(recipe.optim, width=width, steps=steps)
        objective = resolve(OBJECTIVES, recipe.objective, trust_code=True)
        loss = build(objective.config_class, recipe.loss, where="loss")
        self.objective: Objective = objective(loss, specials)
        self._check_network()
        self.optimizer = optim.optimiser(self.net, recipe.optim)
        self.guard = Guard(
            self.device,
            leaves_out_steep=recipe.training.on_spike != "ignore",
            half=self.precision == "fp16",
        )
        self.mean = optim.RunningMean(self.net, recipe.optim.ema) if recipe.optim.ema else None
        wanted = {"on": True, "auto": self.device.type == "cuda"}.get(recipe.training.compile, False)
        self.compiles = wanted and not self.sharded  # gathering weights is nothing to compile
        self._forward: Any = compile_network(self.net) if self.compiles else self.net
        self.batch_shape: BatchShape | None = (
            None  # the shape that nearly all batches fit into, if there is one
        )
        self.parts = Parts(self.team, sharded=self.sharded, whole=self.net.couples_batch)

    def _check_team(self) -> None:
        if self.net.couples_batch and self.team.size > 1:
            raise ConfigError(
                f'network.norm = "batch" takes its statistics of whole batches, of which {self.team.size} '
                'processes would see a share each; train in one process, or set network.norm = "layer"'
            )

    def _check_network(self) -> None:
        if not isinstance(self.net, self.objective.networks):
            raise ConfigError(
                f"objective = {self.recipe.objective!r} cannot be learned by architecture = "
                f"{self.recipe.architecture!r}; change one of the two"
            )

    def _shard(self) -> None:
        """Keep a slice of the network; whole it may not fit on the device."""
        if self.precision == "fp16":
            raise ConfigError("training.shard works with bf16 and fp32, not fp16; set training.precision")
        sharding.shard(self.net, self.team, self.device)

    @property
    def parameters(self) -> int:
        """How many numbers the network learns."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    def _shape(self) -> BatchShape | None:
        """The shape to pad micro-batches to if the network is compiled; otherwise padding only costs time."""
        if self.net.counts_tokens:  # also those that a batch would be filled up with
            return None
        parts = self.team.size * 2**self.parts.halvings
        return self.batch_shape.micro_batch(parts) if self.compiles and self.batch_shape else None

    # Step

    def learn(self, examples: list[RaggedBatch], step: int) -> Learned:
        """Step number `step`, counted from 0, over some batches; nothing is dropped when memory is short.

        Whether the step was taken is for the guard to say, later.
        """
        learned = self._gradients_that_fit(examples, step)
        self._update(step, learned)
        return learned

    def _gradients_that_fit(self, examples: list[RaggedBatch], step: int) -> Learned:
        """Gradients of the mean loss, from parts of the batches where the whole does not fit into memory."""
        tokens = sum(self.objective.tokens(batch) for batch in examples)
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            nll: Any = None
            try:
                nll = self._gradients(self.parts.passes(examples), tokens, step)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler: the error holds on to the tensors of the attempt that failed.
            pairs = max(-(-len(batch) // self.team.size) for batch in examples)  # of the largest share
            if nll is None and self.sharded:
                self.parts.give_up(pairs)
            if not self.team.settle(failed=nll is None):
                return Learned(self._added_up(nll), tokens)
            self.optimizer.zero_grad(set_to_none=True)
            self._free()
            self.parts.halve(pairs)

    def _gradients(self, passes: list[Pass], tokens: int, step: int) -> Any:
        """Gradients of the mean loss; the sum of negative log likelihoods is returned."""
        nll: Any = 0.0
        for number, (part, idle) in enumerate(passes):
            torch.manual_seed(_seed(self.recipe.training.seed, step, number, *self.team.key))
            batch = self.objective.collate(part, self.device, shape=self._shape())
            with autocast(self.precision, self.device):
                loss = self.objective.loss(self._forward, batch)
            total = loss.total * 0 if idle else loss.total
            self.guard.scaled(total / tokens).backward()
            nll = nll + (loss.nll * 0 if idle else loss.nll)
        return nll

    def _added_up(self, nll: Any) -> Any:
        """Make gradients those of the whole team, and return its sum; a rank without pairs adds zero."""
        if self.team.size == 1:
            return nll
        total = torch.zeros(1, device=self.device) + nll
        grads: list[Tensor] = []
        if not self.sharded:  # there they were added up on the way
            for parameter in filter(lambda p: p.requires_grad, self.net.parameters()):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grads.append(parameter.grad)
        self.team.add([*grads, total])
        return total[0]

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
        return sharding.whole(torch.nn.utils.get_total_norm(grads))

    def rehearse(self, batches: Batches) -> None:
        """Gradients of the largest batches, thrown away: memory that is too short shows before step 1.

        Nothing but the number of parts can have changed afterwards: every step draws from a generator that
        it seeds itself, and what networks keep besides weights is put back.
        """
        kept = {name: buffer.clone() for name, buffer in self.net.named_buffers()}
        # The optimiser's memory is there from the first step on, and has to fit beside the gradients.
        missing = [] if self.optimizer.state else [*self.net.parameters()] * 2
        reserved = [torch.empty_like(parameter) for parameter in missing]
        for pairs in batches.largest_batches():
            # From the second batch of a step on, gradients are there beside the activations.
            twice = [batches.load(pairs, seed=PROBE_SEED)] * min(batches.config.accumulate, 2)
            self._gradients_that_fit(twice, step=0)
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
        sharding.let_go(self.net)
        self.net.eval()
        try:
            yield
        finally:
            self.net.train()
            if self.mean:
                self.mean.swap()
            sharding.let_go(self.net)

    @torch.no_grad()
    def dev_loss(self, batches: Batches) -> DevLoss:
        """What a dev set loses with today's weights; each process looks at its share."""
        found: list[tuple[Tensor, int, int]] = []
        short = False
        try:
            found = [
                sums for examples in batches.iterate_once() for sums in self._dev_sums_that_fit(examples)
            ]
        except (MemoryError, RuntimeError) as error:
            if self.team.size == 1 or not is_out_of_memory(error):
                raise
            short = True
        if short and self.sharded:
            self.parts.give_up(int(batches.config.tokens))
        if self.team.settle(short):
            raise MemoryError("out of memory")
        sums = torch.stack([sums_2 for sums_2, *_ in found]).T.tolist() if found else [[], []]
        counts = (sum(tokens for _, tokens, _ in found), sum(questions for *_, questions in found))
        nll, right, tokens, questions = self.team.total(*map(math.fsum, sums), *counts)
        return DevLoss(nll / tokens, right / questions if questions else None)

    def _dev_sums_that_fit(self, examples: RaggedBatch) -> list[tuple[Tensor, int, int]]:
        """The sums over the parts of a batch, which are made smaller until they fit into memory."""
        if self.sharded:
            return [self._dev_sums(part, idle=idle) for part, idle in self.parts.passes([examples])]
        waiting, done = [part for part, _ in self.parts.passes([examples])][::-1], []
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
            waiting += part.halve()[::-1]
        return done

    def _dev_sums(self, part: RaggedBatch, *, idle: bool = False) -> tuple[Tensor, int, int]:
        """The loss and the right answers [2] of a part, of how many tokens and questions."""
        batch = self.objective.collate(part, self.device)
        with autocast(self.precision, self.device):
            loss = self.objective.loss(self.net, batch)
        right = torch.zeros_like(loss.nll) if loss.right is None else loss.right.to(loss.nll.dtype)
        sums_2 = torch.stack([loss.nll, right])
        return (sums_2 * 0, 0, 0) if idle else (sums_2, loss.tokens, loss.questions)

    def to_translate_with(self) -> Seq2Seq:
        """An ordinary network with today's weights, for the leader to use; for all ranks to call together."""
        plain: Network | None = None if self.sharded else self.net
        if not self.sharded:
            assert isinstance(plain, Seq2Seq), "only what can translate is asked to"
            return plain
        if self.team.leads:
            plain = bundles.build_network(self.recipe.architecture, self.recipe.network, trust_code=True)
            plain.to(self.device).eval()
        sharding.gather_into(plain, self.net)
        net = plain or self.net
        assert isinstance(net, Seq2Seq), "only what can translate is asked to"
        return net

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
        named |= {f"buffer:{name}": value for name, value in optim.kept_buffers(self.net).items()}
        named |= optim.moments(self.net, self.optimizer)
        if self.mean:
            named |= {f"mean:{name}": tensor for name, tensor in self.mean.named().items()}
        return named | {f"guard:{name}": tensor for name, tensor in self.guard.tensors().items()}

    def kept(self) -> dict[str, str]:
        """The names of the tensors that make the bundle: there, and in it."""
        buffers = {f"buffer:{name}": name for name in optim.kept_buffers(self.net)}
        if self.mean:
            averaged = {f"mean:{name}": name for name in self.mean.named()}
            others = {key: name for key, name in buffers.items() if f"mean:{name}" not in averaged}
            return averaged | others
        return {f"live:{name}": name for name, _ in self.net.named_parameters()} | buffers

    def state(self) -> dict[str, Any]:
        """The part of the state that is no tensor."""
        return {"halvings": self.parts.halvings, "machine": self.machine()}

    def machine(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same to the last bit."""
        return {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "precision": self.precision,
            "processes": self.team.size,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state` and `tensors`."""
        for key, here in self.machine().items():
            saved_with = state["machine"].get(key, 1 if key == "processes" else here)
            if saved_with != here:
                console.warn(
                    f"this run was saved with {key} {saved_with} and goes on with {here}: "
                    "the same data in the same order, but not the same bits"
                )
        if self.sharded:
            self._put(tensors)
        else:
            saved = _under(tensors, "live:") | _under(tensors, "buffer:")
            self.net.load_state_dict(self.net.state_dict() | saved)
            optim.restore_moments(self.net, self.optimizer, tensors)
            if self.mean:
                self.mean.restore(_under(tensors, "mean:"))
        self.guard.restore(_under(tensors, "guard:"))
        self.parts.halvings = state["halvings"]

    def start_alike(self) -> None:
        """Let all processes have the leader's weights, whatever their machines made of the seed."""
        if not self.sharded:
            with torch.no_grad():
                self.team.spread([*self.net.parameters(), *self.net.buffers()])

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        """Read this rank's slices, whoever wrote them."""
        sharding.restore_moments(self.net, self.optimizer, tensors, self.team)
        now = self.tensors()
        for name in now.keys() & tensors.keys():
            if not name.startswith("guard:"):
                sharding.put(now[name], tensors, name, self.team)
        sharding.let_go(self.net)

    def start_from(self, weights: Mapping[str, Tensor], *, where: str, encoder: bool = False) -> None:
        """Begin with these weights instead of random ones, or only with those of what reads."""
        if encoder:
            if self.sharded:
                raise ConfigError(
                    f"training.shard = true and --init-from {where}:encoder exclude each other; begin "
                    "without sharding, or save a whole network to begin from"
                )
            weights = init_from.with_encoder(self.net.state_dict(), weights, where=where)
        if self.sharded:
            bundles.check_weights(self.net, weights, where=where)
            for name, tensor in self.net.state_dict().items():
                sharding.put(tensor, weights, name, self.team)
        else:
            bundles.load_weights(self.net, weights, where=where)
        self.restart_mean()

    def restart_mean(self) -> None:
        """Let the running mean begin with the weights that are there now."""
        if self.mean:
            self.mean = optim.RunningMean(self.net, self.mean.decay)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _seed(*keys: int) -> int:
    """A seed that belongs to these keys alone."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))
