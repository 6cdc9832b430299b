"""Training on several processes: ranks, sums over all ranks, agreement, and errors of single ranks.

The processes are started by `torchrun`. A process started alone is a `Distributed` of world size 1, for which
all of this costs nothing. Numbers and gradients travel by collectives, which all ranks call in the same
order. What takes rank 0 long (validating, saving) is waited for by polling a store, so that no collective
runs into its timeout.

There are three ways in which a run ends when one process has died. A collective over a broken connection
fails at once. A rank that waits for rank 0 sees in the store that a process has failed. And each rank has a
heartbeat thread (heartbeat.py), which ends the process where the other two cannot: in a collective on a GPU,
or next to a machine that has disappeared.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import signal
import time
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
from trmt.devices.abilities import abilities
from trmt.devices.choice import choose_device, named_device, prepared
from trmt.devices.hardware import gpu_count, has_nccl
from trmt.errors import ConfigError, TrmtError, first_line
from trmt.training.heartbeat import FAILED_KEY, RESUME_HINT, Heartbeat, report_failure

T = TypeVar("T")

RENDEZVOUS_TIMEOUT = timedelta(minutes=5)  # within which all processes have to appear
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # long, because other ranks may be compiling

_groups = itertools.count()  # each process group of a process has keys of its own in the store


class DistributedError(TrmtError):
    """Another process of the run is gone, or differs from this one."""


class Distributed:
    """A single process: rank 0 of 1. The subclass `MultiProcess` overrides everything that communicates."""

    rank = 0
    local_rank = 0  # among the processes on this machine
    world_size = 1
    requested_signal = 0  # the number of the signal that asked this process to stop

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def seed_key(self) -> tuple[int, ...]:
        """What to add to a random seed so that ranks draw different numbers."""
        return (self.rank,) if self.rank else ()

    @property
    def agreed_signal(self) -> int | None:
        """The signal at which all ranks stop; the same on all since the last `all_reduce_flag`."""
        return self.requested_signal or None

    def device(self, name: str) -> torch.device:
        """The device of this rank, where `name` was asked for."""
        return choose_device(name)

    def agree(self, device: torch.device, ability: str) -> None:
        """Withdraw an ability of the device that another rank does not have."""

    @property
    def torchrun_job(self) -> str:
        """The ID under which torchrun restarts these processes; empty without torchrun."""
        name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        return "" if name == "none" else name

    def all_reduce_max(self, value: int) -> int:
        """The highest value of all ranks; also tells all ranks of a signal that one of them received."""
        return value

    def all_reduce_flag(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; also tells all ranks of a signal that one of them received."""
        return bool(self.all_reduce_max(int(flag)))

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to replace a tensor by its sum over all ranks; calling what is returned waits for that."""
        return lambda: None

    def all_reduce_numbers(self, *values: float) -> list[float]:
        """The sums of these numbers over all ranks."""
        return list(values)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of rank 0."""

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks in their order; they have to be JSON values."""
        return [value]

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its result, a JSON value, on all ranks."""
        return function()

    def main_first(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0, and on the other ranks after that."""
        return function()

    def check_equal(self, **values: Any) -> None:
        """Raise an error if any of these values differs between ranks."""


class MultiProcess(Distributed):
    """One of several processes that train together."""

    def __init__(self, rank: int, world_size: int, local_rank: int, store: Store) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.store = store
        self._agreed_signal = 0
        self._message_numbers = itertools.count()
        self._heartbeat = Heartbeat(rank, world_size, store)
        self._handlers = self._record_signals()

    @property
    def agreed_signal(self) -> int | None:
        return self._agreed_signal or None

    def device(self, name: str) -> torch.device:
        device = named_device(name)
        if device.type == "cpu":
            return device
        if device.type != "cuda":
            raise ConfigError(f"several processes cannot train on {device.type} together; use --device cpu")
        if ":" in str(device):
            raise ConfigError(
                f"several processes cannot share {device}; use --device cuda, and each takes a GPU of its own"
            )
        if self.local_rank >= (gpus := gpu_count()):
            raise ConfigError(
                f"{platform.node()} has {gpus} GPUs and none for process "
                f"{self.local_rank + 1}; lower --nproc-per-node"
            )
        return prepared(torch.device("cuda", self.local_rank))

    def agree(self, device: torch.device, ability: str) -> None:
        mine = abilities(device)
        for rank, why in enumerate(self.all_gather(mine.lacks(ability))):
            if why:
                mine.lose(ability, f"rank {rank} has it not ({why})", warn=False)

    # Collectives

    def all_reduce_max(self, value: int) -> int:
        # On the CPU even where gradients are on GPUs: no rank has to synchronise with a device for this.
        both = torch.tensor([value, self.requested_signal])
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        highest, self._agreed_signal = both.tolist()
        return int(highest)

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        sent = sendable(tensor)
        message = dist.all_reduce(sent, async_op=True)

        def wait() -> None:
            message.wait()
            if sent is not tensor:
                tensor.copy_(sent)

        return wait

    def all_reduce_numbers(self, *values: float) -> list[float]:
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return [float(value) for value in sums.tolist()]

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            sent = sendable(tensor.contiguous())
            dist.broadcast(sent, 0)
            tensor.copy_(sent)

    # JSON values through the store

    def all_gather(self, value: Any) -> list[Any]:
        number = next(self._message_numbers)
        self.store.set(f"gather/{number}/{self.rank}", json.dumps(value))
        return [self._wait_for(f"gather/{number}/{rank}") for rank in range(self.world_size)]

    def on_main(self, function: Callable[[], T]) -> T:
        key = f"main/{next(self._message_numbers)}"
        if self.is_main:
            self.store.set(key, json.dumps(function()))
        return self._wait_for(key)

    def main_first(self, function: Callable[[], T]) -> T:
        if self.is_main:
            result = function()
            self.on_main(lambda: None)
            return result
        self.on_main(lambda: None)
        return function()

    def check_equal(self, **values: Any) -> None:
        gathered = self.all_gather([platform.node(), values])
        main_node, expected = gathered[0]
        for rank, (node, found) in enumerate(gathered):
            for name, value in expected.items():
                if found[name] != value:
                    raise DistributedError(
                        f"rank {rank} on {node} has another {name} than rank 0 on {main_node} "
                        f"({found[name]!r}, not {value!r}); start all processes with the same command, and "
                        "let all see the same files"
                    )

    def _wait_for(self, key: str) -> Any:
        """The JSON value under `key`, waited for without a timeout unless a process fails."""
        pause = 0.005
        while not self.store.check([key]):
            if self.store.check([FAILED_KEY]):
                raise DistributedError(f"another process of this run has failed; {RESUME_HINT}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.25)
        return json.loads(self.store.get(key))

    # The end

    def _record_signals(self) -> dict[int, Any]:
        """Only record a signal from now on; returns the handlers that were installed before.

        When a rank dies, torchrun sends SIGTERM to the others, which must still be able to report the error.
        """

        def record(number: int, frame: FrameType | None) -> None:
            self.requested_signal = number

        try:
            return {number: signal.signal(number, record) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread, so signals are handled elsewhere
            return {}

    def shut_down(self) -> None:
        """Leave the process group once all ranks have come to the end."""
        self.all_reduce_flag(False)
        self._heartbeat.stop()
        dist.destroy_process_group()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def error_to_raise(self, error: BaseException) -> BaseException:
        """What to raise in place of `error`, so that only the first process that fails prints a message."""
        if isinstance(error, RuntimeError) and is_connection_error(error):
            error = DistributedError(
                f"another process of this run has died or is out of reach ({short_reason(error)}); "
                f"{RESUME_HINT}"
            )
        is_first = report_failure(self.store)
        if not isinstance(error, TrmtError):
            return error
        if error.exit_code > 128:  # a signal, which all ranks know of and rank 0 reports
            is_first = self.is_main
        elif not self.is_main:
            error.args = (f"rank {self.rank} on {platform.node()}: {error}",)
        return error if is_first else SystemExit(error.exit_code)


def sendable(tensor: Tensor) -> Tensor:
    """A tensor on the device that collectives run on: without NCCL that is the CPU."""
    return tensor if has_nccl() or not tensor.is_cuda else tensor.cpu()


def is_connection_error(error: RuntimeError) -> bool:
    """Whether a collective raises this when another process is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return any(sign in text for sign in ("Connection closed", "Connection reset", "gloo", "NCCL"))


def short_reason(error: BaseException) -> str:
    """The first sentence of torch's message about a connection, without its position in torch's source."""
    return re.sub(r"^\[[^]]*:\d+\] ", "", first_line(error)).partition(". ")[0]


@contextmanager
def init_distributed() -> Iterator[Distributed]:
    """The processes that `torchrun` started; a process started alone is a plain `Distributed`."""
    if any(name not in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        yield Distributed()
        return
    if int(os.environ["WORLD_SIZE"]) == 1:
        yield Distributed()
        return
    distributed = _join_process_group()
    console.set_main_process(distributed.is_main)
    try:
        yield distributed
        distributed.shut_down()
    except BaseException as error:
        replacement = distributed.error_to_raise(error)
        if replacement is error:
            raise
        raise replacement from error
    finally:
        console.set_main_process(True)


def _join_process_group() -> MultiProcess:
    """Meet the other processes at the address that torchrun gave."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        found = rendezvous("env://", rank=rank, world_size=world_size, timeout=RENDEZVOUS_TIMEOUT)
        shared, _, _ = next(iter(found))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"trmt/{attempt}/{next(_groups)}", shared)
        # Numbers on the CPU go by gloo even where gradients go by NCCL.
        backend = "cpu:gloo,cuda:nccl" if gpu_count() and has_nccl() else "gloo"
        if gpu_count() and not has_nccl() and not rank:
            console.warn("this build of PyTorch has no NCCL: gradients of GPUs are summed on the CPU, slower")
        dist.init_process_group(
            backend,
            store=PrefixStore("group", store),
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise DistributedError(
            f"the {world_size} processes of this run did not find each other at {address} "
            f"({short_reason(error)}); check that all were started and can reach that address"
        ) from error
    return MultiProcess(rank, world_size, int(os.environ.get("LOCAL_RANK", rank)), store)
