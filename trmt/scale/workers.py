"""Translation by several processes, each with a core or a GPU of its own.

That is the fastest way to use many cores, and the only one to use several GPUs. The processes map the same
files, so the weights are in the machine's memory once. Lines are handed out in runs, larger ones first, so
that all are busy to the end; since a translation does not depend on its neighbours, the text is that of one
process. The lines of a worker that dies are done again by another.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from trmt import console
from trmt.errors import TrmtError
from trmt.scale.devices import keep_to, lines_for, window_for
from trmt.translating import TranslateOptions, Translation, Translator

AHEAD = 2  # runs that a worker has: while one is on its way back, it has another to do
DEATHS = 3  # of workers over the same lines, after which it is the lines


@dataclass
class _Run:
    """Lines that one worker translates together."""

    begin: int  # number of the first, counted from 0
    end: int
    deaths: int = 0


@dataclass(eq=False)
class _Worker:
    """A process, and what it is to do."""

    device: str
    process: Any
    pipe: Connection
    runs: deque[_Run] = field(default_factory=deque)  # at the first of them it is
    loaded: bool = False


class Workers:
    """What translates like a `Translator`, by a process on each device; they end with the `with` block."""

    def __init__(
        self,
        place: Path,
        *,
        devices: Sequence[str],
        options: TranslateOptions = TranslateOptions(),
        trust_code: bool = False,
    ) -> None:
        self.window = window_for(devices, options.batch)
        self._sizes = lines_for(devices[0], options.batch)
        self._loading = place, options, trust_code
        self._context = multiprocessing.get_context("spawn")
        self._workers = [self._begun(device) for device in devices]

    def __enter__(self) -> Self:
        # One of them says whether the bundle is good, before anything is read.
        while not any(worker.loaded for worker in self._workers):
            for worker in self._answering(self._workers):
                if self._received(worker) is None:
                    self.__exit__(None, None, None)
                    raise TrmtError(
                        f"a worker process died while it loaded the network ({_ending(worker)}); "
                        "try again with fewer --workers if memory is short"
                    )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.pipe.close()
            # What it has in hand is nobody's any more.
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()

    def ready(
        self, texts: Sequence[str], *, prefixes: Sequence[str] | None = None, first_key: int = 0
    ) -> Iterator[tuple[int, Translation]]:
        """(number of the line, its translation) as they become ready."""
        prefixes = prefixes or [""] * len(texts)
        todo = deque(_runs(len(texts), len(self._workers), *self._sizes))
        missing = len(texts)
        while missing:
            for worker in self._wanting(len(todo)):
                run = todo.popleft()
                worker.runs.append(run)
                lines = slice(run.begin, run.end)
                self._send(worker, (texts[lines], prefixes[lines], first_key + run.begin))
            for worker in self._answering([worker for worker in self._workers if worker.runs]):
                found = self._received(worker)
                if found is None:
                    worker.runs[0].deaths += 1
                    self._mourn(worker, first_key)
                    todo.extendleft(reversed(worker.runs))
                elif found:
                    run = worker.runs.popleft()
                    missing -= len(found)
                    yield from ((run.begin + number, translation) for number, translation in found)

    def _wanting(self, count: int) -> list[_Worker]:
        """Who gets the next so many runs: first all who have none, then those who have one only."""
        places = ((len(worker.runs) + more, worker) for worker in self._workers for more in range(AHEAD))
        free = sorted((place for place in places if place[0] < AHEAD), key=lambda place: place[0])
        return [worker for _, worker in free[:count]]

    def _begun(self, device: str) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, device, *self._loading), daemon=True)
        process.start()
        # The worker has the only other copy: its death is the end of the pipe.
        theirs.close()
        return _Worker(device, process, ours)

    @staticmethod
    def _send(worker: _Worker, work: Any) -> None:
        try:
            worker.pipe.send(work)
        except (BrokenPipeError, ConnectionResetError):
            return  # it is dead, which shows when its answer is waited for

    @staticmethod
    def _answering(some: Sequence[_Worker]) -> list[_Worker]:
        """Those that have something to say, or have died; waits for one."""
        by_pipe: dict[Any, _Worker] = {worker.pipe: worker for worker in some}
        return [by_pipe[pipe] for pipe in wait(list(by_pipe))]

    @staticmethod
    def _received(worker: _Worker) -> list[tuple[int, Translation]] | None:
        """What it has translated, nothing if it has only loaded; None if it has died. Its error is raised."""
        try:
            found = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            return None
        if isinstance(found, BaseException):
            raise found
        worker.loaded = True
        lines: list[tuple[int, Translation]] = found
        return lines

    def _mourn(self, worker: _Worker, first_key: int) -> None:
        """Put another in the place of a worker that has died, unless that has happened too often."""
        worker.pipe.close()
        run = worker.runs[0]
        lines = f"lines {first_key + run.begin + 1:,} to {first_key + run.end:,}"
        how = _ending(worker)
        if run.deaths >= DEATHS:
            raise TrmtError(
                f"{run.deaths} worker processes died over {lines}, the last one {how}; "
                "try again with fewer --workers if memory is short"
            )
        console.warn(f"a worker process died ({how}); {lines} are translated again")
        self._workers[self._workers.index(worker)] = self._begun(worker.device)


def _runs(count: int, workers: int, least: int, most: int) -> Iterator[_Run]:
    """Lines in runs that become smaller, so that nobody is left with a long one at the end."""
    begin = 0
    while begin < count:
        size = min(max((count - begin) // (2 * workers), least), most, count - begin)
        yield _Run(begin, begin + size)
        begin += size


def _ending(worker: _Worker) -> str:
    worker.process.join()
    code = worker.process.exitcode
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
    return how if worker.device == "cpu" else f"{how} on {worker.device}"


def _work(pipe: Connection, device: str, place: Path, options: TranslateOptions, trust_code: bool) -> None:
    """What a worker does until nobody listens any more."""
    # Ctrl-C goes to every process of the terminal; the main process alone answers it, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # what the main process writes to is its own
    try:
        inbox = SimpleQueue[Any]()
        threading.Thread(target=_receive, args=(pipe, inbox), name="trmt-inbox", daemon=True).start()
        options = replace(options, device=keep_to(device))
        import torch

        torch.set_num_threads(1)
        translator = Translator.load(place, options=options, trust_code=trust_code)
        pipe.send([])
        while work := inbox.get():
            texts, prefixes, first_key = work
            pipe.send(list(translator.ready(texts, prefixes=prefixes, first_key=first_key)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        if not isinstance(error, TrmtError):
            error.add_note(f"In a worker process:\n{traceback.format_exc()}")
        with suppress(OSError):
            pipe.send(error)


def _receive(pipe: Connection, inbox: SimpleQueue[Any]) -> None:
    """Take what is sent at once: else both ends could wait for the other to read first. None is the end."""
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):
        inbox.put(None)
