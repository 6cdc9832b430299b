"""Pools of workers, each of which loads a job once and then processes one item after the other.

`ProcessPool` starts worker processes on this machine, `RayPool` (ray_pool.py) actors on a Ray cluster. Both
replace workers that die. Whether the item of a dead worker is processed again is up to the caller of the
pool.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import trmt
from trmt import console
from trmt.errors import TrmtError
from trmt.scale.devices import hide_other_gpus
from trmt.sets.encoding import exit_with_parent

MAX_STARTS = 3  # deaths of a worker before it was ready, after which it is given up


class WorkerJob(Protocol):
    """What the workers of a pool do; it is pickled and sent to each of them."""

    def load(self) -> Callable[[Any], Any]:
        """Load what is needed, in the worker, and return the function that processes an item."""


@dataclass(frozen=True)
class WorkerReply:
    """What has happened to a worker.

    ready: it has loaded the job. done: it has processed an item, `value` is the result. failed: an item
    raised an error, `value` is its text. died: it died as `value` says, and a new worker of the same number
    is being started, which will report that it is ready. lost: it cannot be started because of `value`, an
    error or a text.
    """

    worker: int
    status: Literal["ready", "done", "failed", "died", "lost"]
    value: Any = None


class WorkerPool(Protocol):
    """Workers, numbered from 0 to `size` - 1."""

    size: int

    def send(self, worker: int, item: Any) -> None:
        """Send an item to a worker."""

    def replies(self) -> Sequence[WorkerReply]:
        """The replies that have arrived; waits for at least one."""


PoolFactory = Callable[[WorkerJob], AbstractContextManager[WorkerPool]]


def start_job(job: WorkerJob, version: str) -> Callable[[Any], tuple[Literal["done", "failed"], Any]]:
    """Load a job in a worker; returns a function that processes an item and turns errors into replies."""
    if version != trmt.__version__:
        raise TrmtError(
            f"{platform.node()} has trmt {trmt.__version__}, but not {version}; "
            "install the same version on all machines"
        )
    console.set_quiet(True)
    process = job.load()

    def attempt(item: Any) -> tuple[Literal["done", "failed"], Any]:
        try:
            return "done", process(item)
        except TrmtError as error:
            return "failed", str(error)
        except Exception:
            return "failed", f"a bug:\n{traceback.format_exc()}"

    return attempt


@dataclass(eq=False)
class _Process:
    process: Any
    pipe: Connection


class ProcessPool:
    """Worker processes of this machine, one on each device; they end with the `with` block.

    A worker receives items while it processes another, so several can be sent ahead; it processes them in
    order.
    """

    def __init__(self, job: WorkerJob, *, devices: Sequence[str]) -> None:
        self.size = len(devices)
        self._job, self._devices = job, devices
        self._context = multiprocessing.get_context("spawn")
        self._workers = {number: self._start(number) for number in range(self.size)}
        self._failed_starts: Counter[int] = Counter()
        self._loaded: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers.values():
            worker.pipe.close()
            worker.process.kill()
        for worker in self._workers.values():
            worker.process.join()

    def send(self, worker: int, item: Any) -> None:
        """Send an item to a worker."""
        with suppress(BrokenPipeError, ConnectionResetError):  # it has died, which `replies` will report
            self._workers[worker].pipe.send(item)

    def replies(self) -> list[WorkerReply]:
        """The replies that have arrived; waits for at least one."""
        by_pipe: dict[Any, int] = {worker.pipe: number for number, worker in self._workers.items()}
        return [self._receive(by_pipe[pipe]) for pipe in wait(list(by_pipe))]

    def _receive(self, number: int) -> WorkerReply:
        worker = self._workers[number]
        try:
            status, value = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            return self._replace(number)
        if status == "lost":
            self._close(number)
        self._loaded.add(number)
        return WorkerReply(number, status, value)

    def _replace(self, number: int) -> WorkerReply:
        """Start a new process for a worker that has died, unless it keeps dying before it is ready."""
        code = self._close(number)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        if (device := self._devices[number]) != "cpu":
            how = f"{how} on {device}"
        self._failed_starts[number] = 0 if number in self._loaded else self._failed_starts[number] + 1
        if self._failed_starts[number] >= MAX_STARTS:
            return WorkerReply(
                number, "lost", f"its process died {MAX_STARTS} times ({how}); is memory short?"
            )
        self._loaded.discard(number)
        self._workers[number] = self._start(number)
        return WorkerReply(number, "died", how)

    def _close(self, number: int) -> int:
        """Forget a process that has ended; returns its exit code."""
        worker = self._workers.pop(number)
        worker.pipe.close()
        worker.process.join()
        return int(worker.process.exitcode)

    def _start(self, number: int) -> _Process:
        ours, theirs = self._context.Pipe()
        arguments = theirs, self._job, self._devices[number]
        process = self._context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        # Only the worker keeps this end open, so its death closes the pipe.
        theirs.close()
        return _Process(process, ours)


def _work(pipe: Connection, job: WorkerJob, device: str) -> None:
    """The main function of a worker process: load the job, then process items until the pipe is closed."""
    hide_other_gpus(device)
    # Ctrl-C reaches every process of the terminal; only the main process handles it, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # standard output belongs to the main process
    exit_with_parent()
    items = SimpleQueue[Any]()
    threading.Thread(target=_receive_items, args=(pipe, items), name="trmt-items", daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            attempt = start_job(job, trmt.__version__)
        except TrmtError as error:
            pipe.send(("lost", error))
            return
        pipe.send(("ready", None))
        while (item := items.get()) is not None:
            pipe.send(attempt(item))


def _receive_items(pipe: Connection, items: SimpleQueue[Any]) -> None:
    """Put items into a queue as they arrive, so that sending never waits for the worker; None ends it."""
    try:
        with suppress(EOFError, OSError):
            while True:
                items.put(pipe.recv())
    finally:
        items.put(None)
