"""Translation by several processes of one thread each, which is the fastest way to use many cores.

The processes map the same files, so the weights are in memory once. Lines are handed out in runs, larger
ones first, so that all are busy to the end; since a translation does not depend on its neighbours, the text
is the same for any number of workers. The lines of a worker that dies are done again by another.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trmt import console
from trmt.errors import ConfigError, TrmtError
from trmt.sets.encoding import available_cores
from trmt.translating import TranslateOptions, Translation, Translator

LEAST, MOST = 16, 512  # lines handed out at a time, if there are as many
DEATHS = 3  # of workers over the same lines, after which it is the lines


def count_of(workers: str) -> int:
    """How many processes `--workers` asks for; `auto` is one for each core."""
    if workers == "auto":
        return available_cores()
    if not workers.isdecimal() or not 1 <= int(workers) <= 1024:
        raise ConfigError(f"--workers {workers} is no number of processes; give one from 1 to 1024, or auto")
    return int(workers)


@dataclass
class _Run:
    """Lines that one worker translates together."""

    begin: int  # number of the first, counted from 0
    end: int
    deaths: int = 0


@dataclass(eq=False)
class _Worker:
    """A process, and what it is busy with."""

    process: Any
    pipe: Connection
    run: _Run | None = None
    loaded: bool = False


class Workers:
    """What translates like a `Translator`, by processes; they end with the `with` block."""

    def __init__(
        self,
        place: Path,
        *,
        count: int,
        options: TranslateOptions = TranslateOptions(),
        trust_code: bool = False,
    ) -> None:
        self._loading = place, options, trust_code
        self._context = multiprocessing.get_context("spawn")
        self._workers = [self._begun() for _ in range(count)]

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
        todo = deque(_runs(len(texts), len(self._workers)))
        missing = len(texts)
        while missing:
            for worker in self._workers:
                if todo and worker.run is None:
                    worker.run = todo.popleft()
                    lines = slice(worker.run.begin, worker.run.end)
                    self._send(worker, (texts[lines], prefixes[lines], first_key + worker.run.begin))
            for worker in self._answering([worker for worker in self._workers if worker.run]):
                run = worker.run
                assert run
                found = self._received(worker)
                if found is None:
                    run.deaths += 1
                    self._mourn(worker, run, first_key)
                    todo.appendleft(run)
                elif found:
                    worker.run = None
                    missing -= len(found)
                    yield from ((run.begin + number, translation) for number, translation in found)

    def _begun(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, *self._loading), daemon=True)
        process.start()
        # The worker has the only other copy: its death is the end of the pipe.
        theirs.close()
        return _Worker(process, ours)

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

    def _mourn(self, worker: _Worker, run: _Run, first_key: int) -> None:
        """Put another in the place of a worker that has died, unless that has happened too often."""
        worker.pipe.close()
        lines = f"lines {first_key + run.begin + 1:,} to {first_key + run.end:,}"
        how = _ending(worker)
        if run.deaths >= DEATHS:
            raise TrmtError(
                f"{run.deaths} worker processes died over {lines}, the last one {how}; "
                "try again with fewer --workers if memory is short"
            )
        console.warn(f"a worker process died ({how}); {lines} are translated again")
        self._workers[self._workers.index(worker)] = self._begun()


def _runs(count: int, workers: int) -> Iterator[_Run]:
    """Lines in runs that become smaller, so that nobody is left with a long one at the end."""
    begin = 0
    while begin < count:
        size = min(max((count - begin) // (2 * workers), LEAST), MOST, count - begin)
        yield _Run(begin, begin + size)
        begin += size


def _ending(worker: _Worker) -> str:
    worker.process.join()
    code = worker.process.exitcode
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"


def _work(pipe: Connection, place: Path, options: TranslateOptions, trust_code: bool) -> None:
    """What a worker does until nobody listens any more."""
    # Ctrl-C goes to every process of the terminal; the main process alone answers it, and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # what the main process writes to is its own
    try:
        import torch

        torch.set_num_threads(1)
        translator = Translator.load(place, options=options, trust_code=trust_code)
        pipe.send([])
        while True:
            texts, prefixes, first_key = pipe.recv()
            pipe.send(list(translator.ready(texts, prefixes=prefixes, first_key=first_key)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        if not isinstance(error, TrmtError):
            error.add_note(f"In a worker process:\n{traceback.format_exc()}")
        with suppress(OSError):
            pipe.send(error)
