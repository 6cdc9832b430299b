"""Which devices --device and --workers ask for, one for each worker process."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from trmt.devices.choice import choose_device, named_device
from trmt.devices.hardware import gpu_count
from trmt.errors import ConfigError
from trmt.sets.encoding import available_cores

ALL = "all"  # as a device: every GPU that torch sees


def devices_for(names: str, workers: str | None = None) -> tuple[str, ...]:
    """The device of each worker process, from the values of --device and --workers."""
    if names == ALL or "," in names:
        if workers is not None:
            raise ConfigError(f"--device {names} starts one process for each device; leave --workers out")
        return _every_gpu() if names == ALL else _named(names.split(","))
    device = named_device(names)
    if workers is None:
        return (str(choose_device(names)),)
    count = worker_count(workers)
    if device.type == "cpu":
        return ("cpu",) * (count or available_cores())
    gpus = gpu_count() if device == torch.device("cuda") else None
    if count and count > (gpus or 1):
        available = f"{device} is one" if gpus is None else f"torch sees {gpus}"
        raise ConfigError(
            f"--workers {workers} need a GPU each, and {available}; ask for fewer, or add --device cpu"
        )
    return (str(device),) if gpus is None else _gpus(count or gpus)


def worker_count(workers: str) -> int | None:
    """The number of processes that --workers asks for; None for `auto`, which is one for each core or GPU."""
    if workers == "auto":
        return None
    if not workers.isdecimal() or not 1 <= int(workers) <= 1024:
        raise ConfigError(
            f"--workers {workers} is not a number of processes; give one from 1 to 1024, or auto"
        )
    return int(workers)


def hide_other_gpus(device: str) -> None:
    """Let this process see only the GPU of its own, which is "cuda" from then on.

    A worker cannot use the GPU of another by mistake then. Must be called before torch has initialised CUDA.
    """
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return
    assert not torch.cuda.is_initialized(), "this process sees all GPUs already"
    # torch numbers the visible GPUs, whose names can be anything.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    index = int(number or 0)
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[index].strip() if visible != [""] else str(index)


def _every_gpu() -> tuple[str, ...]:
    count = gpu_count()
    if not count:
        raise ConfigError(f"--device {ALL} means every GPU, and torch sees none; leave --device out")
    return _gpus(count)


def _gpus(count: int) -> tuple[str, ...]:
    return tuple(f"cuda:{number}" for number in range(count))


def _named(names: Sequence[str]) -> tuple[str, ...]:
    if {"", "auto", ALL} & {*names}:
        raise ConfigError(f"--device {','.join(names)} is not a list of devices; write cuda:0,cuda:1, or all")
    devices = [str(named_device("cuda:0" if name == "cuda" else name)) for name in names]
    if len({name.partition(":")[0] for name in devices}) > 1:
        raise ConfigError(
            f"--device {','.join(names)} mixes types of devices, whose translations can differ; "
            "choose one type"
        )
    # Processes on the CPU take a core each; several on one GPU would only wait for each other.
    repeated = [name for name in devices if name != "cpu" and devices.count(name) > 1]
    if repeated:
        raise ConfigError(f"--device {','.join(names)} names {repeated[0]} twice; name each GPU once")
    return tuple(devices)
