"""What a run will take, said before its first step: memory, time and disk.

Memory and time are measured by really taking a few steps with a copy of the network, which is thrown away:
the run that follows is the same with or without them.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trmt import console
from trmt.devices import memory
from trmt.devices.choice import autocast
from trmt.sets.batches import TRIAL, Batches, Indices
from trmt.training.display import About
from trmt.training.learner import Learner
from trmt.training.recipe import TrainingConfig

# The steps that are timed, as places in an epoch sorted by size: each stands for its share of the epoch, and
# after each group those so far do so too.
SAMPLES = ((0.5,), (0.1, 0.9), (0.3, 0.7))
PATIENCE = 10.0  # seconds after which no further group is timed
SAFE = 0.8  # of the free memory: what is expected to take more is not tried
SLACK = 1.6  # on what is kept for the backward pass: with what it needs for a moment, as measured on a CPU


@dataclass(frozen=True)
class Job:
    """A run that is to be taken on."""

    learner: Learner
    batches: Batches
    folder: Path
    training: TrainingConfig
    steps_per_epoch: int
    last: int | None  # the step it ends at, if that is known
    done: int = 0


@dataclass(frozen=True)
class Measured:
    """What a few real steps showed; the peak is None where the largest batch was not tried."""

    seconds: float  # a step
    tokens: float  # target tokens a step
    steps: int  # that were timed
    peak: int | None = None
    parts: int = 1  # in how many the largest batch had to be split


def about(job: Job) -> About:
    """What can be shown of a run before its first step."""
    learner = job.learner
    network = f"{learner.recipe.architecture}, {learner.parameters / 1e6:.1f}M parameters"
    return About(
        name=str(job.folder),
        network=f"{network}, {learner.device.type} {learner.precision}",
        steps_per_epoch=job.steps_per_epoch,
        last=job.last,
        done=job.done,
        memory=memory.total(learner.device),
    )


def state_bytes(learner: Learner) -> int:
    """Weights, gradients, the optimiser's two moments, and the running mean if there is one."""
    weights = sum(parameter.nbytes for parameter in learner.net.parameters())
    return weights * (4 + bool(learner.mean))


def activation_bytes(learner: Learner, batches: Batches) -> int:
    """The most that a batch keeps for its backward pass, from measuring an eighth of the largest ones."""
    return max(_kept_for_backward(learner, batches, pairs) for pairs in batches.largest())


def _kept_for_backward(learner: Learner, batches: Batches, pairs: Indices) -> int:
    part = pairs[: max(len(pairs) // 8, 1)]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch = learner.objective.collate(batches.load(part, seed=TRIAL), learner.device)
        with autocast(learner.precision, learner.device):
            loss = learner.objective.loss(learner.net, batch)
    own = {parameter.untyped_storage().data_ptr() for parameter in learner.net.parameters()}
    del loss
    found = sum(size for place, size in kept.items() if place not in own)
    return found * batches.cost(pairs) // batches.cost(part)


def disk_bytes(job: Job) -> int:
    """The most that checkpoints take: those kept for their score, those to resume from, one being written."""
    weights = sum(parameter.nbytes for parameter in job.learner.net.parameters())
    whole = weights * (4 + bool(job.learner.mean))  # as a bundle, as it is, two moments, the mean
    return weights * job.training.keep_best + whole * (job.training.keep_last + 1)


def disk_free(folder: Path) -> int:
    """What is free where the folder is or will be."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def measure(learner: Learner, batches: Batches, *, largest: bool) -> Measured:
    """A few steps of typical size with a copy of the network, and one with the largest batch if wanted."""
    steps = batches.plan(0)
    sizes = [sum(batches.cost(pairs) for pairs in step) for step in steps]
    order = sorted(range(len(steps)), key=sizes.__getitem__)
    with _as_before(learner.device):
        weights = sum(parameter.nbytes for parameter in learner.net.parameters())
        memory.forget_peak(learner.device)
        scratch = copy.deepcopy(learner)
        timed: list[tuple[float, int]] = []
        _timed(scratch, batches, steps[order[len(order) // 2]])  # the first step of all makes room and plans
        for group in SAMPLES:
            timed += [_timed(scratch, batches, steps[order[int(len(order) * part)]]) for part in group]
            if sum(seconds for seconds, _ in timed) > PATIENCE:
                break
        highest = None
        if largest:
            for pairs in batches.largest():
                _timed(scratch, batches, [pairs])
            highest = memory.peak(learner.device)
        parts = 2**scratch.parts.halvings
        del scratch
    return Measured(
        seconds=sum(seconds for seconds, _ in timed) / len(timed),
        tokens=sum(tokens for _, tokens in timed) / len(timed),
        steps=len(timed),
        peak=None if highest is None else highest - weights,  # the copy's own
        parts=parts,
    )


def _timed(learner: Learner, batches: Batches, step: Sequence[Indices]) -> tuple[float, int]:
    """Seconds and target tokens of a step."""
    examples = [batches.load(pairs, seed=TRIAL) for pairs in step]
    _settle(learner.device)
    began = time.perf_counter()
    learned = learner.learn(examples, 0)
    _settle(learner.device)
    return time.perf_counter() - began, learned.tokens


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def _as_before(device: torch.device) -> Iterator[None]:
    """Leave the generators as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


def plan(job: Job) -> None:
    """A table of what the run would take and of what is there, and warnings where that is less."""
    learner, batches = job.learner, job.batches
    states, free, now = (
        state_bytes(learner),
        memory.free(learner.device),
        memory.taken(learner.device) or 0,
    )
    with _as_before(learner.device):
        activations = activation_bytes(learner, batches)
    expected = states + int(activations * SLACK)
    fits = free is None or expected < free * SAFE
    found = measure(learner, batches, largest=True) if fits else None
    peak = found.peak if found and found.peak else now + expected
    how = "measured" if found and found.peak else "estimated"
    disk, there = disk_bytes(job), disk_free(job.folder)
    last = f"{job.last:,}" if job.last else "until patience ends it"
    rows = [
        ["parameters", f"{learner.parameters:,}"],
        ["weights, gradients, optimiser", size(states)],
        ["activations of the largest batch", size(activations)],
        [f"peak memory, {how}", f"{size(peak)}{f' of {size(free)} free' if free else ''}"],
        ["steps per epoch", f"{job.steps_per_epoch:,}"],
        ["steps in all", last],
        *_times(job, found),
        ["checkpoints on disk, at most", f"{size(disk)} of {size(there)} free"],
        ["pairs", f"{len(batches.split):,}"],
        ["target tokens per epoch", f"{int((batches.by_target + 1).sum()):,}"],
        ["device and precision", f"{learner.device} {learner.precision}"],
    ]
    console.table(f"plan for {job.folder}", ["what", "how much"], rows)
    if found and found.parts > 1:
        console.warn(f"the largest batch does not fit and goes in {found.parts} parts; {SMALLER}")
    _warn_of_memory(states, peak - now, free)
    _warn_of_disk(disk, there, job.folder)


def _times(job: Job, found: Measured | None) -> list[list[str]]:
    if not found:
        return [["time per step", "not measured: it would not fit"]]
    rows = [
        ["time per step", f"{found.seconds:.3g} s, mean of {found.steps} of typical size"],
        ["target tokens/s", f"{found.tokens / found.seconds:,.0f}"],
        ["time per epoch", console.duration(found.seconds * job.steps_per_epoch)],
    ]
    if job.last:
        rows.append(["time in all", f"{console.duration(found.seconds * job.last)}, without validation"])
    return rows


SMALLER = "halve batches.tokens and double batches.accumulate to take the same steps in less memory"


def _warn_of_memory(states: int, needed: int, free: int | None) -> None:
    if free is None or needed < free:
        return
    if states > free * SAFE:
        console.warn(
            f"the network and its optimiser alone take {size(states)} and {size(free)} are free; use a "
            "smaller network.d_model or fewer layers, or another training.device"
        )
    else:
        console.warn(f"training takes about {size(needed)} of memory and {size(free)} are free; {SMALLER}")


def _warn_of_disk(needed: int, there: int, folder: Path) -> None:
    if needed > there:
        console.warn(
            f"checkpoints take up to {size(needed)} and {size(there)} are free for {folder}; lower "
            "training.keep_best or training.keep_last, or make room"
        )


def glance(job: Job) -> None:
    """In one line what is known without taking a step, and warnings where that is too much already."""
    states, free = state_bytes(job.learner), memory.free(job.learner.device)
    disk, there = disk_bytes(job), disk_free(job.folder)
    console.say(
        f"needs {size(states)} of memory besides batches{f' ({size(free)} free)' if free else ''}, "
        f"up to {size(disk)} of disk ({size(there)} free)"
    )
    _warn_of_memory(states, states, free)
    _warn_of_disk(disk, there, job.folder)


def pace(job: Job, *, seconds: float) -> str:
    """In one line what the first steps have shown, each of which took so many seconds."""
    peak = memory.peak(job.learner.device)
    left = (job.last - job.done) * seconds if job.last else None
    total = f", {console.duration(left)} to step {job.last:,}" if left else ""
    most = f"; memory so far {size(peak)}" if peak else ""
    return f"{seconds:.2g} s a step: {console.duration(seconds * job.steps_per_epoch)} an epoch{total}{most}"


def size(count: int) -> str:
    """Bytes as people say them."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
