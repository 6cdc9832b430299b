"""A pool of workers on a Ray cluster: an actor for each core or GPU, which loads the job once.

Ray places the actors and reports which have died. Only the job, the parts and a few numbers about each go
through Ray: the workers read text from storage and write it there.
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
from trmt.errors import ConfigError, TrmtError, first_line
from trmt.scale.pool import MAX_STARTS, WorkerJob, WorkerReply, start_job

LOCAL = "local"  # instead of an address: a cluster on this machine, for as long as the command runs
WAIT_SECONDS = 60.0  # without a reply while no worker is busy, after which a message says so


@dataclass(frozen=True)
class RayCluster:
    """A connected cluster and its resources."""

    ray: Any
    address: str
    cpus: int
    gpus: int

    def pool(self, job: WorkerJob, *, count: int | None = None, gpu: bool = False) -> RayPool:
        """`count` workers with a core or a GPU each; by default as many as the cluster has."""
        available = self.gpus if gpu else self.cpus
        resource = "GPU" if gpu else "core"
        if not available:
            raise ConfigError(f"the Ray cluster {self.address} has no {resource}; add machines to it")
        if count is not None and count > available:
            raise ConfigError(
                f"--workers {count} are more than the {available} {resource}s of the Ray cluster "
                f"{self.address}; ask for fewer"
            )
        return RayPool(self.ray, job, count=count or available, gpu=gpu)


@contextmanager
def ray_cluster(address: str, *, workers: int | None = None) -> Iterator[RayCluster]:
    """Connect to host:port, to the cluster of this machine (`auto`) or to a new one here (`local`)."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "--ray needs Ray, which is not installed: pip install 'trmt[ray]' here and on every machine, "
            "or leave --ray out to use the cores of this one"
        ) from error
    _check_reachable(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no statistics unless the user asks for it
    options: dict[str, Any] = {"address": address}
    if address == LOCAL:
        # Text does not go through Ray's object store, which would take a third of the machine's memory.
        options |= {"num_cpus": workers, "include_dashboard": False, "object_store_memory": 100 << 20}
    try:
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise _unreachable(address, error) from error
    try:
        resources = ray.cluster_resources()
        yield RayCluster(ray, address, int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Try to connect to the address; Ray itself would retry for ten minutes."""
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
    """A worker. Errors are replies, so an exception raised by Ray itself means that the worker is lost."""

    def load(self, job: WorkerJob, version: str) -> tuple[str, Any]:
        try:
            self.attempt = start_job(job, version)
        except TrmtError as error:
            return "lost", f"{platform.node()}: {error}"
        return "ready", None

    def process(self, item: Any) -> tuple[str, Any]:
        return self.attempt(item)


class RayPool:
    """Actors of a cluster; they end with the `with` block."""

    def __init__(self, ray: Any, job: WorkerJob, *, count: int, gpu: bool) -> None:
        self.size = count
        self._ray = ray
        resources = {"num_cpus": 0, "num_gpus": 1} if gpu else {"num_cpus": 1}
        # Ray must not restart actors or repeat tasks: the pool does, which knows what each was processing.
        self._actor_class = ray.remote(_Actor).options(max_restarts=0, max_task_retries=0, **resources)
        self._job = ray.put(job)
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}  # reference of a reply -> worker
        self._deaths_in_a_row: Counter[int] = Counter()
        self._busy: set[int] = set()
        for number in range(count):
            self._start(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)

    def send(self, worker: int, item: Any) -> None:
        """Send an item to a worker."""
        self._pending[self._actors[worker].process.remote(item)] = worker
        self._busy.add(worker)

    def replies(self) -> list[WorkerReply]:
        """The replies that have arrived; waits for at least one."""
        while True:
            arrived, _ = self._ray.wait(list(self._pending), timeout=WAIT_SECONDS)
            if arrived:
                return [self._receive(each) for each in arrived]
            if not self._busy:
                console.say(
                    "no worker is ready yet; the Ray cluster may have no free core or GPU at the moment"
                )

    def _receive(self, reference: Any) -> WorkerReply:
        number = self._pending.pop(reference)
        self._busy.discard(number)
        try:
            status, value = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            return self._replace(number, error)
        self._deaths_in_a_row[number] = 0
        if status == "lost":
            self._ray.kill(self._actors.pop(number))
        return WorkerReply(number, status, value)

    def _replace(self, number: int, error: Exception) -> WorkerReply:
        """Start a new actor for one that is lost, unless it keeps dying."""
        # It may be alive behind a broken network; what it still writes is what the new one will write.
        self._ray.kill(self._actors.pop(number))
        self._deaths_in_a_row[number] += 1
        how = first_line(error)  # without the page of advice that follows
        if self._deaths_in_a_row[number] > MAX_STARTS:
            return WorkerReply(
                number, "lost", f"it died {MAX_STARTS} times before it processed anything ({how})"
            )
        self._start(number)
        return WorkerReply(number, "died", how)

    def _start(self, number: int) -> None:
        actor = self._actor_class.remote()
        self._actors[number] = actor
        self._pending[actor.load.remote(self._job, trmt.__version__)] = number
