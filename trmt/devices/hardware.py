"""Which devices PyTorch sees here, and why it does not see a GPU that is there; nothing is run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch

PROC_NVIDIA = Path("/proc/driver/nvidia/gpus")  # a folder for each GPU that the driver knows, on Linux
WINDOWS_DRIVER = "System32/nvcuda.dll"
INSTALL = "https://pytorch.org/get-started/locally"


def is_cuda(device: torch.device) -> bool:
    """Whether a device is a GPU for CUDA or ROCm, which PyTorch both calls cuda."""
    return device.type == "cuda"


def numbered(device: torch.device) -> torch.device:
    """A device as its tensors name it: "cuda" is the current GPU, and has a number."""
    if device.type != "cuda":
        return torch.device(device.type)
    if ":" in str(device):
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)


def gpu_count() -> int:
    """The number of GPUs (CUDA or ROCm) that PyTorch can use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an old driver, about which `why_no_gpu` says what to do
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def has_mps() -> bool:
    """Whether there is a GPU of Apple's that PyTorch can use."""
    return bool(torch.backends.mps.is_available())


def has_nccl() -> bool:
    """Whether this build of PyTorch can sum over GPUs by NCCL, which builds for Windows cannot."""
    import torch.distributed as dist  # which loads much that only several processes need

    return bool(dist.is_nccl_available())


def build() -> str:
    """What this build of PyTorch is for: "CUDA 13.0", "ROCm 6.4" or "the CPU"."""
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "the CPU"


def why_no_gpu() -> str:
    """Why a GPU that is there cannot be used, and what to do; empty if there is none or it can be used."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpu_count() or (hidden is not None and hidden.strip() in ("", "-1")):
        return ""
    if torch.version.hip:
        if torch.cuda.device_count() or Path("/dev/kfd").exists():
            return (
                f"there is an AMD GPU, but PyTorch, built for {build()}, cannot use it; update the GPU's "
                f"driver, or install a build of PyTorch for the driver's version of ROCm ({INSTALL})"
            )
        return ""
    if not _nvidia_driver():
        return ""
    if not torch.version.cuda:
        return (
            f"there is an NVIDIA GPU, but this build of PyTorch ({torch.__version__}) is for the CPU only; "
            f"install one for CUDA ({INSTALL})"
        )
    return (
        f"there is an NVIDIA GPU, but PyTorch, built for {build()}, cannot use it: its driver is probably "
        f"too old; update the driver, or install a build of PyTorch for an older CUDA ({INSTALL})"
    )


def _nvidia_driver() -> bool:
    """Whether the driver of an NVIDIA GPU is installed here, and knows a GPU."""
    if os.name == "nt":
        return (Path(os.environ.get("SYSTEMROOT", "C:/Windows")) / WINDOWS_DRIVER).exists()
    if torch.version.cuda and torch.cuda.device_count():  # asks the driver's library, not CUDA
        return True
    return PROC_NVIDIA.is_dir() and any(PROC_NVIDIA.iterdir())


def gpu_name(device: torch.device) -> str:
    """What a GPU is called, and its architecture: "Tesla T4, sm_75" or "AMD Instinct MI300X, gfx942"."""
    if device.type != "cuda":
        return "Apple GPU" if device.type == "mps" else "the processor"
    return f"{torch.cuda.get_device_name(device)}, {architecture(device)}"


def architecture(device: torch.device) -> str:
    """The architecture of a GPU as builds of PyTorch name it: sm_75, or gfx942 for an AMD GPU."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU; infinitely high for an AMD GPU, which has none."""
    if torch.version.hip:
        return 1 << 16, 0
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


def supported_architectures() -> list[str]:
    """The architectures that this build of PyTorch has kernels for; empty if it does not say."""
    return list(torch.cuda.get_arch_list())


def has_kernels_for(architecture: str, supported: list[str]) -> bool:
    """Whether kernels of one of these architectures run on a GPU with this one.

    A kernel for sm_80 runs on every sm_8x from sm_80 on; compute_80 is compiled for any newer GPU when it is
    loaded; an architecture with a letter at its end runs on that one alone.
    """
    if not supported or architecture in supported or not architecture.startswith("sm_"):
        return not supported or architecture in supported
    number = int(architecture.removeprefix("sm_"))
    for each in supported:
        kind, _, digits = each.partition("_")
        if not digits.isdecimal():
            continue
        if kind == "compute" and int(digits) <= number:
            return True
        if kind == "sm" and int(digits) // 10 == number // 10 and int(digits) <= number:
            return True
    return False
