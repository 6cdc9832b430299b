"""The parts of a corpus, processed by a pool of workers until each part is done or has failed too often.

A part names the file its result goes to, so processing it twice does no harm: by a worker that was only
thought to be dead, or after a restart of the command.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trmt import console
from trmt.errors import TrmtError
from trmt.scale.pool import WorkerPool, WorkerReply

MAX_TRIES = 3  # of a part
MAX_FAILURES_IN_A_ROW = 50  # of different parts, after which the cause is not the parts: a full disk, say


@dataclass
class PartsOutcome:
    """Which parts were processed and which were not."""

    done: list[tuple[Any, Any]] = field(default_factory=list)  # the part, and the worker's result
    failed: dict[str, str] = field(default_factory=dict)  # name of a part -> its last error
    deaths: int = 0


def process_parts(
    parts: Sequence[Any], pool: WorkerPool, *, title: str, done_before: int = 0
) -> PartsOutcome:
    """Process all parts, each of which has a `name`; one that fails MAX_TRIES times is given up.

    `done_before` is the number of parts that an earlier command finished, for the progress bar.
    """
    schedule = _Schedule(parts, pool)
    with console.progress(title, done_before + len(parts), unit="parts", done=done_before) as bar:
        while schedule.queue or schedule.current:
            schedule.send()
            for reply in pool.replies():
                schedule.handle(reply)
                bar.advance(int(reply.status == "done"))
    return schedule.outcome


class _Schedule:
    """Which parts are waiting, which worker has which part, and what has become of the others."""

    def __init__(self, parts: Sequence[Any], pool: WorkerPool) -> None:
        self.pool, self.outcome = pool, PartsOutcome()
        self.queue, self.idle = deque(parts), list[int]()
        self.current: dict[int, Any] = {}  # worker -> its part
        self._workers = pool.size
        self._tries: Counter[str] = Counter()
        self._failed_in_a_row: set[str] = set()

    def send(self) -> None:
        """Give a part to each idle worker, as far as there are parts."""
        while self.queue and self.idle:
            worker = self.idle.pop()
            self.current[worker] = self.queue.popleft()
            self.pool.send(worker, self.current[worker])

    def handle(self, reply: WorkerReply) -> None:
        """Record what a worker reports."""
        part = self.current.pop(reply.worker, None)
        if reply.status == "lost":
            self._lose_worker(reply)
            return
        if reply.status != "died":
            self.idle.append(reply.worker)
        if reply.status == "done":
            self.outcome.done.append((part, reply.value))
            self._failed_in_a_row.clear()
        elif reply.status != "ready" and part is not None:
            self.outcome.deaths += reply.status == "died"
            self._retry(part, reply)

    def _lose_worker(self, reply: WorkerReply) -> None:
        self._workers -= 1
        console.warn(f"a worker cannot start: {reply.value}")
        if not self._workers:
            raise TrmtError(f"no worker is left; the last one could not start: {reply.value}")

    def _retry(self, part: Any, reply: WorkerReply) -> None:
        """Put a part back into the queue, unless it has failed too often."""
        self._tries[part.name] += 1
        why = f"a worker died ({reply.value})" if reply.status == "died" else str(reply.value)
        if self._tries[part.name] >= MAX_TRIES:
            self.outcome.failed[part.name] = why
            console.warn(f"{part.name} failed {MAX_TRIES} times and is given up: {why}")
        else:
            console.warn(f"{part.name} is processed again: {why}")
            # A part whose worker died is next, to keep the order; one that failed lets the others go first.
            self.queue.appendleft(part) if reply.status == "died" else self.queue.append(part)
        self._failed_in_a_row.add(part.name)
        if len(self._failed_in_a_row) == MAX_FAILURES_IN_A_ROW:
            raise TrmtError(
                f"{MAX_FAILURES_IN_A_ROW} parts in a row failed, {part.name} because: {reply.value}; "
                "correct that and run the same command again to continue"
            )
