"""Steps of beam and greedy search by C kernels (search.c), which write the search's state in place.

Axes: S sentence, K hypothesis, R rows (S * K), V vocabulary, T target position, C candidates.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trmt.decoding.base import Search
from trmt.decoding.beam import ROUNDING, Beam, BeamState
from trmt.decoding.greedy import Greedy, LineState
from trmt.decoding.top import CHUNK
from trmt.native import build, gpu
from trmt.native.addresses import address, check_returned, is_plain

MAX_CANDIDATES = 64  # that the kernel keeps in order; with more, PyTorch is faster
MAX_VOCABULARY = 1 << 24  # of which a row's maxima fit on a thread's stack
BEAM_TENSORS = (  # in the kernel's order
    *("max_tokens_S", "eos_S", "length_S", "ended_S", "parents_STK", "tokens_STK"),
    *("score_SK", "ended_score_SK", "ended_length_SK", "ended_index_SK", "done_S"),
)
LINE_TENSORS = (
    *("max_tokens_S", "eos_S", "length_S", "count_SK"),
    *("tokens_SKT", "score_SK", "ended_SK", "done_S"),
)


class _Beams(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sentences", "size", "max_tokens", "n_best")),
        *((name, ctypes.c_double) for name in ("length_penalty", "rounding")),
        *((name, ctypes.c_void_p) for name in BEAM_TENSORS),
    )


class _Lines(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sentences", "max_tokens")),
        *((name, ctypes.c_void_p) for name in LINE_TENSORS),
    )


@functools.cache
def library() -> Any | None:
    """The kernels of search, if they can be built."""
    found = build.load("search")
    if found:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        for function in (found.trmt_advance_lines, found.trmt_advance_beams):
            function.restype = ctypes.c_int
            function.argtypes = (pointer, pointer, size, pointer, pointer)
        found.trmt_highest.restype = None
        found.trmt_highest.argtypes = (pointer, size, size, size, pointer, pointer, pointer)
    return found


@dataclass(frozen=True)
class Compiled:
    """A kernel that advances a search, and the state that it writes to."""

    function: Any
    state: ctypes.Structure


def compiled(search: Search, state: Any, vocabulary: int) -> Compiled | None:
    """The kernel that does the same as `search.advance` on scores [S, K, vocabulary], if there is one."""
    loaded = _library_for(state.score_SK, vocabulary, search.hypotheses) if _has_kernel(search) else None
    if not loaded:
        return None
    if isinstance(search, Beam):
        beams = _structure(state, _beams)
        beams.n_best, beams.length_penalty = search.n_best, search.length_penalty
        return Compiled(loaded.trmt_advance_beams, beams)
    return Compiled(loaded.trmt_advance_lines, _structure(state, _lines))


def advance(search: Search, scores_SKV: Tensor, state: Any) -> tuple[Tensor, Tensor, Any] | None:
    """What `search.advance` returns, if there is a kernel for it."""
    found = compiled(search, state, scores_SKV.shape[2])
    if not found:
        return None
    scores_SKV = scores_SKV.float().contiguous()
    at = address(scores_SKV, *state.score_SK.shape, scores_SKV.shape[2])
    parents_SK = torch.empty(scores_SKV.shape[:2], dtype=torch.long)
    tokens_SK = torch.empty_like(parents_SK)
    code = found.function(
        ctypes.addressof(found.state),
        at,
        scores_SKV.shape[2],
        parents_SK.data_ptr(),
        tokens_SK.data_ptr(),
    )
    check_returned(code)
    return parents_SK, tokens_SK, state


def top(scores_RV: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The highest scores of each row, their ids, and the logarithm of the sum of exponentials [R, 1]."""
    rows, vocabulary = scores_RV.shape
    loaded = _library_for(scores_RV, vocabulary, count)
    if not loaded:
        return gpu.top(scores_RV, count)
    scores_RV = scores_RV.contiguous()
    best_RC, log_sum_R1 = scores_RV.new_empty(rows, count), scores_RV.new_empty(rows, 1)
    ids_RC = torch.empty(rows, count, dtype=torch.long)
    pointers = (each.data_ptr() for each in (best_RC, ids_RC, log_sum_R1))
    loaded.trmt_highest(scores_RV.data_ptr(), rows, vocabulary, count, *pointers)
    return best_RC, ids_RC, log_sum_R1


def _has_kernel(search: Search) -> bool:
    return type(search) is Beam or type(search) is Greedy


def _library_for(like: Tensor, vocabulary: int, count: int) -> Any | None:
    """The kernels, where they can find the `count` highest of scores like these."""
    fits = count <= min(MAX_CANDIDATES, vocabulary // CHUNK) and vocabulary <= MAX_VOCABULARY
    return library() if fits and like.device.type == "cpu" and like.dtype == torch.float32 else None


def _structure(state: Any, make: Any) -> Any:
    """The state as the kernel takes it, made once and kept with it."""
    if "_native" not in vars(state):
        object.__setattr__(state, "_native", make(state))
    return state._native


def _beams(state: BeamState) -> _Beams:
    sentences, max_tokens, size = state.tokens_STK.shape
    return _Beams(sentences, size, max_tokens, 0, 0, ROUNDING, *_pointers(state, BEAM_TENSORS))


def _lines(state: LineState) -> _Lines:
    sentences, _, max_tokens = state.tokens_SKT.shape
    return _Lines(sentences, max_tokens, *_pointers(state, LINE_TENSORS))


def _pointers(state: Any, names: tuple[str, ...]) -> list[int]:
    tensors = [getattr(state, name) for name in names]
    assert all(is_plain(tensor) for tensor in tensors)
    return [tensor.data_ptr() for tensor in tensors]
