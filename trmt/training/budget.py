"""The memory, time and disk space that a run needs, reported before its first step.

Memory and time are measured by taking a few steps with a copy of the network, which is discarded: the run
itself is the same with or without the measurement.
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
from trmt.sets.batches import PROBE_SEED, Batches, PairNumbers
from trmt.training.display import RunInfo
from trmt.training.history import LABELS
from trmt.training.recipe import TrainingConfig
from trmt.training.state import TrainState
from trmt.training.step import train_step
from trmt.training.validation import Validator

# The steps to time, as quantiles of the size of an epoch's steps: the mean of each group, and of the first
# groups together, is typical of the epoch.
TIMED_QUANTILES = ((0.5,), (0.1, 0.9), (0.3, 0.7))
MAX_SECONDS = 10.0  # after which no further group is timed
SAFE_SHARE = 0.8  # of the free memory; steps that are expected to need more are not tried
TEMPORARY = 1.6  # factor on the saved activations for temporary tensors, as measured on a CPU


@dataclass(frozen=True)
class PlannedRun:
    """A run whose needs are to be estimated."""

    state: TrainState
    batches: Batches
    folder: Path
    training: TrainingConfig
    steps_per_epoch: int
    last_step: int | None  # where it ends at the latest, if that is known
    validator: Validator | None = None

    @property
    def patience(self) -> int:
        """The number of validations that may end it before the last step; 0 if it cannot end before that."""
        patience = self.training.patience if self.validator else 0
        never = self.last_step is not None and (1 + patience) * self.every >= self.last_step
        return 0 if never else patience

    @property
    def every(self) -> int:
        """The number of steps between validations."""
        return self.state.recipe.validation.every

    @property
    def info(self) -> RunInfo:
        """What the display of the run shows."""
        state = self.state
        network = f"{state.recipe.architecture}, {state.parameter_count / 1e6:.1f}M parameters"
        return RunInfo(
            name=str(self.folder),
            network=f"{network}, {state.device.type} {state.precision}",
            steps_per_epoch=self.steps_per_epoch,
            last_step=self.last_step,
            may_end_early=bool(self.patience),
            steps_done=state.progress.step,
            memory=memory.total(state.device),
        )


@dataclass(frozen=True)
class Measurement:
    """The result of a few real steps."""

    seconds: float  # a step
    tokens: float  # target tokens a step
    steps: int  # the number of steps that were timed
    peak: int | None = None  # bytes; None where the largest batches were not tried
    micro_batches: int = 1  # into which the largest batch had to be split


def weight_bytes(state: TrainState) -> int:
    """The size of the weights."""
    return sum(parameter.nbytes for parameter in state.net.parameters())


def state_bytes(state: TrainState) -> int:
    """The size of weights, gradients, the optimiser's two moments, and the moving average if there is one."""
    return weight_bytes(state) * (4 + bool(state.ema))


def activation_bytes(state: TrainState, batches: Batches) -> int:
    """The most that a batch saves for its backward pass, from measuring an eighth of the largest ones."""
    return max(_saved_activations(state, batches, pairs) for pairs in batches.largest_batches())


def _saved_activations(state: TrainState, batches: Batches, pairs: PairNumbers) -> int:
    some = pairs[: max(len(pairs) // 8, 1)]
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch = state.objective.collate(batches.load(some, seed=PROBE_SEED), state.device)
        with autocast(state.precision, state.device):
            loss = state.objective.loss(state.net, batch)
    weights = {parameter.untyped_storage().data_ptr() for parameter in state.net.parameters()}
    del loss
    total = sum(size for address, size in saved.items() if address not in weights)
    return total * batches.cost(pairs) // batches.cost(some)


def disk_bytes(run: PlannedRun) -> int:
    """The most that checkpoints take: those kept for their score, those to resume from, one being written."""
    weights = weight_bytes(run.state)
    resumable = weights * (4 + bool(run.state.ema))  # the bundle, the weights, two moments, the average
    return weights * run.training.keep_best + resumable * (run.training.keep_last + 1)


def free_disk_bytes(folder: Path) -> int:
    """The free space on the disk where the folder is or will be."""
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def measure(state: TrainState, batches: Batches, *, largest: bool) -> Measurement:
    """Take a few steps of typical size with a copy of the state, and if wanted with each largest batch."""
    steps = batches.plan(0)
    sizes = [sum(batches.cost(pairs) for pairs in step) for step in steps]
    order = sorted(range(len(steps)), key=sizes.__getitem__)
    with _preserved_generators(state.device):
        memory.reset_peak(state.device)
        scratch = copy.deepcopy(state)
        times: list[tuple[float, int]] = []
        time_step(scratch, batches, steps[order[len(order) // 2]])  # a warm-up, which allocates memory
        for group in TIMED_QUANTILES:
            times += [time_step(scratch, batches, steps[order[int(len(order) * at)]]) for at in group]
            if sum(seconds for seconds, _ in times) > MAX_SECONDS:
                break
        peak = None
        if largest:
            for pairs in batches.largest_batches():
                time_step(scratch, batches, [pairs])
            peak = memory.peak(state.device)
        micro_batches = 2**scratch.micro_batches.halvings
        del scratch
    return Measurement(
        seconds=sum(seconds for seconds, _ in times) / len(times),
        tokens=sum(tokens for _, tokens in times) / len(times),
        steps=len(times),
        peak=None if peak is None else peak - weight_bytes(state),  # without those of the copy
        micro_batches=micro_batches,
    )


def time_step(state: TrainState, batches: Batches, step: Sequence[PairNumbers]) -> tuple[float, int]:
    """The seconds and target tokens of a step."""
    examples = [batches.load(pairs, seed=PROBE_SEED) for pairs in step]
    _synchronise(state.device)
    began = time.perf_counter()
    result = train_step(state, examples)
    _synchronise(state.device)
    return time.perf_counter() - began, result.tokens


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def _preserved_generators(device: torch.device) -> Iterator[None]:
    """Restore the random generators when the block ends."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Reports


def print_plan(run: PlannedRun) -> None:
    """Print a table of what the run needs and what is available, and warnings where that is less."""
    state, batches = run.state, run.batches
    fixed, free, used = state_bytes(state), memory.free(state.device), memory.used(state.device) or 0
    with _preserved_generators(state.device):
        activations = activation_bytes(state, batches)
    expected = fixed + int(activations * TEMPORARY)
    fits = free is None or expected < free * SAFE_SHARE
    found = measure(state, batches, largest=True) if fits else None
    peak = found.peak if found and found.peak else used + expected
    how = "measured" if found and found.peak else "estimated"
    disk, free_disk = disk_bytes(run), free_disk_bytes(run.folder)
    rows = [
        ["parameters", f"{state.parameter_count:,}"],
        ["weights, gradients, optimiser", format_bytes(fixed)],
        ["activations of the largest batch", format_bytes(activations)],
        [f"peak memory, {how}", f"{format_bytes(peak)}{f' of {format_bytes(free)} free' if free else ''}"],
        ["steps per epoch", f"{run.steps_per_epoch:,}"],
        *_length_rows(run),
        *_time_rows(run, found),
        ["checkpoints on disk, at most", f"{format_bytes(disk)} of {format_bytes(free_disk)} free"],
        ["pairs", f"{len(batches.split):,}"],
        ["target tokens per epoch", f"{int((batches.target_lengths + 1).sum()):,}"],
        ["device and precision", f"{state.device} {state.precision}"],
    ]
    console.table(f"plan for {run.folder}", ["what", "how much"], rows, data=True)
    if found and found.micro_batches > 1:
        console.warn(
            f"the largest batch does not fit and is split into {found.micro_batches} micro-batches; {SMALLER}"
        )
    _warn_of_memory(fixed, peak - used, free)
    _warn_of_disk(disk, free_disk, run.folder)


def _length_rows(run: PlannedRun) -> list[list[str]]:
    most = "at most " if run.patience else ""
    rows = [["steps in total", f"{most}{run.last_step:,}" if run.last_step else "no limit"]]
    if run.patience:
        metric = LABELS[run.state.recipe.validation.metric]
        rows.append(["ends early after", f"{run.patience * run.every:,} steps without a better dev {metric}"])
    return rows


def _time_rows(run: PlannedRun, found: Measurement | None) -> list[list[str]]:
    if not found:
        return [["time per step", "not measured: it would not fit into memory"]]
    rows = [
        ["time per step", f"{found.seconds:.3g} s, mean of {found.steps} of typical size"],
        ["target tokens/s", f"{found.tokens / found.seconds:,.0f}"],
        ["time per epoch", console.duration(found.seconds * run.steps_per_epoch)],
    ]
    validation = None
    if run.validator:
        with _preserved_generators(run.state.device):
            validation = run.validator.estimate_seconds()
    if validation is not None:
        rows.append(["time per validation", f"{validation:.3g} s, estimated"])
    if run.last_step:
        validations = -(-run.last_step // run.every) if validation is not None else 0
        total = console.duration(found.seconds * run.last_step + (validation or 0) * validations)
        most = "at most " if run.patience else ""
        some = f"with {validations:,} validations" if validations else "without validation"
        rows.append(["time in total", f"{most}{total}, {some}"])
    return rows


SMALLER = "halve batches.tokens and double batches.accumulate to take the same steps in less memory"


def _warn_of_memory(fixed: int, needed: int, free: int | None) -> None:
    if free is None or needed < free:
        return
    if fixed > free * SAFE_SHARE:
        console.warn(
            f"the network and its optimiser alone take {format_bytes(fixed)} of memory and "
            f"{format_bytes(free)} are free; use a smaller network.d_model or fewer layers, or another "
            "training.device"
        )
    else:
        console.warn(
            f"training takes about {format_bytes(needed)} of memory and {format_bytes(free)} are free; "
            f"{SMALLER}"
        )


def _warn_of_disk(needed: int, free: int, folder: Path) -> None:
    if needed > free:
        console.warn(
            f"checkpoints take up to {format_bytes(needed)} and {format_bytes(free)} are free on the disk of "
            f"{folder}; lower training.keep_best or training.keep_last, or free some space"
        )


def print_requirements(run: PlannedRun) -> None:
    """Print in one line what is known without taking a step, and warnings where that is too much already."""
    fixed, free = state_bytes(run.state), memory.free(run.state.device)
    disk, free_disk = disk_bytes(run), free_disk_bytes(run.folder)
    console.say(
        f"needs {format_bytes(fixed)} of memory besides batches"
        f"{f' ({format_bytes(free)} free)' if free else ''}, "
        f"up to {format_bytes(disk)} of disk ({format_bytes(free_disk)} free)"
    )
    _warn_of_memory(fixed, fixed, free)
    _warn_of_disk(disk, free_disk, run.folder)


def describe_speed(run: PlannedRun, *, seconds: float) -> str:
    """One line on the time that epoch and run will take, and the memory so far; a step takes `seconds`."""
    peak = memory.peak(run.state.device)
    left = (run.last_step - run.state.progress.step) * seconds if run.last_step else None
    most = "at most " if run.patience else ""
    total = f", {most}{console.duration(left)} to step {run.last_step:,}" if left else ""
    used = f"; memory so far {format_bytes(peak)}" if peak else ""
    return f"{seconds:.2g} s a step: {console.duration(seconds * run.steps_per_epoch)} an epoch{total}{used}"


def format_bytes(count: int) -> str:
    """A number of bytes in MiB or GiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
