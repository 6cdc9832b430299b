"""Builds C kernels where there is a C compiler, the first time they are needed, and loads them.

Those for training are built for the processor they run on (AVX-512, with bf16 or without, AVX2, or none of
these), those for inference hold the code for every processor and choose when they run. They are kept in the
user's cache under a name made of everything that went into them, and called through ctypes. Nothing is loaded
from there that somebody else could have written: then the kernels are built anew, in a private folder.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from trmt import console

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
AVX512 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
PROCESSORS: dict[str, list[tuple[str, ...]]] = {
    "AVX512_BF16": [(*AVX512, "-mavx512bf16"), AVX512],  # for compilers that know it, and for others
    "AVX512": [AVX512],
    "AVX2": [("-march=x86-64-v3",)],
}
# These choose among processors at run time, and say themselves where operations are fused.
PORTABLE = {"inference": ("-ffp-contract=off",)}
MINUTES = 2  # that a compiler may take


@functools.cache
def load(name: str) -> ctypes.CDLL | None:
    """The kernels in `name`.c, or None where they cannot be had."""
    compiler = _compiler()
    if compiler is None:
        return None
    for flags in _variants(name):
        try:
            return ctypes.CDLL(str(_built(name, compiler, flags)))
        except (OSError, subprocess.SubprocessError):
            continue
    console.warn(f"{compiler} cannot build trmt's kernels for {name}; it goes on without them, slower")
    return None


def _compiler() -> str | None:
    for candidate in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if candidate and (found := shutil.which(candidate)):
            return found
    return None


def _variants(name: str) -> list[tuple[str, ...]]:
    """Flags to try, best first; the parallel ones need the OpenMP that PyTorch has brought along."""
    import torch

    if name in PORTABLE:
        return [(*PORTABLE[name], "-fopenmp"), PORTABLE[name]]
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        capability = "AVX512_BF16"
    processors = [*PROCESSORS.get(capability, []), ()]
    return [(*processor, *openmp) for openmp in (("-fopenmp",), ()) for processor in processors]


def _built(name: str, compiler: str, flags: tuple[str, ...]) -> Path:
    """The library's file, built unless it is in the cache."""
    import torch

    source = SOURCES / f"{name}.c"
    made_of = [name.encode(), *(file.read_bytes() for file in sorted(SOURCES.glob("*.[ch]")))]
    made_of += [*(flag.encode() for flag in (*FLAGS, *flags)), compiler.encode()]
    made_of += [platform.machine().encode(), platform.platform().encode(), torch.__version__.encode()]
    key = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:20]
    folder = cache_folder()
    library = folder / f"{name}-{key}.so"
    checksum = library.with_suffix(".sha256")
    if _intact(library, checksum):
        return library
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        parts = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
        _run([compiler, *FLAGS, *flags, "-c", str(source), "-o", str(parts[0])])
        # Linked without OpenMP's library: a second copy beside PyTorch's would fight it for the cores.
        _run([compiler, "-shared", str(parts[0]), "-o", str(parts[1]), "-lm"])
        ctypes.CDLL(str(parts[1]))  # what cannot be loaded is not kept
        parts[0].write_text(_digest(parts[1]), encoding="ascii")
        for part in parts:
            part.chmod(0o700)  # whatever the umask is
        parts[0].replace(checksum)
        parts[1].replace(library)
    return library


def _intact(library: Path, checksum: Path) -> bool:
    """Whether the file is as we built it: loading one that was cut short can kill the process."""
    with suppress(OSError, ValueError):
        return (
            is_private(library)
            and is_private(checksum)
            and checksum.read_text(encoding="ascii") == _digest(library)
        )
    return False


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60 * MINUTES)


def is_private(path: Path) -> bool:
    """Whether a file or folder belongs to this user, and nobody else may write to it."""
    if not hasattr(os, "geteuid"):  # on Windows, where modes do not say who may write
        return True
    found = path.stat() if path.is_dir() else path.lstat()  # the user's own links to folders are welcome
    right_kind = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    return right_kind and found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def cache_folder() -> Path:
    """A folder that belongs to this user alone: what lies in it is going to be run.

    Where there is no home to write to, as in many containers, or where others may write to the cache, it is a
    temporary one of this process.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "trmt"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if is_private(folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: the user is not known to the system
        return _temporary_folder()
    _warn_of(folder)
    return _temporary_folder()


@functools.cache
def _temporary_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="trmt-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _warn_of(folder: Path) -> None:
    console.warn(
        f"{folder} belongs to another user, or others may write to it, so that kernels are built anew for "
        f"this process; make it yours alone, with chmod 700 {folder}"
    )
