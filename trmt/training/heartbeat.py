"""Heartbeats: how the processes of a run notice that one of them is gone.

Each process has a thread that writes a heartbeat to the shared store and watches that of the next rank. The
thread ends the process where nothing else can: while the main thread waits for a collective on a GPU that
will never return, or for a machine that has disappeared.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time

from torch.distributed.distributed_c10d import Store

from trmt import console

INTERVAL = 2.0  # seconds between two heartbeats
TIMEOUT = 20.0  # seconds without one after which a rank counts as dead; torchrun takes 30 more to kill it
GRACE_PERIOD = 10.0  # seconds that a process has to end by itself once another one has failed
RESUME_HINT = "the same command goes on from the last checkpoint"
FAILED_KEY = "failed"  # the key under which the store counts processes that have failed


def report_failure(store: Store) -> bool:
    """Tell the other processes of a failure; returns whether it is the first one of the run."""
    try:
        return store.add(FAILED_KEY, 1) == 1
    except RuntimeError:  # the process that held the store is gone
        return True


class Heartbeat(threading.Thread):
    """Sends this rank's heartbeats and watches the next rank's; it can end the process."""

    def __init__(self, rank: int, world_size: int, store: Store) -> None:
        super().__init__(name="trmt-heartbeat", daemon=True)
        self.rank, self.neighbour = rank, (rank + 1) % world_size
        # A connection of its own: the main thread may be blocked in the other one.
        self.store = store.clone()  # type: ignore[attr-defined]
        self.stopped = threading.Event()
        self.start()
        # A thread that is inside the store when the interpreter exits would abort the process.
        atexit.register(self._end_thread)

    def stop(self) -> None:
        """Stop sending heartbeats without alarming the other ranks."""
        self._end_thread(None)
        atexit.unregister(self._end_thread)

    def _end_thread(self, timeout: float | None = INTERVAL) -> None:
        self.stopped.set()
        self.join(timeout)

    def run(self) -> None:
        last, last_time, failed_at = b"", time.monotonic(), None
        for beat in itertools.count():
            try:
                self.store.set(f"heartbeat/{self.rank}", str(beat))
                key = f"heartbeat/{self.neighbour}"
                current = self.store.get(key) if self.store.check([key]) else b""
                failed = self.store.check([FAILED_KEY])
            except RuntimeError:
                self._end_process("the process that holds the store of this run is out of reach")
                return
            now = time.monotonic()
            if current != last:
                last, last_time = current, now
            if now - last_time > TIMEOUT:
                self._end_process(f"rank {self.neighbour} has sent no heartbeat for {TIMEOUT:.0f} s")
            failed_at = (failed_at or now) if failed else None
            if failed_at and now - failed_at > GRACE_PERIOD:
                self._end_process("another process has failed")
            if self.stopped.wait(INTERVAL):
                return

    def _end_process(self, reason: str) -> None:
        """End the process at once: the main thread may be waiting for a device for ever."""
        if self.stopped.is_set():
            return
        if report_failure(self.store):
            console.fail(f"{reason}; {RESUME_HINT}")
        os._exit(1)
