"""The state of training: what a step reads and changes, and what a checkpoint saves of it for resuming.

No state of a random generator is saved. The order of the data is a function of (seed, epoch), and each
micro-batch seeds the generator anew from (seed, step, micro-batch, rank). So `TrainProgress` is the position
of both the data and the generator, and a resumed run draws what an uninterrupted one draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from trmt import console
from trmt.bundles import bundles, consistency, init_from
from trmt.config import Count, Within, build, to_tree
from trmt.devices import hardware, varlen
from trmt.devices.abilities import abilities
from trmt.devices.choice import be_deterministic, choose_precision, compile_network
from trmt.errors import ConfigError
from trmt.nets.base import Network
from trmt.objectives.base import Objective, Specials
from trmt.registry import OBJECTIVES, resolve
from trmt.sets.batches import BatchShape
from trmt.text.tokenizer import BOS, EOS
from trmt.training import optim, overlap, sharding, word_vectors
from trmt.training.distributed import Distributed
from trmt.training.guard import GradientGuard
from trmt.training.micro_batches import MicroBatchSplitter
from trmt.training.overlap import OverlappedSums
from trmt.training.recipe import Recipe

Halvings = Annotated[int, Within(0, 40)]
DEFAULT_SPECIALS = Specials(bos=BOS, eos=EOS)  # of the tokenizers that trmt trains


@dataclass
class TrainProgress:
    """How far training has come, in numbers."""

    step: Count = 0  # steps taken so far
    epoch: Count = 0  # epoch of the next step
    epoch_step: Count = 0  # index of the next step in its epoch
    target_tokens: Count = 0  # target tokens trained on
    seconds: float = 0.0  # time spent in steps
    skipped_in_a_row: Count = 0  # steps up to this one that the guard has skipped
    best: float | None = None  # best validation score
    validations_since_best: Count = 0  # what patience counts
    validation_pending: bool = False  # whether this step has been saved, but not validated yet

    def add_score(self, value: float, *, lower_is_better: bool, warmup: int) -> bool:
        """Whether the score of a validation is the best one so far; patience begins after the warm-up."""
        better = self.best is None or (value < self.best if lower_is_better else value > self.best)
        if better and not math.isnan(value):
            self.best, self.validations_since_best = value, 0
            return True
        if self.step >= warmup:
            self.validations_since_best += 1
        return False


@dataclass(frozen=True)
class SavedValues:
    """All that resuming needs besides tensors."""

    data: str  # fingerprint of the prepared set
    progress: TrainProgress
    halvings: Halvings  # of micro-batches
    environment: dict[str, Any]  # what has to stay the same for a run that is the same to the last bit
    recipe: dict[str, Any]


class TrainState:
    """Network, objective, optimiser, EMA, guard and progress; training ends at `total_steps`, 0 if unknown.

    With several processes each has a TrainState. Weights and moments are the same on all ranks, or each rank
    has some rows of every tensor (`sharded`).
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        total_steps: int,
        distributed: Distributed | None = None,
        specials: Specials = DEFAULT_SPECIALS,
    ) -> None:
        self.recipe, self.distributed = recipe, distributed or Distributed()
        if recipe.training.deterministic:
            be_deterministic()
        self.device = self.distributed.device(recipe.training.device)
        if recipe.training.precision == "auto":
            self._agree("bf16")
        self.precision = choose_precision(recipe.training.precision, self.device)
        self.sharded = recipe.training.shard and self.distributed.world_size > 1
        self.net = self._build_network()
        self.objective = self._build_objective(specials)
        d_model = int(getattr(self.net.config, "d_model", 512))
        self.learning_rate = optim.learning_rate(recipe.optim, d_model=d_model, total_steps=total_steps)
        self.optimizer = optim.build_optimizer(self.net, recipe.optim)
        self.ema = optim.EMA(self.net, recipe.optim.ema) if recipe.optim.ema else None
        self.guard = GradientGuard(
            self.device,
            skip_spikes=recipe.training.on_spike != "ignore",
            fp16=self.precision == "fp16",
        )
        self.micro_batches = MicroBatchSplitter(
            self.distributed, sharded=self.sharded, indivisible=self.net.couples_batch
        )
        self.overlap: OverlappedSums | None = None
        if self.distributed.world_size > 1 and not self.sharded:
            self.overlap = OverlappedSums(self.net, self.distributed, bucket_bytes=overlap.BUCKET_BYTES)
        if self.precision != "fp32" and self.net.attends_packed:
            self._agree("varlen")
            if hardware.is_cuda(self.device):
                varlen.usable(self.device)  # proven before anything is traced
        self.compiled = self._is_to_be_compiled()
        self.forward: Any = self.net
        if self.compiled:
            self.forward = compile_network(self.net, bucket_bytes=overlap.BUCKET_BYTES if self.overlap else 0)
        self.batch_shape: BatchShape | None = None  # the shape that every batch fits into, if there is one
        self.progress = TrainProgress()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        if self.overlap:
            self.overlap.zero_grad()
        else:
            self.optimizer.zero_grad(set_to_none=True)

    # What the device can do

    def _agree(self, ability: str) -> None:
        """Use an ability of GPUs only if all ranks have it."""
        if hardware.is_cuda(self.device):
            self.distributed.agree(self.device, ability)

    def _is_to_be_compiled(self) -> bool:
        """Whether torch.compile is wanted, possible and proven."""
        auto = hardware.is_cuda(self.device) and self.net.pays_to_compile
        wanted = {"on": True, "auto": auto}.get(self.recipe.training.compile, False)
        if not wanted or self.sharded:  # gathering weights cannot be compiled
            return False
        self._agree("compile")
        return abilities(self.device).use("compile")

    @property
    def fills_batches(self) -> bool:
        """Whether a compiled network gets batches of one shape.

        On a GPU only where attention computes no padding: in grids, each sentence would be as long as the
        longest of the data.
        """
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        packed = self.precision != "fp32" and self.net.packs_attention(self.device, dtype)
        return self.compiled and (packed or not hardware.is_cuda(self.device))

    @property
    def can_fall_back(self) -> bool:
        """Whether the step can be computed in a simpler way if it fails."""
        packed = hardware.is_cuda(self.device) and self.precision != "fp32" and self._uses_varlen()
        return not self.sharded and (self.compiled or packed)

    def _uses_varlen(self) -> bool:
        return self.net.attends_packed and abilities(self.device).has("varlen")

    def fall_back(self, why: str, *, varlen_failed: bool) -> None:
        """Compute in a simpler way from now on: without what failed, as far as that is known.

        If it is not, it is torch.compile first, then packed attention.
        """
        if varlen_failed or not self.compiled:
            abilities(self.device).lose("varlen", why)
            varlen.usable(self.device)  # so that what was traced is traced again
        else:
            abilities(self.device).lose("compile", why)
            self.forward, self.compiled = self.net, False

    # Build

    def _build_network(self) -> Network:
        """The network with fresh weights, the same for the same seed, on the device and in training mode."""
        torch.manual_seed(self.recipe.training.seed)
        net = bundles.build_network(self.recipe.architecture, self.recipe.network, trust_code=True)
        word_vectors.check_and_freeze(net, self.recipe)
        if net.couples_batch and self.distributed.world_size > 1:
            raise ConfigError(
                "batch normalisation needs whole batches for its statistics, of which each of "
                f"{self.distributed.world_size} processes would have a part; train in one process, or choose "
                "an architecture without batch-norm"
            )
        if not self.sharded:
            return net.to(self.device).train()
        if self.precision == "fp16":
            raise ConfigError("training.shard works with bf16 and fp32, not fp16; set training.precision")
        sharding.shard(net, self.distributed, self.device)  # before it is moved: whole it may not fit
        return net.train()

    def _build_objective(self, specials: Specials) -> Objective:
        objective = resolve(OBJECTIVES, self.recipe.objective, trust_code=True)
        built: Objective = objective(build(objective.config_class, self.recipe.loss, where="loss"), specials)
        if not isinstance(self.net, built.networks):
            raise ConfigError(
                f"objective = {self.recipe.objective!r} cannot train architecture = "
                f"{self.recipe.architecture!r}; change one of the two"
            )
        return built

    @property
    def parameter_count(self) -> int:
        """The number of parameters of the network."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    # Initialise

    def initialise_from(
        self, weights: Mapping[str, Tensor], *, where: str, encoder_only: bool = False
    ) -> None:
        """Replace the fresh weights by these, or only those of the encoder."""
        if encoder_only:
            if self.sharded:
                raise ConfigError(
                    f"training.shard = true and --init-from {where}:encoder exclude each other; train "
                    "without sharding, or initialise from a whole network"
                )
            weights = init_from.with_encoder(self.net.state_dict(), weights, where=where)
        if self.sharded:
            consistency.check_weights(self.net, weights, where=where)
            for name, tensor in self.net.state_dict().items():
                sharding.load_tensor(tensor, weights, name, self.distributed)
        else:
            bundles.load_weights(self.net, weights, where=where)
        self.restart_ema()

    def restart_ema(self) -> None:
        """Start the moving average at the current weights."""
        if self.ema:
            self.ema = optim.EMA(self.net, self.ema.decay)

    def broadcast_weights(self) -> None:
        """Give all ranks the weights of rank 0; machines may draw different ones from the same seed."""
        if not self.sharded:
            with torch.no_grad():
                self.distributed.broadcast([*self.net.parameters(), *self.net.buffers()])

    # Save and restore

    def bundle_weights(self) -> dict[str, Tensor]:
        """The weights that a bundle stores: the moving average if there is one."""
        weights = dict(self.net.state_dict())
        return weights | self.ema.named_averages() if self.ema else weights

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that resuming needs, each once."""
        named: dict[str, Tensor] = {
            f"weights:{name}": parameter for name, parameter in self.net.named_parameters()
        }
        named |= {f"buffer:{name}": value for name, value in optim.saved_buffers(self.net).items()}
        named |= optim.moments(self.net, self.optimizer)
        if self.ema:
            named |= {f"ema:{name}": tensor for name, tensor in self.ema.named_averages().items()}
        return named | {f"guard:{name}": tensor for name, tensor in self.guard.tensors().items()}

    def bundle_names(self) -> dict[str, str]:
        """Which of `tensors` a bundle stores, with their names in the bundle."""
        buffers = {f"buffer:{name}": name for name in optim.saved_buffers(self.net)}
        if self.ema:
            averages = {f"ema:{name}": name for name in self.ema.named_averages()}
            others = {key: name for key, name in buffers.items() if f"ema:{name}" not in averages}
            return averages | others
        return {f"weights:{name}": name for name, _ in self.net.named_parameters()} | buffers

    def values(self) -> dict[str, Any]:
        """All that resuming needs besides tensors, as JSON values."""
        return {
            "progress": asdict(self.progress),
            "halvings": self.micro_batches.halvings,
            "environment": self.environment(),
            "recipe": to_tree(self.recipe),
        }

    def environment(self) -> dict[str, Any]:
        """What has to stay the same for a resumed run to be the same to the last bit."""
        return {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "precision": self.precision,
            "processes": self.distributed.world_size,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }

    def restore(self, values: SavedValues, saved: Mapping[str, Tensor]) -> None:
        """Restore what `values` and `tensors` returned, on any number of processes."""
        for key, current in self.environment().items():
            if (before := values.environment.get(key, current)) != current:
                console.warn(
                    f"this run was saved with {key} {before} and goes on with {current}: the data comes in "
                    "the same order, but results will not be the same to the last bit"
                )
        optim.load_moments(self.net, self.optimizer, saved, self.distributed)
        guard = {name.removeprefix("guard:"): saved[name] for name in saved if name.startswith("guard:")}
        self.guard.load(guard)
        for name, tensor in self.tensors().items():
            if name.startswith(("weights:", "buffer:", "ema:")) and name in saved:
                sharding.load_tensor(tensor, saved, name, self.distributed)
        sharding.reshard(self.net)
        self.micro_batches.halvings = values.halvings
        self.progress = replace(values.progress)

    # Evaluate

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The weights that a bundle would store, in eval mode; afterwards everything is as it was before."""
        if self.ema:
            self.ema.swap()
        sharding.reshard(self.net)
        self.net.eval()
        try:
            yield
        finally:
            self.net.train()
            if self.ema:
                self.ema.swap()
            sharding.reshard(self.net)
