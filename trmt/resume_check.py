"""Proof that resuming continues the very same run: a copy is trained on twice, once with a kill in between.

    one    copy -> K steps ---------------------------------> saved
    two    copy -> K/2 steps -> saved, killed -> K/2 steps --> saved

Each part is a process of its own. Afterwards weights, optimiser, everything else that is saved, the pairs
that each step saw and the log must be the same to the last byte.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor

from trmt import console
from trmt.bundles import bundles, checkpoints
from trmt.bundles.checkpoints import CONFIG, STATE, TENSORS, TRAINING, Checkpoint, Damaged
from trmt.errors import BundleError, ConfigError, TrmtError
from trmt.sets.batches import RaggedBatch
from trmt.sets.record import RECORD
from trmt.storage.locks import exclusive
from trmt.training.history import LOG
from trmt.training.planning import ORIGIN, TrainOptions
from trmt.training.run import Run
from trmt.training.spikes import ROLLBACKS, whole_points
from trmt.training.stopping import Interrupted
from trmt.validating import validate

ORDER = "order.jsonl"  # in a copy: what each step saw
# What the log says of the machine and not of the run.
CLOCKS = ("time", "seconds", "elapsed", "tokens_per_second", "waited", "memory")
PARTS = ("begin", "resume", "interrupted", "end")  # events that are about parts of a run
# What saved tensors are called before the colon, in a person's words.
KINDS = {
    "live": "weights",
    "buffer": "buffers",
    "step": "optimiser",
    "exp_avg": "optimiser",
    "exp_avg_sq": "optimiser",
    "mean": "running mean",
    "guard": "guard",
}


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What `trmt check-resume` takes."""

    run: Path
    steps: int = 20
    data: Path | None = None
    settings: tuple[str, ...] = ()
    threads: int = 0
    trust_code: bool = False

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ConfigError("--steps is at least 2: one before the kill and one after it")


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one process is to do."""

    run: str
    data: str | None
    settings: list[str]
    threads: int
    trust_code: bool
    end: int  # of the last part
    until: int  # this part's
    killed: bool  # by force, where this part ends


def check_resume(options: CheckOptions) -> list[str]:
    """What is not the same after a kill and a resume, in sentences; the run itself is not touched."""
    point = _newest(options.run)
    middle, end = point.step + options.steps // 2, point.step + options.steps
    console.say(f"{options.run}: from step {point.step:,} to {end:,}, and again with a kill after {middle:,}")
    with tempfile.TemporaryDirectory(prefix="trmt-check-") as folder:
        one, two = (_copied(options.run, point, Path(folder) / name / options.run.name) for name in "ab")
        _spawn(one, options, end=end, until=end)
        _spawn(two, options, end=end, until=middle, killed=True)
        _spawn(two, options, end=end, until=end)
        return list(differences(one, two, step=end))


def _newest(run: Path) -> Checkpoint:
    for point in reversed(whole_points(run)):
        try:
            point.state()
        except Damaged as error:
            console.warn(f"{error}; checking from the one before")
            continue
        return point
    raise BundleError(f"there is no checkpoint in {run} that can be gone on from; train first")


def _copied(run: Path, point: Checkpoint, copy: Path) -> Path:
    """A run folder that has only this checkpoint, and no log yet."""
    copy.mkdir(parents=True)
    shutil.copytree(point.folder, copy / point.folder.name)
    for name in (CONFIG, ORIGIN, RECORD, ROLLBACKS):
        if (run / name).is_file():
            shutil.copy2(run / name, copy / name)
    return copy


# The processes


def _spawn(run: Path, options: CheckOptions, *, end: int, until: int, killed: bool = False) -> None:
    part = _Part(
        run=str(run),
        data=str(options.data) if options.data else None,
        settings=list(options.settings),
        threads=options.threads,
        trust_code=options.trust_code,
        end=end,
        until=until,
        killed=killed,
    )
    command = [sys.executable, "-m", "trmt.resume_check", json.dumps(asdict(part))]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    expected = -signal.SIGKILL if killed and hasattr(signal, "SIGKILL") else 0
    if done.returncode != expected:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise TrmtError(f"the copy of {options.run} could not be trained on: {last.removeprefix('error: ')}")


class _Watched(Run):
    """A run that ends by itself after a step, and writes down what each step sees."""

    until = 0
    killed = False

    def _learn(self, examples: list[RaggedBatch]) -> None:
        super()._learn(examples)
        with (self.folder / ORDER).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([self.progress.step, _digest(examples)]) + "\n")
        if self.progress.step >= self.until:
            self.signals.number = signal.SIGTERM

    def _stop(self, number: int) -> NoReturn:
        if self.killed and hasattr(signal, "SIGKILL"):
            os.kill(os.getpid(), signal.SIGKILL)
        super()._stop(number)


def _digest(examples: Sequence[RaggedBatch]) -> str:
    digest = hashlib.sha256()
    for batch in examples:
        for name, column in sorted(batch.columns.items()):
            digest.update(name.encode())
            digest.update(column.values.tobytes())
            digest.update(column.lengths.tobytes())
    return digest.hexdigest()


def _work(part: _Part) -> None:
    """What the processes do."""
    if part.threads:
        torch.set_num_threads(part.threads)
    options = TrainOptions(
        run=Path(part.run),
        data=Path(part.data) if part.data else None,
        settings=[*part.settings, "training.log_every=1"],
        trust_code=part.trust_code,
    )
    run = _Watched.planned(options, validate)
    longer = _going_on(run, part.end)
    if longer:
        run = _Watched.planned(replace(options, settings=[*options.settings, *longer]), validate)
    run.until, run.killed = part.until, part.killed
    with exclusive(run.folder):
        run.begin()
        run.loop()


def _going_on(run: Run, end: int) -> list[str]:
    """The settings with which a run that would end before `end` does not."""
    settings = []
    if run.last_step is not None and run.last_step < end:
        settings += [f"training.steps={end}", "training.epochs=0"]
    if run.recipe.training.patience:
        settings.append("training.patience=1000000")
    return settings


def differences(one: Path, two: Path, *, step: int) -> Iterator[str]:
    """In what two copies of a run differ after `step`."""
    places = [checkpoints.step_folder(run, step) for run in (one, two)]
    yield from _order(*(_lines(run / ORDER) for run in (one, two)))
    states = [load_file(place / TRAINING / TENSORS) for place in places]
    yield from _tensors(*states, kinds=KINDS)
    kept = [load_file(place / bundles.WEIGHTS) for place in places]
    yield from _tensors(*kept, kinds={}, usual="weights that are kept")
    plain = [json.loads((place / TRAINING / STATE).read_bytes()) for place in places]
    for state in plain:
        state["progress"].pop("seconds")
        state.pop("sha256")  # of the tensors, which have been compared
    keys = sorted(plain[0].keys() | plain[1].keys())
    yield from (f"the saved {key} differs" for key in keys if _unlike(plain[0], plain[1], key))
    yield from _log(*(_events(run / LOG) for run in (one, two)))


def _unlike(one: Mapping[str, Any], two: Mapping[str, Any], key: str) -> bool:
    return key not in one or key not in two or one[key] != two[key]


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _order(one: list[Any], two: list[Any]) -> Iterator[str]:
    for first, second in zip(one, two, strict=False):
        if first != second:
            yield f"the data differs from step {first[0]:,} on"
            return
    if len(one) != len(two):
        yield f"{len(one)} steps were taken without the kill and {len(two)} with it"


def _tensors(
    one: Mapping[str, Tensor], two: Mapping[str, Tensor], *, kinds: Mapping[str, str], usual: str = "tensors"
) -> Iterator[str]:
    """One sentence for each kind of tensors that differ."""
    groups: dict[str, list[str]] = {}
    for name in sorted({*one, *two}):
        groups.setdefault(kinds.get(name.partition(":")[0], usual), []).append(name)
    for kind, names in groups.items():
        unlike = [name for name in names if _unlike_bytes(one.get(name), two.get(name))]
        if unlike:
            name = unlike[0]
            far = f" by up to {_distance(one[name], two[name]):.3g}" if name in one and name in two else ""
            yield f"{kind}: {len(unlike)} of {len(names)} tensors differ, {name}{far}"


def _unlike_bytes(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None or one.shape != two.shape or one.dtype != two.dtype:
        return True
    return not torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, two)))


def _distance(one: Tensor, two: Tensor) -> float:
    return float((one.double() - two.double()).abs().max()) if one.shape == two.shape else float("inf")


def _events(path: Path) -> list[str]:
    """The lines of a log that are about the run and not about its parts, without what clocks said."""
    entries = [entry for entry in _lines(path) if entry["event"] not in PARTS]
    return [json.dumps({key: entry[key] for key in entry if key not in CLOCKS}) for entry in entries]


def _log(one: list[str], two: list[str]) -> Iterator[str]:
    for first, second in zip(one, two, strict=False):
        if first != second:
            yield f"the log differs: {first} without the kill, {second} with it"
            return
    if len(one) != len(two):
        yield f"the log has {len(one)} entries without the kill and {len(two)} with it"


if __name__ == "__main__":
    try:
        _work(_Part(**json.loads(sys.argv[1])))
    except Interrupted:
        sys.exit(0)
    except TrmtError as error:
        console.fail(str(error))
        sys.exit(error.exit_code)
