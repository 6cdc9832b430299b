"""The device and the precision to compute with, and settings of the process that go with them."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from trmt import console
from trmt.devices import hardware
from trmt.devices.abilities import abilities
from trmt.errors import ConfigError

_warned: set[str] = set()  # warnings about GPUs that have been printed


def named_device(name: str) -> torch.device:
    """The named device, or with `auto` a GPU if PyTorch sees one; nothing is run on it.

    "cuda" is any of the GPUs: `choose_device` chooses one.
    """
    if name == "auto":
        if hardware.gpu_count():
            return torch.device("cuda")
        _warn_once(hardware.why_no_gpu(), "; the CPU is used (--device cpu does so without this warning)")
        return torch.device("mps" if hardware.has_mps() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]{1,3})?", name):
        raise ConfigError(f"there is no device {name!r}; choose auto, cpu, mps, cuda, or cuda:1 and so on")
    device_type, _, number = name.partition(":")
    if device_type == "cuda" and int(number or 0) >= (gpus := hardware.gpu_count()):
        why = hardware.why_no_gpu() or f"torch sees {gpus} GPUs; use auto"
        raise ConfigError(f"{name} was asked for, but {why}")
    if device_type == "mps" and not hardware.has_mps():
        raise ConfigError("mps was asked for, but this machine has none; use auto")
    return torch.device(device_type, int(number)) if number else torch.device(device_type)


def choose_device(name: str) -> torch.device:
    """The device to compute on in this process, from now on the current one.

    With `auto` it is the first GPU that can compute, else the CPU. A named device that is missing or cannot
    compute is an error.
    """
    device = hardware.numbered(named_device(name))
    if name != "auto" or device.type == "cpu":
        return prepared(device)
    others = [torch.device("cuda", number) for number in range(hardware.gpu_count())]
    for candidate in dict.fromkeys([device, *others]):
        if not (why := abilities(candidate).lacks("architecture")):
            return prepared(candidate)
        _warn_once(f"{candidate} cannot be used: {why}", "; another device is used")
    return torch.device("cpu")


def prepared(device: torch.device) -> torch.device:
    """The same device, if it can compute, as the current one of this process."""
    if device.type != "cpu" and (why := abilities(device).lacks("architecture")):
        raise ConfigError(f"{device} cannot be used: {why}; or choose another --device")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where kernels are launched and graphs are recorded
        # It makes a plan for each new shape, which takes as long as hundreds of kernels.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def _warn_once(message: str, consequence: str) -> None:
    if message and message not in _warned:
        _warned.add(message)
        console.warn(message + consequence)


def choose_precision(name: str, device: torch.device) -> str:
    """The named precision; `auto` is bf16 on GPUs that have it, fp16 on older GPUs, fp32 elsewhere."""
    if name != "auto":
        if name == "fp16" and device.type != "cuda":
            raise ConfigError(f"fp16 training needs a CUDA GPU, not {device.type}; use bf16 or fp32")
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if abilities(device).use("bf16") else "fp16"


def be_deterministic() -> None:
    """Use only deterministic kernels in this process; some are slower.

    Call it before anything is computed on a GPU: cuBLAS reads its setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling uninitialised memory with NaN finds bugs, but takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """A context in which matrix products run in this precision."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def compile_network(net: torch.nn.Module, *, bucket_bytes: int = 0, backend: str = "inductor") -> Any:
    """The network under torch.compile; what cannot be compiled raises an error when it is first run.

    A graph gives all of its gradients at once, at the end of its backward pass. With `bucket_bytes`, the
    network is divided into graphs whose gradients have about that size, so that they come one after another.
    """
    import torch._dynamo

    # Otherwise each graph is tried again, with pages of messages, and a failing backward pass still raises.
    torch._dynamo.config.suppress_errors = False
    if not bucket_bytes:
        return torch.compile(net, backend=backend)
    from torch._dynamo.backends.distributed import DDPOptimizer
    from torch._dynamo.backends.registry import lookup_backend

    divided = DDPOptimizer(bucket_bytes, lookup_backend(backend), first_bucket_cap=bucket_bytes)
    return torch.compile(net, backend=divided.compile_fn)
