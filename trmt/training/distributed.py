"""The processes that train one network together: who we are, sums over all, agreeing, and noticing deaths.

A team is what `torchrun` starts. A process that was started alone is a team of one, for which nothing here
costs anything. Numbers and gradients travel by collectives, which all ranks call in the same order; what
takes the leader long (validating, saving) is waited for by asking a store now and then, so that no collective
runs out of time.

Three things end a team whose member has died. A collective over a broken connection fails at once. A rank
that waits for the leader sees that somebody failed. And each rank has a pulse, a thread that tells the store
that it lives and listens to its neighbour's: it takes the process down where the other two cannot, as in a
GPU's collective or beside a machine that has vanished.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from trmt import console
from trmt.errors import ConfigError, TrmtError
from trmt.training.heartbeat import AGAIN, FAILED, Pulse, first_to_fail

T = TypeVar("T")

MEETING = timedelta(minutes=5)  # within which all processes have to turn up
STUCK = timedelta(minutes=10)  # how long a collective may take: others may be compiling
BUCKET_BYTES = 64 * 2**20  # of the messages in which gradients are summed

_teams = itertools.count()  # each team of a process speaks under keys of its own


class TeamError(TrmtError):
    """Another process of the run is gone, or differs from this one."""


class Team:
    """A process alone: it leads, and has nobody to agree with."""

    rank = 0
    local_rank = 0  # among those on this machine
    size = 1
    wish = 0  # the number of the signal that asked this process to stop

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def key(self) -> tuple[int, ...]:
        """What to add to a random seed for ranks to draw differently."""
        return (self.rank,) if self.rank else ()

    @property
    def signal(self) -> int | None:
        """The signal at which all are to stop, known to all alike since they last settled."""
        return self.wish or None

    def place(self, device: torch.device) -> torch.device:
        """The device of this rank among those of its machine."""
        return device

    @property
    def job(self) -> str:
        """The name under which torchrun starts processes again; empty if there is none."""
        name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        return "" if name == "none" else name

    def settle(self, failed: bool) -> bool:
        """Whether any rank failed; on the way all learn of a signal that any of them got."""
        return failed

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks."""

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the leader's."""

    def total(self, *values: float) -> list[float]:
        """The sums of these numbers over all ranks."""
        return list(values)

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` returns on the leader, as JSON can say it; the others wait as long as it takes."""
        return work()

    def first(self, work: Callable[[], T]) -> T:
        """Do `work` on the leader first, on the others once that is done."""
        return work()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in their order, as JSON can say them."""
        return [value]

    def alike(self, **values: Any) -> None:
        """Refuse to go on if any of these values differs between ranks."""


class Together(Team):
    """One of several processes."""

    def __init__(self, rank: int, size: int, local_rank: int, store: Store) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.store = store
        self._agreed = 0
        self._messages = itertools.count()
        self._pulse = Pulse(rank, size, store)
        self._handlers = self._note_signals()

    # Agreeing

    @property
    def signal(self) -> int | None:
        return self._agreed or None

    def settle(self, failed: bool) -> bool:
        # On the CPU even where gradients are on GPUs: nobody has to wait for a device to know.
        both = torch.tensor([int(failed), self.wish])
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        any_failed, self._agreed = both.tolist()
        return bool(any_failed)

    def place(self, device: torch.device) -> torch.device:
        if device.type == "cpu":
            return device
        if device.type != "cuda":
            raise ConfigError(f"several processes cannot train on {device.type} together; use --device cpu")
        if ":" in str(device):
            raise ConfigError(
                f"several processes cannot share {device}; use --device cuda, and each takes one of its own"
            )
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"{platform.node()} has {torch.cuda.device_count()} GPUs and no one for process "
                f"{self.local_rank + 1}; lower --nproc-per-node"
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    # Sums

    def add(self, tensors: Sequence[Tensor]) -> None:
        under_way: deque[tuple[list[Tensor], Tensor, Any]] = deque()
        for bucket in buckets(tensors, BUCKET_BYTES):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            under_way.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
            if len(under_way) > 1:
                _arrived(*under_way.popleft())
        for message in under_way:
            _arrived(*message)

    def spread(self, tensors: Sequence[Tensor]) -> None:
        for bucket in buckets(tensors, BUCKET_BYTES):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            _arrived(bucket, flat, dist.broadcast(flat, 0, async_op=True))

    def total(self, *values: float) -> list[float]:
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return [float(value) for value in sums.tolist()]

    # Words

    def lead(self, work: Callable[[], T]) -> T:
        key = f"lead/{next(self._messages)}"
        if self.leads:
            self.store.set(key, json.dumps(work()))
        return self._heard(key)

    def first(self, work: Callable[[], T]) -> T:
        if self.leads:
            done = work()
            self.lead(lambda: None)
            return done
        self.lead(lambda: None)
        return work()

    def gather(self, value: Any) -> list[Any]:
        number = next(self._messages)
        self.store.set(f"gather/{number}/{self.rank}", json.dumps(value))
        return [self._heard(f"gather/{number}/{rank}") for rank in range(self.size)]

    def alike(self, **values: Any) -> None:
        everyone = self.gather([platform.node(), values])
        here, mine = everyone[0]
        for rank, (node, theirs) in enumerate(everyone):
            for name, value in mine.items():
                if theirs[name] != value:
                    raise TeamError(
                        f"rank {rank} on {node} has another {name} than rank 0 on {here} ({theirs[name]!r}, "
                        f"not {value!r}); start all with the same command, and let all see the same files"
                    )

    def _heard(self, key: str) -> Any:
        """What somebody says under `key`, waited for without an end unless somebody fails."""
        pause = 0.005
        while not self.store.check([key]):
            if self.store.check([FAILED]):
                raise TeamError(f"another process of this run has failed; {AGAIN}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.25)
        return json.loads(self.store.get(key))

    # The end

    def _note_signals(self) -> dict[int, Any]:
        """Only note a signal from now on, and return the handlers that were there.

        When a rank dies, torchrun asks the others to end: they are about to say why, and have to get to it.
        """

        def note(number: int, frame: FrameType | None) -> None:
            self.wish = number

        try:
            return {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals are somebody else's
            return {}

    def leave(self) -> None:
        """Part in peace, when everyone has come to the end."""
        self.settle(False)
        self._pulse.stop()
        dist.destroy_process_group()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def mourn(self, error: BaseException) -> BaseException:
        """What to raise in place of `error`: of a whole team only the first to fail speaks."""
        if isinstance(error, RuntimeError) and lost_contact(error):
            error = TeamError(
                f"another process of this run has died or is out of reach ({reason(error)}); {AGAIN}"
            )
        first = first_to_fail(self.store)
        if not isinstance(error, TrmtError):
            return error
        if error.exit_code > 128:  # a signal, of which all know and which the leader speaks of
            first = self.leads
        elif not self.leads:
            error.args = (f"rank {self.rank} on {platform.node()}: {error}",)
        return error if first else SystemExit(error.exit_code)


def lost_contact(error: RuntimeError) -> bool:
    """Whether this is what a collective says when somebody is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return any(sign in text for sign in ("Connection closed", "Connection reset", "gloo", "NCCL"))


def reason(error: BaseException) -> str:
    """What torch says of a broken connection, without its place in the source and its advice."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[[^]]*:\d+\] ", "", line).partition(". ")[0]


def buckets(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """The tensors in groups of one kind and about so many bytes; a larger one stands alone."""
    for kind in sorted({tensor.dtype for tensor in tensors}, key=str):
        bucket: list[Tensor] = []
        held = 0
        for tensor in (tensor for tensor in tensors if tensor.dtype == kind):
            if bucket and held + tensor.nbytes > size:
                yield bucket
                bucket, held = [], 0
            bucket.append(tensor)
            held += tensor.nbytes
        if bucket:
            yield bucket


def _arrived(bucket: list[Tensor], flat: Tensor, message: Any) -> None:
    message.wait()
    parts = flat.split([tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


@contextmanager
def assembled() -> Iterator[Team]:
    """The team that `torchrun` started, while it works together; a process started alone is a team of one."""
    if any(name not in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        yield Team()
        return
    if int(os.environ["WORLD_SIZE"]) == 1:
        yield Team()
        return
    team = _joined()
    console.set_main_process(team.leads)
    try:
        yield team
        team.leave()
    except BaseException as error:
        ending = team.mourn(error)
        if ending is error:
            raise
        raise ending from error
    finally:
        console.set_main_process(True)


def _joined() -> Together:
    """Meet the others where torchrun says."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        meeting, _, _ = next(iter(rendezvous("env://", rank=rank, world_size=size, timeout=MEETING)))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"trmt/{attempt}/{next(_teams)}", meeting)
        # Numbers on the CPU go by gloo even where gradients go by NCCL.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=STUCK
        )
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TeamError(
            f"the {size} processes of this run did not find each other at {place} ({reason(error)}); "
            "see that all were started and can reach that place"
        ) from error
    return Together(rank, size, int(os.environ.get("LOCAL_RANK", rank)), store)
