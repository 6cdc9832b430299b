"""Several processes that translate, each with a core or a GPU of its own: which, and how much at a time."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from trmt.decoding.request import Batching
from trmt.devices.choice import choose_device
from trmt.errors import ConfigError
from trmt.sets.encoding import available_cores

ALL = "all"  # as a device: every GPU that torch sees
ON_CPU = (16, 512)  # lines that a process gets at a time: at least, if there are as many, and at most
BATCHES_ON_GPU = (1, 16)  # the same there: less than a batch takes as long as a whole one
GETS = 4  # so many times a process gets lines out of a window, at least, so that all end it together


def devices_for(asked: str, workers: str | None = None) -> tuple[str, ...]:
    """The device of each process that `--device` and `--workers` ask for; workers are cores or GPUs."""
    if asked == ALL or "," in asked:
        if workers is not None:
            raise ConfigError(
                f"--device {asked} has one process for each device, so --workers is not needed; leave it out"
            )
        return _every_gpu() if asked == ALL else _named(asked.split(","))
    device = choose_device(asked)
    if workers is None:
        return (str(device),)
    count = number_of(workers)
    if device.type == "cpu":
        return ("cpu",) * (count or available_cores())
    gpus = torch.cuda.device_count() if device == torch.device("cuda") else None
    if count and count > (gpus or 1):
        has = f"{device} is one" if gpus is None else f"torch sees {gpus}"
        raise ConfigError(
            f"--workers {workers} take a device each, and {has}; ask for fewer, or add --device cpu"
        )
    return (str(device),) if gpus is None else _gpus(count or gpus)


def number_of(workers: str) -> int | None:
    """How many processes `--workers` asks for; None for `auto`: as many as there is room for."""
    if workers == "auto":
        return None
    if not workers.isdecimal() or not 1 <= int(workers) <= 1024:
        raise ConfigError(f"--workers {workers} is no number of processes; give one from 1 to 1024, or auto")
    return int(workers)


def keep_to(device: str) -> str:
    """Let this process see no GPU but its own, and return what that is called then.

    It must not have asked torch for GPUs before. Nothing can then end up on another process's GPU by mistake.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return device
    assert not torch.cuda.is_initialized(), "this process sees all GPUs already"
    # What torch counts are those that are visible, and they may be called anything.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    place = int(number or 0)
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[place].strip() if visible != [""] else str(place)
    return "cuda"


def lines_for(device: str, batch: int) -> tuple[int, int]:
    """How many lines a process should get at a time, at least and at most."""
    if device.startswith("cuda"):
        together = Batching.on(device, batch).sentences
        return BATCHES_ON_GPU[0] * together, BATCHES_ON_GPU[1] * together
    return ON_CPU


def window_for(devices: Sequence[str], batch: int) -> int:
    """How many lines keep all these processes busy."""
    return GETS * len(devices) * lines_for(devices[0], batch)[1]


def _every_gpu() -> tuple[str, ...]:
    count = torch.cuda.device_count()
    if not count:
        raise ConfigError(f"--device {ALL} means every GPU, and torch sees none; leave --device out")
    return _gpus(count)


def _gpus(count: int) -> tuple[str, ...]:
    return tuple(f"cuda:{number}" for number in range(count))


def _named(names: Sequence[str]) -> tuple[str, ...]:
    if {"", "auto", ALL} & {*names}:
        raise ConfigError(f"--device {','.join(names)} is no list of devices; write cuda:0,cuda:1, or all")
    devices = [str(choose_device("cuda:0" if name == "cuda" else name)) for name in names]
    if len({name.partition(":")[0] for name in devices}) > 1:
        raise ConfigError(
            f"--device {','.join(names)} names devices of two kinds, which do not translate alike; "
            "choose one kind"
        )
    # Processes on the CPU have a core each; on one GPU they would wait for one another.
    twice = [name for name in devices if name != "cpu" and devices.count(name) > 1]
    if twice:
        raise ConfigError(f"--device {','.join(names)} names {twice[0]} twice; name each GPU once")
    return tuple(devices)
