"""The clock and the counters that run inside a toolkit's process.

A toolkit's adapter calls `batch` with the real lengths of every batch that the training program computes;
every step of any torch optimiser ends an update. When warm-up is over a window opens; when the window is
over the figures are written and the process ends, whatever the toolkit still wanted to do. What is counted is
therefore counted in the same way for everyone:

- a target token is what the loss is taken over: a piece or the end of a sentence, never padding;
- a source token is what the encoder reads, the end of the sentence included where the toolkit has one;
- a cell is a place that the network computes on, real or padding;
- seconds are those of the clock, CPU seconds those of the process, all threads, and its children.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers.job import Job

SUMS = (
    "sentences",
    "source_tokens",
    "target_tokens",
    "source_cells",
    "target_cells",
    "source_squares",
    "target_squares",
    "products",
)


def counts(source: Any, target: Any, source_cells: int, target_cells: int) -> dict[str, int]:
    """What a batch adds up to; `source` and `target` are tensors of lengths."""
    source, target = source.double(), target.double()
    return {
        "sentences": len(target),
        "source_tokens": int(source.sum()),
        "target_tokens": int(target.sum()),
        "source_cells": source_cells,
        "target_cells": target_cells,
        "source_squares": int((source * source).sum()),
        "target_squares": int((target * target).sum()),
        "products": int((source * target).sum()),
    }


class Probe:
    """Measures one training process; `configuration` is what the report says the toolkit was told."""

    def __init__(self, job: Job, configuration: Any) -> None:
        self.job, self.configuration = job, configuration
        self.born = time.perf_counter()
        self.pending: list[tuple[Any, Any, int, int]] = []  # the batches of the update under way
        self.updates = self.parameters = 0
        self.opened: float | None = None
        self.first = self.startup = self.cpu_before = 0.0
        self.marks: list[float] = []  # when each update of the window ended, since it opened
        self.batches: list[tuple[int, tuple[Any, Any, int, int]]] = []  # of the window: (update, batch)
        self.extra: dict[str, Callable[[], Any]] = {}  # what else to report, called when the window closes
        self.on_open: Callable[[], None] = lambda: None
        self.finished = False

    def install(self, *, optimiser_steps: bool = True) -> Probe:
        """Begin to listen; without `optimiser_steps` the adapter calls `update` itself."""
        if optimiser_steps:
            from torch.optim.optimizer import register_optimizer_step_post_hook

            register_optimizer_step_post_hook(lambda optimiser, *_: self._stepped(optimiser))
        atexit.register(self._unfinished)
        return self

    def batch(self, source: Any, target: Any, source_cells: int, target_cells: int) -> None:
        """A batch whose loss is computed: tensors of lengths, and places; counted with its update."""
        self.pending.append((source, target, source_cells, target_cells))

    def _stepped(self, optimiser: Any) -> None:
        if not self.updates:
            weights = [weight for group in optimiser.param_groups for weight in group["params"]]
            self.parameters = sum(weight.numel() for weight in weights if weight.requires_grad)
        self.update()

    def update(self) -> None:
        """The optimiser has taken a step."""
        self.updates += 1
        now = time.perf_counter()
        if self.updates == 1:
            self.first = now - self.born
        if self.opened is not None:
            # Counted when the window closes: on a GPU, to look at a length is to wait for it.
            self.batches += [(len(self.marks), batch) for batch in self.pending]
            self.marks.append(now - self.opened)
            if now - self.opened >= self.job.seconds and len(self.marks) >= self.job.updates:
                self._close()
        elif self.updates >= self.job.warmup_updates and now - self.born >= self.job.warmup_seconds:
            self._open()
        self.pending.clear()

    def _open(self) -> None:
        self.startup = time.perf_counter() - self.born
        self._synchronise()
        self.on_open()
        self.cpu_before = cpu_seconds()
        self.opened = time.perf_counter()

    def _close(self) -> None:
        self._synchronise()
        assert self.opened is not None
        seconds, busy = time.perf_counter() - self.opened, cpu_seconds() - self.cpu_before
        import torch

        window, tokens = dict.fromkeys(SUMS, 0), [0] * len(self.marks)
        for update, batch in self.batches:
            found = counts(*batch)
            tokens[update] += found["target_tokens"]
            window = {name: window[name] + found[name] for name in SUMS}
        report = {
            "updates": len(self.marks),
            "seconds": seconds,
            "cpu_seconds": busy,
            **window,
            "parameters": self.parameters,  # that are learned
            "warmup_updates": self.updates - len(self.marks),
            "warmup_seconds": self.startup,
            "first_update_seconds": self.first,
            "peak_mib": peak_mib(),
            "own_mib": own_mib(),
            "peak_device_mib": torch.cuda.max_memory_allocated() / 2**20 if self.job.cuda else None,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "configuration": self.configuration,
            "marks": [[round(at, 4), count] for at, count in zip(self.marks, tokens, strict=True)],
            **{name: make() for name, make in self.extra.items()},
        }
        partial = Path(self.job.report + ".partial")
        partial.write_text(json.dumps(report, indent=1), encoding="utf-8")
        partial.replace(self.job.report)
        self.finished = True
        self._leave()

    def _leave(self) -> None:
        """End at once: the toolkit's own farewell (checkpoints, averages) is not what is measured."""
        import multiprocessing

        for child in multiprocessing.active_children():
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def _synchronise(self) -> None:
        if self.job.cuda:
            import torch

            torch.cuda.synchronize()

    def _unfinished(self) -> None:
        print(f"training ended after {self.updates} updates, before the window closed", file=sys.stderr)


def cpu_seconds() -> float:
    """Processor time of this process, all its threads, and its children, dead or alive."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage) + sum(_living(_cpu_of))


def peak_mib() -> float:
    """The largest resident set of this process, and of its living children, each at its own peak."""
    unit = 1 if sys.platform == "darwin" else 1024
    # What getrusage tells on Linux includes the parent's size from before this program was loaded.
    own = _peak_of(os.getpid()) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return (own + sum(_living(_peak_of))) / 2**20


def own_mib() -> float:
    """Resident memory now that is nobody else's: not the pages of mapped files. Where /proc tells of it."""
    return _status_of(os.getpid(), "RssAnon:") / 2**20


def _living(measure: Callable[[int], float]) -> list[float]:
    """A measure of each living descendant, where /proc tells of them."""
    found, parents = [], [os.getpid()]
    while parents:
        for children in Path(f"/proc/{parents.pop()}/task").glob("*/children"):
            try:
                born = [int(word) for word in children.read_text().split()]
            except OSError:
                continue
            parents += born
            found += born
    return [measure(process) for process in found]


def _cpu_of(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _peak_of(process: int) -> float:
    return _status_of(process, "VmHWM:")


def _status_of(process: int, field: str) -> float:
    """A size in bytes from a process's status; 0 where there is none."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0.0)


def padded_lengths(ids: Any, padding: int) -> Any:
    """The lengths of the rows of a padded [S, T] tensor."""
    return (ids != padding).sum(1)


def main(adapter: Any) -> None:
    """What `python -m peers.NAME prepare|train JOB` does."""
    stage, path = sys.argv[1:]
    job = Job.read(path)
    Path(job.work).mkdir(parents=True, exist_ok=True)
    if stage == "prepare":
        adapter.prepare(job)
    else:
        adapter.train(job)
