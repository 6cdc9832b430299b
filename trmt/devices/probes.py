"""Tiny runs on a device, each of which proves an ability (abilities.py). None draws a random number.

Axes: N tokens in a row, H heads, P head dimension, D hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trmt.devices import hardware
from trmt.devices.cuda_graphs import GraphRecorder
from trmt.registry import NATIVE, optional

FLASH_CAPABILITY = BF16_CAPABILITY = (8, 0)  # the lowest compute capability that computes these in hardware
ONLY_GPUS = "it is for CUDA and ROCm GPUs"


class Unsupported(Exception):
    """A device is not made for an ability; any other error of a probe is a failure."""


class WrongResult(Exception):
    """A probe ran and computed something else than it should."""


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Run a probe as if nothing else were going on: gradients, no autocast, the device the current one."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    full = torch.autocast(device.type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), current, full:
        yield


def probe_architecture(device: torch.device) -> None:
    """A matrix product, and before it a look at what this build of PyTorch has kernels for."""
    if device.type == "cuda":
        supported = hardware.supported_architectures()
        if not hardware.has_kernels_for(hardware.architecture(device), supported):
            raise Unsupported(
                f"it is a {hardware.gpu_name(device)}, and this build of PyTorch ({hardware.build()}) is for "
                f"{', '.join(supported)}; install a build that includes it ({hardware.INSTALL})"
            )
    x = numbers(4, 4)
    _expect((x.to(device) @ x.to(device)).cpu(), x @ x)


def probe_bf16(device: torch.device) -> None:
    """A product and its gradient in bf16."""
    _needs(device, BF16_CAPABILITY)
    x = numbers(16, 16).to(device, torch.bfloat16).requires_grad_()
    (x @ x).sum().backward()
    _expect_numbers(x.grad)


def probe_readout(device: torch.device) -> None:
    """A product of 16-bit numbers whose result 16 bits cannot hold."""
    if device.type == "cpu":
        raise Unsupported(ONLY_GPUS)
    for dtype in (torch.float16, *([torch.bfloat16] if _computes_bf16(device) else [])):
        ones = torch.ones(16, 4104, device=device, dtype=dtype)
        found: Tensor = torch.mm(ones, ones.t(), out_dtype=torch.float32)
        _expect(found.cpu(), torch.full((16, 16), 4104.0))


def probe_varlen(device: torch.device) -> None:
    """Attention of three sentences, one of them empty, forward and backward, with each mask."""
    if device.type != "cuda":
        raise Unsupported(ONLY_GPUS)
    _needs(device, FLASH_CAPABILITY)
    attention = load_varlen()
    starts = torch.tensor([0, 3, 3, 8], dtype=torch.int32, device=device)
    for causal in (True, False):
        qkv = [numbers(8, 2, 64).to(device, torch.bfloat16).requires_grad_() for _ in range(3)]
        out_NHP = attention(*qkv, starts, starts, 5, 5, window_size=(-1, 0 if causal else -1))
        out_NHP.float().sum().backward()
        query, key, value = (x.detach().transpose(0, 1) for x in qkv)  # [H, N, P]
        expected = [
            F.scaled_dot_product_attention(query[:, s], key[:, s], value[:, s], is_causal=causal)
            for s in (slice(0, 3), slice(3, 8))
        ]
        _expect(out_NHP, torch.cat(expected, 1).transpose(0, 1), tolerance=0.05)
        for x in qkv:
            _expect_numbers(x.grad)


def load_varlen() -> Any:
    """PyTorch's function for it, which takes seconds to import."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def probe_compile(device: torch.device) -> None:
    """A layer whose operations have to be fused into kernels, compiled, forward and backward."""
    grads = []
    for layer in (_layer, torch.compile(_layer)):
        weight = numbers(8, 8).to(device).requires_grad_()
        layer(numbers(4, 8).to(device), weight).sum().backward()
        grads.append(weight.grad)
    _expect(*grads)


def _layer(x: Tensor, weight: Tensor) -> Tensor:
    return F.relu(F.linear(x, weight)).square()


def probe_triton(device: torch.device) -> None:
    """Both kernels of trmt.native, compiled and launched, in the precision that is usual on the device."""
    if device.type != "cuda":
        raise Unsupported(ONLY_GPUS)
    if os.environ.get("TRMT_KERNELS") == "0":
        raise Unsupported("TRMT_KERNELS=0")
    probe = optional(NATIVE["probe_triton"])
    if probe is None:
        raise Unsupported("this copy of trmt does not have trmt.native")
    if why := probe(device, torch.bfloat16 if _computes_bf16(device) else torch.float16):
        raise Unsupported(why)


def probe_graphs(device: torch.device) -> None:
    """A step that is recorded once and replayed twice."""
    if device.type != "cuda":
        raise Unsupported(ONLY_GPUS)
    x = torch.zeros(8, device=device)

    def step() -> None:
        x.add_(1)

    step()  # its kernel is loaded before it is recorded
    graph = GraphRecorder(device)(step)
    graph.replay()
    graph.replay()
    _expect(x.cpu(), torch.full((8,), 3.0))


def numbers(*shape: int) -> Tensor:
    """Some small numbers, always the same."""
    return (torch.arange(torch.Size(shape).numel()).view(shape) % 7 - 3) / 4


def _computes_bf16(device: torch.device) -> bool:
    return device.type != "cuda" or hardware.capability(device) >= BF16_CAPABILITY


def _needs(device: torch.device, lowest: tuple[int, int]) -> None:
    if device.type == "cuda" and (has := hardware.capability(device)) < lowest:
        raise Unsupported("it needs compute capability {}.{}, and this GPU has {}.{}".format(*lowest, *has))


def _expect(found: Any, expected: Any, *, tolerance: float = 1e-2) -> None:
    if not torch.allclose(found.float(), expected.float(), atol=tolerance, rtol=tolerance):
        raise WrongResult("a test run computed a wrong result")


def _expect_numbers(found: Any) -> None:
    if found is None or not bool(found.isfinite().all()):
        raise WrongResult("a test run computed gradients that are not numbers")
