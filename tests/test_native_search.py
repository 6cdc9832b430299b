"""Searches that advance by a kernel against the same in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from trmt.decoding.base import Search, SearchState
from trmt.decoding.beam import Beam
from trmt.decoding.greedy import Greedy
from trmt.decoding.sampling import Sampling
from trmt.decoding.top import CHUNK
from trmt.native.search import library

EOS, MAX_TOKENS = 2, 12
CPU = torch.device("cpu")
SEARCHES: tuple[Search, ...] = (
    Greedy(),
    Beam(size=1),
    Beam(size=4),
    Beam(size=5, n_best=3, length_penalty=1.0),
    Beam(size=8, n_best=8, length_penalty=0.0),
)
needs_kernels = pytest.mark.skipif(library() is None, reason="no C compiler here")


@dataclass(frozen=True)
class Request:
    """What a search knows of a sentence."""

    max_tokens: int
    key: int = 0


def scores_of(step: int, *, rows: tuple[int, int], wish: float) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    scores = torch.randn(*rows, 9 * CHUNK + 5, generator=generator) * 2
    scores[..., EOS] += wish
    scores[..., :2] = -torch.inf
    return scores


def walk(search: Search, *, wish: float) -> tuple[list[tuple[Tensor, ...]], Any]:
    """Every choice on a way to the end, on which sentences leave and others take their places."""
    limits = [12, 12, 3, 1, 9, 12, 7]
    state = search.start([Request(limit) for limit in limits], max_tokens=MAX_TOKENS, eos=EOS, device=CPU)
    choices: list[tuple[Tensor, ...]] = []
    for step in range(MAX_TOKENS):
        scores = scores_of(step, rows=(len(state.done_S), search.hypotheses), wish=wish)
        parents, tokens, state = search.advance(scores, state)
        alive = state.done_S.logical_not()
        choices.append((parents[alive].clone(), tokens[alive].clone(), state.done_S.clone()))
        if step == 3:
            state = state.keep(torch.tensor([5, 0, 2, 4, 1]))
        if step == 5:
            fresh = search.start([Request(12), Request(5)], max_tokens=MAX_TOKENS, eos=EOS, device=CPU)
            state = state.replace(torch.tensor([2, 0]), fresh)
    return choices, state


@needs_kernels
@pytest.mark.parametrize("wish", [0.0, 5.0, 9.0])
@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_the_kernel_chooses_what_pytorch_does(
    search: Search, wish: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    native, native_state = walk(search, wish=wish)
    monkeypatch.setenv("TRMT_KERNELS", "0")
    plain, plain_state = walk(search, wish=wish)
    for one, other in zip(native, plain, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    for mine, theirs in zip(search.results(native_state), search.results(plain_state), strict=True):
        assert [each.ids for each in mine] == [each.ids for each in theirs]
        assert [each.score for each in mine] == pytest.approx([each.score for each in theirs], abs=2e-5)


@needs_kernels
@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_a_sentence_does_not_depend_on_its_neighbours(search: Search) -> None:
    limits = [4, 12, 8]
    together = search.start([Request(limit) for limit in limits], max_tokens=MAX_TOKENS, eos=EOS, device=CPU)
    alone = [search.start([Request(limit)], max_tokens=MAX_TOKENS, eos=EOS, device=CPU) for limit in limits]
    for step in range(MAX_TOKENS):
        if bool(together.done_S.all()):
            break
        scores = scores_of(step, rows=(3, search.hypotheses), wish=5.0)
        _, _, together = search.advance(scores.clone(), together)
        for index, state in enumerate(alone):
            _, _, alone[index] = search.advance(scores[index : index + 1].clone(), state)
    for index, state in enumerate(alone):
        mine, whole = tensors(state), tensors(together)
        assert all(torch.equal(mine[name][0], whole[name][index]) for name in mine)


def tensors(state: SearchState) -> dict[str, Tensor]:
    return {field.name: getattr(state, field.name) for field in fields(state)}


@needs_kernels
@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_scores_that_are_no_numbers_do_not_look_like_a_result(search: Search) -> None:
    state = search.start([Request(4), Request(4)], max_tokens=4, eos=EOS, device=CPU)
    for step in range(4):
        scores = scores_of(step, rows=(2, search.hypotheses), wish=0.0)
        scores[1, :, 300] = torch.nan
        _, _, state = search.advance(scores, state)
    good, bad = search.results(state)
    assert good and all(torch.tensor(each.score).isfinite() for each in good)
    assert not bad or all(torch.tensor(each.score).isnan() for each in bad)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("search", [*SEARCHES, Sampling(samples=3, top_p=0.9)], ids=str)
def test_scores_may_be_of_half_precision(
    search: Search, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setenv("TRMT_KERNELS", "0")
    states = [search.start([Request(9)] * 2, max_tokens=9, eos=EOS, device=CPU) for _ in range(2)]
    for step in range(9):
        half = scores_of(step, rows=(2, search.hypotheses), wish=3.0).bfloat16()
        both = [
            search.advance(scores, state) for scores, state in zip((half, half.float()), states, strict=True)
        ]
        assert all(torch.equal(one, other) for one, other in zip(both[0][:2], both[1][:2], strict=True))
        states = [state for _, _, state in both]
    mine, theirs = (tensors(state) for state in states)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
