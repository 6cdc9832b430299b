"""The device and the precision to compute with, and settings of the process that go with them."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from trmt.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The named device, or with `auto` a GPU if there is one; a missing device is an error."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]{1,3})?", name):
        raise ConfigError(f"there is no device {name!r}; choose auto, cpu, mps, cuda, or cuda:1 and so on")
    device_type, _, number = name.partition(":")
    if device_type == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{name} was asked for, but torch sees {torch.cuda.device_count()} GPUs; use auto")
    if device_type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("mps was asked for, but this machine has none; use auto")
    return torch.device(device_type, int(number)) if number else torch.device(device_type)


def choose_precision(name: str, device: torch.device) -> str:
    """The named precision; `auto` is bf16 on GPUs that support it, fp16 on older GPUs, fp32 elsewhere."""
    if name != "auto":
        if name == "fp16" and device.type != "cuda":
            raise ConfigError(f"fp16 training needs a CUDA GPU, not {device.type}; use bf16 or fp32")
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


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


def compile_network(net: torch.nn.Module) -> Any:
    """The network under torch.compile; what cannot be compiled runs in eager mode."""
    import torch._dynamo

    torch._dynamo.config.suppress_errors = True
    return torch.compile(net)
