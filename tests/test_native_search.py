"""Steps of searches by a kernel, against the same in plain PyTorch."""

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
from trmt.native import search as native_search

EOS, MAX_TOKENS = 2, 12
CPU = torch.device("cpu")
SEARCHES: tuple[Search, ...] = (
    Greedy(),
    Beam(size=1),
    Beam(size=4),
    Beam(size=5, n_best=3, length_penalty=1.0),
    Beam(size=8, n_best=8, length_penalty=0.0),
)
needs_kernels = pytest.mark.skipif(not native_search.library(), reason="no C compiler here")


@dataclass(frozen=True)
class Sentence:
    """What a search knows of a sentence."""

    max_tokens: int
    key: int = 0


def logits_of(step: int, *, rows: tuple[int, int], eos_bonus: float) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    logits = torch.randn(*rows, 9 * CHUNK + 5, generator=generator) * 2
    logits[..., EOS] += eos_bonus
    logits[..., :2] = -torch.inf
    return logits


def walk(search: Search, *, eos_bonus: float) -> tuple[list[tuple[Tensor, ...]], Any]:
    """Every choice up to the end; on the way sentences leave, and others take the slots of some."""
    limits = [12, 12, 3, 1, 9, 12, 7]
    state = search.start([Sentence(limit) for limit in limits], max_tokens=MAX_TOKENS, eos=EOS, device=CPU)
    choices: list[tuple[Tensor, ...]] = []
    for step in range(MAX_TOKENS):
        logits = logits_of(step, rows=(len(state.done_S), search.hypotheses), eos_bonus=eos_bonus)
        parents, tokens, state = search.advance(logits, state)
        alive = state.done_S.logical_not()
        choices.append((parents[alive].clone(), tokens[alive].clone(), state.done_S.clone()))
        if step == 3:
            state = state.keep(torch.tensor([5, 0, 2, 4, 1]))
        if step == 5:
            started = search.start([Sentence(12), Sentence(5)], max_tokens=MAX_TOKENS, eos=EOS, device=CPU)
            state = state.replace(torch.tensor([2, 0]), started)
    return choices, state


@needs_kernels
@pytest.mark.parametrize("eos_bonus", [0.0, 5.0, 9.0])
@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_the_kernel_chooses_what_pytorch_does(
    search: Search, eos_bonus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    native, native_state = walk(search, eos_bonus=eos_bonus)
    monkeypatch.setenv("TRMT_KERNELS", "0")
    plain, plain_state = walk(search, eos_bonus=eos_bonus)
    for one, other in zip(native, plain, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    for mine, theirs in zip(search.results(native_state), search.results(plain_state), strict=True):
        assert [each.ids for each in mine] == [each.ids for each in theirs]
        assert [each.score for each in mine] == pytest.approx([each.score for each in theirs], abs=2e-5)


@needs_kernels
@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_a_sentence_does_not_depend_on_its_neighbours(search: Search) -> None:
    limits = [4, 12, 8]
    together = search.start([Sentence(limit) for limit in limits], max_tokens=MAX_TOKENS, eos=EOS, device=CPU)
    alone = [search.start([Sentence(limit)], max_tokens=MAX_TOKENS, eos=EOS, device=CPU) for limit in limits]
    for step in range(MAX_TOKENS):
        if bool(together.done_S.all()):
            break
        logits = logits_of(step, rows=(3, search.hypotheses), eos_bonus=5.0)
        _, _, together = search.advance(logits.clone(), together)
        for number, state in enumerate(alone):
            _, _, alone[number] = search.advance(logits[number : number + 1].clone(), state)
    for number, state in enumerate(alone):
        mine, whole = tensors(state), tensors(together)
        assert all(torch.equal(mine[name][0], whole[name][number]) for name in mine)


def tensors(state: SearchState) -> dict[str, Tensor]:
    return {field.name: getattr(state, field.name) for field in fields(state)}


@needs_kernels
@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_logits_that_are_not_numbers_do_not_give_a_score(search: Search) -> None:
    state = search.start([Sentence(4), Sentence(4)], max_tokens=4, eos=EOS, device=CPU)
    for step in range(4):
        logits = logits_of(step, rows=(2, search.hypotheses), eos_bonus=0.0)
        logits[1, :, 300] = torch.nan
        _, _, state = search.advance(logits, state)
    good, bad = search.results(state)
    assert good and all(torch.tensor(each.score).isfinite() for each in good)
    assert not bad or all(torch.tensor(each.score).isnan() for each in bad)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("search", [*SEARCHES, Sampling(samples=3, top_p=0.9)], ids=str)
def test_logits_may_have_half_precision(
    search: Search, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setenv("TRMT_KERNELS", "0")
    states = [search.start([Sentence(9)] * 2, max_tokens=9, eos=EOS, device=CPU) for _ in range(2)]
    for step in range(9):
        half = logits_of(step, rows=(2, search.hypotheses), eos_bonus=3.0).bfloat16()
        both = [
            search.advance(logits, state) for logits, state in zip((half, half.float()), states, strict=True)
        ]
        assert all(torch.equal(one, other) for one, other in zip(both[0][:2], both[1][:2], strict=True))
        states = [state for _, _, state in both]
    mine, theirs = (tensors(state) for state in states)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
