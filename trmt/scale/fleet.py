"""Workers that take the parts of a job one by one, until each part is done or has failed too often.

A job loads what it needs once in each worker. Parts know where their results go, so that a part may be done
twice without harm: by a worker that was taken for dead, or after a restart. Which machines the workers are on
is the business of a `Fleet`: here are processes of this machine, in ray_fleet.py those of a Ray cluster.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import trmt
from trmt import console
from trmt.errors import TrmtError
from trmt.scale.devices import keep_to
from trmt.sets.encoding import exit_with_parent

TRIES = 3  # of a part, and of a worker to begin
HOPELESS = 50  # parts that fail in a row: of a full disk, say, trying all the others makes no room


class Part(Protocol):
    """Something to do, small enough to be sent anywhere."""

    @property
    def name(self) -> str: ...


class Job(Protocol):
    """What a worker begins with; it can be pickled."""

    def begun(self) -> Callable[[Any], Any]:
        """What does one part after the other, and returns something small about each."""


@dataclass(frozen=True)
class Answer:
    """What a worker has to say.

    It is ready for a part; has done its part (and says something of it); has failed at it, or has died, and
    will be ready again; or is gone for good.
    """

    worker: int
    kind: Literal["ready", "done", "failed", "died", "gone"]
    said: Any = None


class Fleet(Protocol):
    """Several workers, by number."""

    size: int

    def send(self, worker: int, part: Part) -> None:
        """Give a part to a worker that is ready."""

    def answers(self) -> Sequence[Answer]:
        """What workers have to say by now; waits for one that has."""


Fleets = Callable[[Job], AbstractContextManager[Fleet]]


@dataclass
class Outcome:
    """What became of the parts."""

    done: list[tuple[Any, Any]] = field(default_factory=list)  # part, and what the worker said of it
    failed: dict[str, str] = field(default_factory=dict)  # name of a part -> why, the last time
    deaths: int = 0


def work_through(parts: Sequence[Any], fleet: Fleet, *, title: str, before: int = 0) -> Outcome:
    """Have all parts done; one that fails again and again is left, while the others go on.

    `before` is how many other parts were done at another time.
    """
    outcome = Outcome()
    todo, idle = deque(parts), list[int]()
    busy: dict[int, Any] = {}
    tries: Counter[str] = Counter()
    workers = fleet.size
    in_row: set[str] = set()  # parts that have failed since the last one was done
    with console.progress(title, before + len(parts), unit="parts", done=before) as bar:
        while todo or busy:
            while todo and idle:
                worker = idle.pop()
                busy[worker] = todo.popleft()
                fleet.send(worker, busy[worker])
            for answer in fleet.answers():
                part = busy.pop(answer.worker, None)
                if answer.kind in ("ready", "done", "failed"):
                    idle.append(answer.worker)
                if answer.kind == "done":
                    outcome.done.append((part, answer.said))
                    bar.advance()
                    in_row.clear()
                elif answer.kind == "gone":
                    workers -= 1
                    console.warn(f"a worker cannot begin: {answer.said}")
                    if not workers:
                        raise TrmtError(f"no worker is left; the last one said: {answer.said}")
                elif answer.kind in ("failed", "died") and part is not None:
                    outcome.deaths += answer.kind == "died"
                    _again(part, answer, tries=tries, todo=todo, failed=outcome.failed)
                    in_row.add(part.name)
                    if len(in_row) == HOPELESS:
                        raise TrmtError(
                            f"{HOPELESS} parts in a row could not be done, {part.name} because: {answer.said}"
                            "; mend that, and the same command goes on"
                        )
    return outcome


def _again(
    part: Any, answer: Answer, *, tries: Counter[str], todo: deque[Any], failed: dict[str, str]
) -> None:
    """Put a part back that a worker failed at, unless that has happened too often."""
    tries[part.name] += 1
    why = f"a worker died ({answer.said})" if answer.kind == "died" else str(answer.said)
    if tries[part.name] >= TRIES:
        failed[part.name] = why
        console.warn(f"{part.name} is given up after {TRIES} tries: {why}")
        return
    console.warn(f"{part.name} is done again: {why}")
    # What was begun first is asked for first; what fails lets the others go before.
    todo.appendleft(part) if answer.kind == "died" else todo.append(part)


def begun(job: Job, version: str) -> Callable[[Any], tuple[Literal["done", "failed"], Any]]:
    """What a worker does with a part: an error is told, and does not end the worker."""
    if version != trmt.__version__:
        raise TrmtError(
            f"{platform.node()} has trmt {trmt.__version__}, but not {version}; install the same everywhere"
        )
    console.set_quiet(True)
    work = job.begun()

    def attempt(part: Any) -> tuple[Literal["done", "failed"], Any]:
        try:
            return "done", work(part)
        except TrmtError as error:
            return "failed", str(error)
        except Exception:
            return "failed", f"a bug:\n{traceback.format_exc()}"

    return attempt


# Processes of this machine


@dataclass(eq=False)
class _Worker:
    process: Any
    pipe: Connection


class LocalFleet:
    """Processes of this machine, each with a core or a GPU; they end with the `with` block."""

    def __init__(self, job: Job, *, devices: Sequence[str]) -> None:
        self.size = len(devices)
        self._job, self._devices = job, devices
        self._context = multiprocessing.get_context("spawn")
        self._workers = {number: self._begun(number) for number in range(self.size)}
        self._stillborn: Counter[int] = Counter()  # deaths of a worker before it was ready
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

    def send(self, worker: int, part: Part) -> None:
        """Give a part to a worker that is ready."""
        with suppress(BrokenPipeError, ConnectionResetError):  # it is dead, which its answer will show
            self._workers[worker].pipe.send(part)

    def answers(self) -> list[Answer]:
        """What workers have to say by now; waits for one that has."""
        by_pipe: dict[Any, int] = {worker.pipe: number for number, worker in self._workers.items()}
        return [self._answer(by_pipe[pipe]) for pipe in wait(list(by_pipe))]

    def _answer(self, number: int) -> Answer:
        worker = self._workers[number]
        try:
            kind, said = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            return self._buried(number)
        if kind == "gone":
            del self._workers[number]
            worker.pipe.close()
            worker.process.join()
        self._loaded.add(number)
        return Answer(number, kind, said)

    def _buried(self, number: int) -> Answer:
        """Another in the place of a worker that has died, unless it never gets as far as being ready."""
        worker = self._workers.pop(number)
        worker.pipe.close()
        worker.process.join()
        code = worker.process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        if (device := self._devices[number]) != "cpu":
            how = f"{how} on {device}"
        self._stillborn[number] = 0 if number in self._loaded else self._stillborn[number] + 1
        if self._stillborn[number] >= TRIES:
            return Answer(number, "gone", f"its process died {TRIES} times ({how}); is memory short?")
        self._loaded.discard(number)
        self._workers[number] = self._begun(number)
        return Answer(number, "died", how)

    def _begun(self, number: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        given = theirs, self._job, self._devices[number]
        process = self._context.Process(target=_work, args=given, daemon=True)
        process.start()
        # The worker has the only other copy: its death is the end of the pipe.
        theirs.close()
        return _Worker(process, ours)


def _work(pipe: Connection, job: Job, device: str) -> None:
    """What a worker process does until nobody listens any more."""
    # As on Ray, a job for GPUs sees one, its own.
    keep_to(device)
    # Ctrl-C goes to every process of the terminal; the main process alone answers it, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)
    exit_with_parent()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            attempt = begun(job, trmt.__version__)
        except TrmtError as error:
            pipe.send(("gone", str(error)))
            return
        pipe.send(("ready", None))
        while True:
            pipe.send(attempt(pipe.recv()))
