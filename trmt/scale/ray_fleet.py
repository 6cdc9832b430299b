"""Workers on the machines of a Ray cluster: an actor for each core or GPU, which loads the job once.

Ray finds room and says who has died; what was being done then, and how often it is tried, is for
fleet.py. Nothing but the job, the parts and a few words about each travels through Ray: text goes from
storage to storage.
"""

from __future__ import annotations

import os
import platform
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import trmt
from trmt import console
from trmt.errors import ConfigError, TrmtError
from trmt.scale import fleet
from trmt.scale.fleet import TRIES, Answer, Job, Part

LOCAL = "local"  # in place of an address: a cluster on this machine, for as long as the command runs
PATIENCE = 60.0  # seconds without an answer and without a part under way, after which that is said


@dataclass(frozen=True)
class Cluster:
    """What a cluster has to work with."""

    ray: Any
    address: str
    cpus: int
    gpus: int

    def fleet(self, job: Job, *, count: int | None = None, gpu: bool = False) -> RayFleet:
        """Workers of one core or GPU each: as many as there is room for, or so many."""
        room = self.gpus if gpu else self.cpus
        kind = "GPU" if gpu else "core"
        if not room:
            raise ConfigError(f"the Ray cluster {self.address} has no {kind} to work on; add machines to it")
        if count is not None and count > room:
            raise ConfigError(
                f"--workers {count} are more than the {room} {kind}s of the Ray cluster {self.address}; "
                "ask for fewer"
            )
        return RayFleet(self.ray, job, count=count or room, gpu=gpu)


@contextmanager
def connected(address: str, *, workers: int | None = None) -> Iterator[Cluster]:
    """The cluster at an address, or `auto` for the one on this machine, or a `local` one made for so many."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--ray needs Ray, which is not installed: pip install 'trmt[ray]' here and on every machine, "
            "or leave --ray out to work with the cores of this one"
        ) from error
    _knock(address)
    # Nobody has agreed to being counted.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"address": address}
    if address == LOCAL:
        # Text does not go through Ray's memory, of which it would take a third of the machine's.
        options |= {"num_cpus": workers, "include_dashboard": False, "object_store_memory": 100 << 20}
    try:
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise _unreachable(address, error) from error
    try:
        has = ray.cluster_resources()
        yield Cluster(ray, address, int(has.get("CPU", 0)), int(has.get("GPU", 0)))
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Make sure that somebody listens at an address; Ray itself would try for ten minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> TrmtError:
    reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
    return TrmtError(
        f"cannot connect to the Ray cluster {address}: {reason}; start one with ray start --head, or write "
        f"--ray {LOCAL} for one on this machine"
    )


class _Actor:
    """A worker; errors are answers, so whatever Ray itself raises means that the worker is lost."""

    def begin(self, job: Job, version: str) -> tuple[str, Any]:
        try:
            self.attempt = fleet.begun(job, version)
        except TrmtError as error:
            return "gone", f"{platform.node()}: {error}"
        return "ready", None

    def work(self, part: Part) -> tuple[str, Any]:
        return self.attempt(part)


class RayFleet:
    """Actors of a cluster; they end with the `with` block."""

    def __init__(self, ray: Any, job: Job, *, count: int, gpu: bool) -> None:
        self.size = count
        self._ray = ray
        needs = {"num_cpus": 0, "num_gpus": 1} if gpu else {"num_cpus": 1}
        # Restarting is ours: it is we who know what a worker was at.
        self._actor = ray.remote(_Actor).options(max_restarts=0, max_task_retries=0, **needs)
        self._job = ray.put(job)
        self._actors: dict[int, Any] = {}
        self._waiting: dict[Any, int] = {}  # what an actor has yet to answer
        self._stillborn: Counter[int] = Counter()
        self._working: set[int] = set()
        for number in range(count):
            self._begin(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)

    def send(self, worker: int, part: Part) -> None:
        """Give a part to a worker that is ready."""
        self._waiting[self._actors[worker].work.remote(part)] = worker
        self._working.add(worker)

    def answers(self) -> list[Answer]:
        """What workers have to say by now; waits for one that has."""
        while True:
            answered, _ = self._ray.wait(list(self._waiting), timeout=PATIENCE)
            if answered:
                return [self._answer(each) for each in answered]
            if not self._working:
                console.say("no worker is ready yet; the Ray cluster may have no room for them at the moment")

    def _answer(self, reference: Any) -> Answer:
        number = self._waiting.pop(reference)
        self._working.discard(number)
        try:
            kind, said = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return self._replaced(number, error)
        self._stillborn[number] = 0
        if kind == "gone":
            self._ray.kill(self._actors.pop(number))
        return Answer(number, kind, said)

    def _replaced(self, number: int, error: Exception) -> Answer:
        """Another in the place of a worker that is lost, unless it never gets as far as being ready."""
        # It may be alive behind a broken network; whatever it still writes is what its heir will write.
        self._ray.kill(self._actors.pop(number))
        self._stillborn[number] += 1
        how = _first_line(error)
        if self._stillborn[number] > TRIES:
            return Answer(number, "gone", f"it died {TRIES} times before it had done anything ({how})")
        self._begin(number)
        return Answer(number, "died", how)

    def _begin(self, number: int) -> None:
        actor = self._actor.remote()
        self._actors[number] = actor
        self._waiting[actor.begin.remote(self._job, trmt.__version__)] = number


def _first_line(error: Exception) -> str:
    """What Ray says of a death, without the page of advice that follows."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
