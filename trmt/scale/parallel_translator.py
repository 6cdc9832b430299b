"""Translation of lines by several processes, each on a CPU core or a GPU of its own.

This is the fastest way to use many cores, and the only way to use several GPUs. On the CPU the processes map
the same weight files, which are in memory once. Lines are sent in chunks that become smaller towards the end,
so that all processes finish together. A translation does not depend on the other lines of its chunk, so the
output is that of one process. The lines of a process that dies are translated again by another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trmt import console
from trmt.errors import TrmtError
from trmt.scale.pool import ProcessPool, WorkerReply
from trmt.streaming import chunk_sizes
from trmt.translating import TranslateOptions, Translation, Translator

CHUNKS_AHEAD = 2  # chunks that a process has: while it sends one back, it has another to translate
MAX_DEATHS = 3  # of processes over the same lines, after which the lines are the cause


@dataclass(frozen=True)
class TranslateLines:
    """The job of each process: load a bundle, then translate chunks of lines."""

    folder: Path
    options: TranslateOptions
    trust_code: bool

    def load(self) -> Callable[[Any], list[tuple[int, Translation]]]:
        """Load the model; returns the function that translates (texts, prefixes, first key)."""
        import torch

        torch.set_num_threads(1)
        translator = Translator.load(self.folder, options=self.options, trust_code=self.trust_code)

        def translate(chunk: tuple[Sequence[str], Sequence[str], int]) -> list[tuple[int, Translation]]:
            texts, prefixes, first_key = chunk
            return list(translator.ready(texts, prefixes=prefixes, first_key=first_key))

        return translate


@dataclass
class _Chunk:
    """Lines `begin` to `end`, counted from 0, that one process translates together."""

    begin: int
    end: int
    deaths: int = 0


class ParallelTranslator:
    """Translates like a `Translator`, by a process on each device; they end with the `with` block."""

    def __init__(
        self,
        folder: Path,
        *,
        devices: Sequence[str],
        options: TranslateOptions = TranslateOptions(),
        trust_code: bool = False,
    ) -> None:
        # A process sees only its own GPU, which is "cuda" there.
        options = replace(options, device=devices[0].partition(":")[0])
        self._chunk_sizes = chunk_sizes(devices[0], options.batch)
        self._pool = ProcessPool(TranslateLines(folder, options, trust_code), devices=devices)
        # What each process was sent and has not answered; it works on the first of them.
        self._assigned: list[deque[_Chunk]] = [deque() for _ in devices]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.push(self)
            self._await_first()
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.__exit__(kind, error, trace)

    def _await_first(self) -> None:
        """Wait until one process has loaded the bundle; a bad bundle is an error before any input is read."""
        loaded = False
        while not loaded:
            for reply in self._pool.replies():
                if reply.status == "died":
                    raise TrmtError(
                        f"a worker process died while it loaded the model ({reply.value}); "
                        "try again with fewer --workers if memory is short"
                    )
                if reply.status != "ready":
                    raise _error(reply)
                loaded = True

    def ready(
        self, texts: Sequence[str], *, prefixes: Sequence[str] | None = None, first_key: int = 0
    ) -> Iterator[tuple[int, Translation]]:
        """(index of the line, its translation), in the order in which they are ready."""
        prefixes = prefixes or [""] * len(texts)
        queue = deque(_chunks(len(texts), self._pool.size, *self._chunk_sizes))
        missing = len(texts)
        while missing:
            for worker in self._next_workers(len(queue)):
                chunk = queue.popleft()
                self._assigned[worker].append(chunk)
                lines = slice(chunk.begin, chunk.end)
                self._pool.send(worker, (texts[lines], prefixes[lines], first_key + chunk.begin))
            for reply in self._pool.replies():
                assigned = self._assigned[reply.worker]
                if reply.status == "done":
                    chunk = assigned.popleft()
                    missing -= len(reply.value)
                    yield from ((chunk.begin + index, translation) for index, translation in reply.value)
                elif reply.status == "died":
                    _count_death(assigned, reply.value, first_key)
                    queue.extendleft(reversed(assigned))
                    assigned.clear()
                elif reply.status != "ready":
                    raise _error(reply)

    def _next_workers(self, count: int) -> list[int]:
        """The workers for the next `count` chunks: first all without a chunk, then those with only one."""
        free = sorted(
            (chunks, worker)
            for worker, assigned in enumerate(self._assigned)
            for chunks in range(len(assigned), CHUNKS_AHEAD)
        )
        return [worker for _, worker in free[:count]]


def _chunks(count: int, workers: int, min_size: int, max_size: int) -> Iterator[_Chunk]:
    """Lines in chunks that become smaller, so that no worker is left with a long one at the end."""
    begin = 0
    while begin < count:
        size = min(max((count - begin) // (2 * workers), min_size), max_size, count - begin)
        yield _Chunk(begin, begin + size)
        begin += size


def _count_death(assigned: Sequence[_Chunk], how: str, first_key: int) -> None:
    """Count a death for the first of a worker's chunks; too many over one chunk are an error."""
    if not assigned:
        return
    chunk = assigned[0]
    chunk.deaths += 1
    lines = f"lines {first_key + chunk.begin + 1:,} to {first_key + chunk.end:,}"
    if chunk.deaths >= MAX_DEATHS:
        raise TrmtError(
            f"{chunk.deaths} worker processes died over {lines}, the last one: {how}; "
            "try again with fewer --workers if memory is short"
        )
    console.warn(f"a worker process died ({how}); {lines} are translated again")


def _error(reply: WorkerReply) -> Exception:
    """The error behind a reply that is `failed` or `lost`."""
    if isinstance(reply.value, Exception):
        return reply.value
    return TrmtError(reply.value if reply.status == "failed" else f"a worker cannot start: {reply.value}")
