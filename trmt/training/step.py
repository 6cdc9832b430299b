"""One training step: forward and backward over micro-batches, sum over ranks, clip, update, moving average.

With several processes each knows all batches of the step and computes the gradients of its share. Gradients
are sums over the tokens of a share, divided by the tokens of all shares; the ranks' gradients are added up
while the backward pass of the last micro-batch runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from traceback import walk_tb
from typing import Any

import numpy as np
import torch

from trmt.devices import varlen
from trmt.devices.choice import autocast
from trmt.devices.memory import is_device_error, is_out_of_memory
from trmt.errors import TrmtError, first_line
from trmt.sets.batches import PROBE_SEED, Batches, BatchShape, RaggedBatch
from trmt.training import optim, sharding
from trmt.training.distributed import is_connection_error
from trmt.training.micro_batches import MicroBatch
from trmt.training.state import TrainState

# How the gradients of a step came out; of several ranks the highest counts.
FINE, OUT_OF_MEMORY, FAILED, VARLEN_FAILED = range(4)


@dataclass
class StepResult:
    """The loss of a step."""

    nll: Any  # sum of negative log likelihoods; a tensor, because a number would make the host wait
    tokens: int  # target tokens of all ranks


def train_step(state: TrainState, batches: list[RaggedBatch]) -> StepResult:
    """Take the next step, over the gradients of some batches.

    Whether the weights were updated or the guard skipped the step is in the guard's reports.
    """
    result = compute_gradients(state, batches)
    update_weights(state, result)
    state.progress.step += 1
    state.progress.target_tokens += result.tokens
    return result


def compute_gradients(state: TrainState, batches: list[RaggedBatch]) -> StepResult:
    """The gradients of the mean loss over the batches of all ranks, left in the parameters' `grad`.

    Where memory runs out, all ranks halve their micro-batches and compute the gradients again. Where
    something fails that a step can do without, all ranks do without it and compute them again.
    """
    tokens = sum(state.objective.tokens(batch) for batch in batches)
    while True:
        state.zero_grad()
        nll: Any = None
        outcome, why = FINE, "it failed on another rank"
        try:
            nll = forward_backward(state, state.micro_batches.split(batches), tokens)
        except TrmtError:
            raise
        except Exception as error:  # whatever compilers, drivers and PyTorch raise
            outcome, why = _outcome(error, state), first_line(error)
        # Outside of the handler, because the error keeps the tensors of the failed attempt alive.
        largest_share = max(-(-len(batch) // state.distributed.world_size) for batch in batches)
        if outcome == OUT_OF_MEMORY and state.sharded:
            state.micro_batches.raise_out_of_memory(largest_share)
        if state.overlap:
            state.overlap.finish()
        outcome = state.distributed.all_reduce_max(outcome)
        if outcome == FINE:
            return StepResult(_sum_over_ranks(state, nll), tokens)
        nll = None
        state.zero_grad()
        if state.device.type == "cuda":
            torch.cuda.empty_cache()
        if outcome == OUT_OF_MEMORY:
            state.micro_batches.halve(largest_share)
        else:
            state.fall_back(why, varlen_failed=outcome == VARLEN_FAILED)


def _outcome(error: Exception, state: TrainState) -> int:
    """What an error means for the step; one that it cannot do without is raised again."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    connection = isinstance(error, RuntimeError) and is_connection_error(error)
    in_collate = any(frame.f_code.co_name == "collate" for frame, _ in walk_tb(error.__traceback__))
    if connection or in_collate or is_device_error(error) or not state.can_fall_back:
        raise error
    return VARLEN_FAILED if varlen.is_to_blame(error) else FAILED


def forward_backward(state: TrainState, micro_batches: list[MicroBatch], tokens: int) -> Any:
    """Add up the gradients of the micro-batches; returns the sum of their negative log likelihoods."""
    nll: Any = 0.0
    for number, (examples, is_dummy) in enumerate(micro_batches):
        seed = state.recipe.training.seed
        torch.manual_seed(_seed(seed, state.progress.step, number, *state.distributed.seed_key))
        batch = state.objective.collate(examples, state.device, shape=_micro_batch_shape(state))
        with autocast(state.precision, state.device):
            loss = state.objective.loss(state.forward, batch)
        total = loss.total * 0 if is_dummy else loss.total
        if state.overlap and number == len(micro_batches) - 1:
            state.overlap.start()
        state.guard.scale_loss(total / tokens).backward()
        nll = nll + (loss.nll * 0 if is_dummy else loss.nll)
    return nll


def update_weights(state: TrainState, result: StepResult) -> None:
    """Clip the gradients and update the weights, unless the guard skips the step, and the moving average."""
    step = state.progress.step
    optim.set_learning_rate(state.optimizer, state.learning_rate(step + 1))
    grads = [p.grad for p in state.net.parameters() if p.grad is not None]
    state.guard.update(
        state.optimizer,
        step=step + 1,
        norm=sharding.full_tensor(torch.nn.utils.get_total_norm(grads)),
        nll=result.nll,
        tokens=result.tokens,
        clip=state.recipe.optim.clip,
    )
    if state.ema:
        state.ema.update(step)


def rehearse(state: TrainState, batches: Batches) -> None:
    """Compute and discard the gradients of the largest batches, so that short memory shows before step 1.

    Only the number of micro-batches can have changed afterwards: every step seeds the generator itself, and
    buffers are put back.
    """
    buffers = {name: buffer.clone() for name, buffer in state.net.named_buffers()}
    # The optimiser's moments exist from the first step on, and have to fit next to the gradients.
    missing = [] if state.optimizer.state else [*state.net.parameters()] * 2
    reserved = [torch.empty_like(parameter) for parameter in missing]
    for pairs in batches.largest_batches():
        # From the second batch of a step on, there are gradients besides the activations.
        compute_gradients(state, [batches.load(pairs, seed=PROBE_SEED)] * min(batches.config.accumulate, 2))
    del reserved
    state.zero_grad()
    with torch.no_grad():
        for name, buffer in state.net.named_buffers():
            buffer.copy_(buffers[name])


def _sum_over_ranks(state: TrainState, nll: Any) -> Any:
    """The sum of `nll` over all ranks, of which one without pairs adds nothing."""
    if state.distributed.world_size == 1:
        return nll
    total = torch.zeros(1, device=state.device) + nll
    state.distributed.start_all_reduce(total)()
    return total[0]


def _micro_batch_shape(state: TrainState) -> BatchShape | None:
    """The shape that micro-batches are padded to for a compiled network; None where none are padded."""
    if state.net.counts_tokens or not state.batch_shape or not state.fills_batches:
        return None  # a network that counts tokens would count the padding
    return state.batch_shape.micro_batch(state.distributed.world_size * 2**state.micro_batches.halvings)


def _seed(*keys: int) -> int:
    """A seed that is a function of these keys alone."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> np.uint64(1))
