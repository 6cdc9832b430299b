"""Steps that are recorded once and replayed: whatever a device replays must be all there is to a step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trmt.decoding.captured import Captured

from tests.contracts.test_engine import (
    BANNED,
    BOS,
    EOS,
    SEARCHES,
    VARIANTS,
    engine_of,
    requests_of,
    translated,
)
from tests.fakes import small_network
from trmt.decoding import beam, choosing
from trmt.decoding import slots as slots_of
from trmt.decoding.base import Hypothesis, Search
from trmt.decoding.beam import Beam
from trmt.decoding.engine import Batching, Request
from trmt.decoding.greedy import Greedy
from trmt.decoding.sampling import Sampling
from trmt.nets import fixed_stores, looking_back
from trmt.nets.base import Seq2Seq


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on the CPU: the operations, and the memory they read and wrote; no Python."""

    def __init__(self, run: Callable[[], None]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        with self:
            run()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            for before, now in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(now, Tensor) and now.data_ptr() != before.data_ptr():
                    before.copy_(now)


class Recorder:
    """Makes tapes, which a graph differs from in one thing: recording runs nothing."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.replays = 0

    def __call__(self, run: Callable[[], None]) -> Any:
        recorder = self

        class Recorded:
            tape: Tape | None = None

            def replay(self) -> None:
                recorder.replays += 1
                if self.tape:
                    self.tape.replay()
                else:
                    self.tape = Tape(run)
                    recorder.tapes.append(self.tape)

        return Recorded()


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches do what they do on a GPU: no C kernels, which tapes cannot see, and no looks at values."""
    for module in (beam, choosing):
        monkeypatch.setattr(module, "library_for", lambda *_: None)
    monkeypatch.setattr(beam, "_is_seen", lambda _: False)


def captured_engine(net: Seq2Seq, search: Search, *, sentences: int = 64) -> tuple[Captured, Recorder]:
    batching = Batching(sentences=sentences)
    engine = Captured(net, search, bos=BOS, eos=EOS, banned=BANNED, batching=batching)
    engine._record = recorder = Recorder()
    return engine, recorder


def assert_alike(found: list[list[Hypothesis]], expected: list[list[Hypothesis]], message: str) -> None:
    assert [[each.ids for each in one] for one in found] == [[e.ids for e in one] for one in expected], (
        message
    )
    for one, other in zip(chain(*found), chain(*expected), strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4), message


# Every network with a beam, and every search with a Transformer.
PAIRS = [*((variant, SEARCHES[1]) for variant in VARIANTS), *((VARIANTS[0], search) for search in SEARCHES)]


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize(("variant", "search"), PAIRS, ids=str)
def test_replaying_is_all_there_is_to_a_step(variant: tuple[str, dict[str, Any]], search: Search) -> None:
    net = small_network(variant[0], **variant[1])
    requests = requests_of(6, longest=5)
    expected = translated(engine_of("eager", net, search), requests)
    engine, recorder = captured_engine(net, search, sentences=4)
    for _ in range(2):
        assert_alike(translated(engine, requests), expected, str(search))
    assert recorder.replays > 5 and not engine.eager, search


class OnTheDevice(TorchDispatchMode):
    """No tensor may be made anywhere else."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        assert all(each.device.type == "meta" for each in tree_leaves(made) if isinstance(each, Tensor)), func
        return made


@torch.inference_mode()
@pytest.mark.parametrize(("variant", "search"), PAIRS, ids=str)
def test_steps_never_ask_the_device_for_a_value(variant: tuple[str, dict[str, Any]], search: Search) -> None:
    # Tensors of the device "meta" have no values: who asks for one fails.
    requests = [Request((5, 6, 2), limit=3, prefix=(7,), least=2), Request((5, 2), limit=2)]
    here, there = (
        Captured(small_network(variant[0], **variant[1]).to(device), search, bos=BOS, eos=EOS, banned=BANNED)
        for device in ("cpu", "meta")
    )
    slots = here._new_slots(size=4, room=32, width=5)
    slots.put(here._begun(requests, [0, 1], 32, fixed=True), requests)
    slots.parts = slots_of.mapped(slots.parts, lambda tensor: tensor.to("meta"))
    slots.like.masks.banned = there.banned
    with OnTheDevice():
        slots.run(there)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("search", [Greedy(), Beam(size=3, n_best=2), Sampling(samples=3)], ids=str)
def test_many_sentences_come_and_go(search: Search) -> None:
    net = small_network("transformer")
    requests = [
        *requests_of(16, longest=9),
        *(Request((5, 8, EOS), limit=limit, least=limit // 2, key=limit) for limit in (0, 1, 2, 31, 32, 33)),
    ]
    expected = translated(engine_of("eager", net, search), requests)
    for sentences in (3, 64):
        engine, recorder = captured_engine(net, search, sentences=sentences)
        # The second time with graphs; and in between longer sources, for which the memory is too small.
        longer = requests_of(2, longest=40, seed=8)
        assert_alike(translated(engine, requests), expected, f"{sentences}, the first time")
        assert_alike(
            translated(engine, longer), translated(engine_of("eager", net, search), longer), "longer"
        )
        assert_alike(translated(engine, requests), expected, f"{sentences}, the second time")
        assert recorder.replays > 20, sentences


@pytest.mark.usefixtures("as_on_a_device")
def test_sentences_move_together_when_nobody_comes() -> None:
    net = small_network("transformer")
    # Nothing ends by itself: one sentence of sixteen goes on for long.
    requests = [
        Request((5, 6, EOS), limit=60 if index == 11 else 33, least=33, key=index) for index in range(16)
    ]
    engine, _ = captured_engine(net, Beam(size=2), sentences=16)
    expected = translated(engine_of("eager", net, Beam(size=2)), requests)
    assert_alike(translated(engine, requests), expected, "moved")
    (slots,) = engine._kept.values()
    assert {key[0] for key in slots.seen} == {16, 1}


def test_what_cannot_be_recorded_goes_on_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(run: Callable[[], None]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    net, requests = small_network("rnn"), requests_of(12, longest=9)
    expected = translated(engine_of("eager", net, Beam()), requests)
    engine, _ = captured_engine(net, Beam(), sentences=4)
    engine._record = refuse
    for _ in range(3):
        assert_alike(translated(engine, requests), expected, "refused")
    assert capsys.readouterr().err.count("operation not permitted") == 1


@pytest.mark.usefixtures("as_on_a_device")
def test_memory_that_is_short_makes_fewer_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    net, requests = small_network("transformer"), requests_of(12, longest=9)
    engine, _ = captured_engine(net, Greedy())
    begun = engine._begun

    def scarce(chosen: Any, *arguments: Any, **options: Any) -> Any:
        if len(chosen) > 3:
            raise torch.OutOfMemoryError("there is no more")
        return begun(chosen, *arguments, **options)

    monkeypatch.setattr(engine, "_begun", scarce)
    assert_alike(translated(engine, requests), translated(engine_of("eager", net, Greedy()), requests), "few")
    assert [slots.size for slots in engine._kept.values()] == [2]


def test_columns_are_rounded_up_to_few_sizes() -> None:
    sizes = [slots_of.rounded(count) for count in range(1, 1025)]
    assert sorted(set(sizes)) == [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(count <= size for count, size in enumerate(sizes, 1))


@pytest.mark.usefixtures("as_on_a_device")
def test_a_store_looks_back_by_a_kernel_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []

    def look_back(query_SHKP: Tensor, *tensors: Tensor, **options: Any) -> Tensor:
        calls.append(query_SHKP.shape)
        return looking_back.look_back(query_SHKP, *tensors, **options)

    net, requests = small_network("transformer"), requests_of(9, longest=6)
    for search in (Greedy(), Beam(size=3), Beam(size=20), Sampling(samples=2)):
        expected = translated(engine_of("eager", net, search), requests)
        calls.clear()
        with monkeypatch.context() as kernels:
            kernels.setattr(fixed_stores, "looking_back", SimpleNamespace(suits=suits, look_back=look_back))
            engine, _ = captured_engine(net, search, sentences=4)
            for _ in range(2):
                assert_alike(translated(engine, requests), expected, str(search))
        assert calls, search


def suits(like: Tensor, part: int) -> bool:
    return True


@pytest.mark.parametrize("architecture", ["transformer", "conv", "universal"])
def test_who_waits_to_leave_stays_within_the_networks_positions(architecture: str) -> None:
    net = small_network(architecture, longest=36)
    # The second ends at once. When the first is done the third is not, and both go on until the host looks.
    requests = [
        Request((5,) * 9, limit=35, least=35),
        Request((5,) * 8, limit=35, prefix=(EOS,)),
        Request((5,) * 7, limit=35, least=35),
    ]
    engine = Captured(net, Greedy(), bos=BOS, eos=EOS, banned=BANNED, batching=Batching(sentences=2))
    assert_alike(
        translated(engine, requests), translated(engine_of("eager", net, Greedy()), requests), "late"
    )
