"""Signs of life: how the processes of a team notice that one of them is gone.

Each has a thread that tells the store now and then that it lives, and listens to its neighbour's. The thread
ends the process where nothing else can: while it waits for a GPU's collective that will never come back, or
for a machine that has vanished.
"""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time

from torch.distributed.distributed_c10d import Store

from trmt import console

BEAT = 2.0  # seconds between two signs of life
SILENCE = 20.0  # seconds without one after which a rank is taken for dead; torchrun takes 30 more to kill it
LAST_WORDS = 10.0  # seconds that a process has to end by itself once another one has failed
AGAIN = "the same command goes on from the last checkpoint"
FAILED = "failed"  # the key under which the store counts processes that have failed


def first_to_fail(store: Store) -> bool:
    """Tell the team of a failure; whether it is the first one it hears of."""
    try:
        return store.add(FAILED, 1) == 1
    except RuntimeError:  # whoever kept the store is gone
        return True


class Pulse(threading.Thread):
    """A rank's sign of life, and its ear for the next rank's; it can end the process."""

    def __init__(self, rank: int, size: int, store: Store) -> None:
        super().__init__(name="trmt-pulse", daemon=True)
        self.rank, self.neighbour = rank, (rank + 1) % size
        # Its own connection: the other one may be waiting for something.
        self.store = store.clone()  # type: ignore[attr-defined]
        self.stopped = threading.Event()
        self.start()
        # A thread that is inside the store when the interpreter goes would abort the process.
        atexit.register(self._fall_silent)

    def stop(self) -> None:
        """Fall silent without alarming anybody."""
        self._fall_silent(None)
        atexit.unregister(self._fall_silent)

    def _fall_silent(self, patience: float | None = BEAT) -> None:
        self.stopped.set()
        self.join(patience)

    def run(self) -> None:
        heard, when, failed_at = b"", time.monotonic(), None
        for beat in itertools.count():
            try:
                self.store.set(f"pulse/{self.rank}", str(beat))
                mine = f"pulse/{self.neighbour}"
                now_heard = self.store.get(mine) if self.store.check([mine]) else b""
                failed = self.store.check([FAILED])
            except RuntimeError:
                self._end("the process that keeps the team together is out of reach")
                return
            now = time.monotonic()
            if now_heard != heard:
                heard, when = now_heard, now
            if now - when > SILENCE:
                self._end(f"rank {self.neighbour} has given no sign of life for {SILENCE:.0f} s")
            failed_at = (failed_at or now) if failed else None
            if failed_at and now - failed_at > LAST_WORDS:
                self._end("another process has failed")
            if self.stopped.wait(BEAT):
                return

    def _end(self, reason: str) -> None:
        """The main thread may be waiting for a device for ever: nothing but this ends it."""
        if self.stopped.is_set():
            return
        if first_to_fail(self.store):
            console.fail(f"{reason}; {AGAIN}")
        os._exit(1)
