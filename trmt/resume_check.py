"""Checking that a resumed run is the same run: copies are trained with and without a kill in between.

    uninterrupted    copy -> K steps --------------------------------> saved
    interrupted      copy -> K/2 steps -> saved, killed -> K/2 steps -> saved

Each arrow is a process of its own. Afterwards weights, optimiser, everything else that is saved, the batches
of each step and the log must be the same to the last byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor

from trmt import console
from trmt.bundles import bundles, checkpoints
from trmt.bundles.checkpoints import CONFIG, STATE, TENSORS, TRAINING, Checkpoint, DamagedState
from trmt.config import Options
from trmt.errors import BundleError, ConfigError, TrmtError
from trmt.sets.batches import RaggedBatch
from trmt.sets.record import RECORD
from trmt.storage.locks import exclusive
from trmt.training.history import LOG
from trmt.training.planning import ORIGIN, TrainOptions
from trmt.training.run import TrainingRun
from trmt.training.spikes import ROLLBACKS
from trmt.training.stopping import Interrupted
from trmt.trees import CHECKSUM
from trmt.validating import validate

ORDER = "order.jsonl"  # in a copy: a hash of the batches of each step
# Values in the log that depend on the machine's speed.
TIMINGS = ("time", "seconds", "elapsed", "tokens_per_second", "waited", "memory", "crc")
PROCESS_EVENTS = (
    "begin",
    "resume",
    "interrupted",
    "end",
)  # in the log, about processes and not about the run
# Names for the prefixes of saved tensors.
GROUPS = {
    "weights": "weights",
    "buffer": "buffers",
    "step": "optimiser",
    "exp_avg": "optimiser",
    "exp_avg_sq": "optimiser",
    "ema": "moving average",
    "guard": "gradient guard",
}


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Options):
    """What `trmt check-resume` takes."""

    run: Path  # the run folder
    steps: int = 20  # to train for, with a kill in the middle
    data: Path | None = None  # the prepared set; None: that of the run
    settings: tuple[str, ...] = ()  # changes of the recipe as key=value
    threads: int = 0  # CPU threads; 0 uses all
    trust_code: bool = False  # allow the run folder to name code outside trmt

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2:
            raise ConfigError("--steps must be at least 2: one before the kill and one after it")


@dataclass(frozen=True, kw_only=True)
class _TrainJob:
    """What one process has to do."""

    run: str
    data: str | None
    settings: list[str]
    threads: int
    trust_code: bool
    last_step: int  # of the run
    stop_after: int  # the step after which this process stops
    kill: bool  # whether it then kills itself


def check_resume(options: CheckOptions) -> list[str]:
    """The differences after a kill and a resume, one sentence each; the run itself is not changed."""
    options = replace(options, run=checkpoints.find_folder(options.run))
    start = _newest_checkpoint(options.run)
    middle, end = start.step + options.steps // 2, start.step + options.steps
    console.say(f"{options.run}: from step {start.step:,} to {end:,}, and again with a kill after {middle:,}")
    with tempfile.TemporaryDirectory(prefix="trmt-check-") as folder:
        one, two = (_copy_run(options.run, start, Path(folder) / name / options.run.name) for name in "ab")
        _train_copy(one, options, last_step=end, stop_after=end)
        _train_copy(two, options, last_step=end, stop_after=middle, kill=True)
        _train_copy(two, options, last_step=end, stop_after=end)
        return list(differences(one, two, step=end))


def _newest_checkpoint(run: Path) -> Checkpoint:
    for checkpoint in reversed(checkpoints.resumable_checkpoints(run)):
        try:
            checkpoint.load_state()
        except DamagedState as error:
            console.warn(f"{error}; checking from the checkpoint before it")
            continue
        return checkpoint
    raise BundleError(f"there is no checkpoint in {run} from which training can resume; train first")


def _copy_run(run: Path, checkpoint: Checkpoint, copy: Path) -> Path:
    """A copy of a run folder with this checkpoint only, and without a log."""
    copy.mkdir(parents=True)
    shutil.copytree(checkpoint.folder, copy / checkpoint.folder.name)
    for name in (CONFIG, ORIGIN, RECORD, ROLLBACKS):
        if (run / name).is_file():
            shutil.copy2(run / name, copy / name)
    return copy


# The processes


def _train_copy(
    run: Path, options: CheckOptions, *, last_step: int, stop_after: int, kill: bool = False
) -> None:
    job = _TrainJob(
        run=str(run),
        data=str(options.data) if options.data else None,
        settings=list(options.settings),
        threads=options.threads,
        trust_code=options.trust_code,
        last_step=last_step,
        stop_after=stop_after,
        kill=kill,
    )
    command = [sys.executable, "-m", "trmt.resume_check", json.dumps(asdict(job))]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    expected = -signal.SIGKILL if kill and hasattr(signal, "SIGKILL") else 0
    if done.returncode != expected:
        last_line = (done.stderr.strip().splitlines() or ["there was no error message"])[-1]
        raise TrmtError(f"training the copy of {options.run} has failed: {last_line.removeprefix('error: ')}")


class _RecordedRun(TrainingRun):
    """A run that stops after a given step, and records a hash of the batches of each step."""

    stop_after = 0
    kill = False

    def step(self, batches: list[RaggedBatch]) -> None:
        super().step(batches)
        step = self.state.progress.step
        with (self.folder / ORDER).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([step, _digest(batches)]) + "\n")
        if step >= self.stop_after:
            self.signals.number = signal.SIGTERM

    def _stop(self, number: int) -> NoReturn:
        if self.kill and hasattr(signal, "SIGKILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        super()._stop(number)


def _digest(batches: Iterable[RaggedBatch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, column in sorted(batch.columns.items()):
            digest.update(name.encode())
            digest.update(column.values.tobytes())
            digest.update(column.lengths.tobytes())
    return digest.hexdigest()


def _run_job(job: _TrainJob) -> None:
    """Train a copy as the job says."""
    if job.threads:
        torch.set_num_threads(job.threads)
    options = TrainOptions(
        run=Path(job.run),
        data=Path(job.data) if job.data else None,
        settings=[*job.settings, "training.log_every=1"],
        trust_code=job.trust_code,
    )
    run = _RecordedRun.from_options(options, validate)
    if longer := _settings_to_reach(job.last_step, run):
        run = _RecordedRun.from_options(replace(options, settings=[*options.settings, *longer]), validate)
    run.stop_after, run.kill = job.stop_after, job.kill
    with exclusive(run.folder):
        run.restore()
        run.train()


def _settings_to_reach(step: int, run: TrainingRun) -> list[str]:
    """The settings with which a run does not end before `step`."""
    settings = []
    if run.last_step is not None and run.last_step < step:
        settings += [f"training.steps={step}", "training.epochs=0"]
    if run.recipe.training.patience:
        settings.append("training.patience=1000000")
    return settings


# The comparison


def differences(one: Path, two: Path, *, step: int) -> Iterator[str]:
    """The differences of two copies of a run after `step`."""
    yield from _batch_differences(*(_json_lines(run / ORDER) for run in (one, two)))
    folders = [checkpoints.step_folder(run, step) for run in (one, two)]
    states = [load_file(folder / TRAINING / TENSORS) for folder in folders]
    yield from _tensor_differences(*states, groups=GROUPS)
    weights = [load_file(folder / bundles.WEIGHTS) for folder in folders]
    yield from _tensor_differences(*weights, groups={}, default="weights of the bundle")
    values = [json.loads((folder / TRAINING / STATE).read_bytes()) for folder in folders]
    for each in values:
        each["progress"].pop("seconds")
        each.pop("sha256")  # of the tensors, which have been compared
        each.pop(CHECKSUM)
    keys = sorted(values[0].keys() | values[1].keys())
    missing = object()
    yield from (
        f"the saved {key} differs"
        for key in keys
        if values[0].get(key, missing) != values[1].get(key, missing)
    )
    yield from _log_differences(*(_comparable_events(run / LOG) for run in (one, two)))


def _json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _batch_differences(one: list[Any], two: list[Any]) -> Iterator[str]:
    for first, second in zip(one, two, strict=False):
        if first != second:
            yield f"the data differs from step {first[0]:,} on"
            return
    if len(one) != len(two):
        yield f"{len(one)} steps were taken without the kill and {len(two)} with it"


def _tensor_differences(
    one: Mapping[str, Tensor],
    two: Mapping[str, Tensor],
    *,
    groups: Mapping[str, str],
    default: str = "tensors",
) -> Iterator[str]:
    """One sentence for each group of tensors with differences."""
    grouped: dict[str, list[str]] = {}
    for name in sorted({*one, *two}):
        grouped.setdefault(groups.get(name.partition(":")[0], default), []).append(name)
    for group, names in grouped.items():
        different = [name for name in names if not _same_bytes(one.get(name), two.get(name))]
        if different:
            name = different[0]
            distance = (
                f" by up to {_distance(one[name], two[name]):.3g}" if name in one and name in two else ""
            )
            yield f"{group}: {len(different)} of {len(names)} tensors differ, {name}{distance}"


def _same_bytes(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None or one.shape != two.shape or one.dtype != two.dtype:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two)))


def _distance(one: Tensor, two: Tensor) -> float:
    return float((one.double() - two.double()).abs().max()) if one.shape == two.shape else float("inf")


def _comparable_events(path: Path) -> list[str]:
    """The entries of a log about the run, without the values that depend on the machine's speed."""
    entries = [entry for entry in _json_lines(path) if entry["event"] not in PROCESS_EVENTS]
    return [json.dumps({key: entry[key] for key in entry if key not in TIMINGS}) for entry in entries]


def _log_differences(one: list[str], two: list[str]) -> Iterator[str]:
    for first, second in zip(one, two, strict=False):
        if first != second:
            yield f"the log differs: {first} without the kill, {second} with it"
            return
    if len(one) != len(two):
        yield f"the log has {len(one)} entries without the kill and {len(two)} with it"


if __name__ == "__main__":
    try:
        _run_job(_TrainJob(**json.loads(sys.argv[1])))
    except Interrupted:
        sys.exit(0)
    except TrmtError as error:
        console.fail(str(error))
        sys.exit(error.exit_code)
