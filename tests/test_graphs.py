"""Steps that are recorded once and replayed: what a device replays must be all that a step is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.cached_attention import cached_attention
from tests.contracts.test_engine import (
    BANNED,
    BOS,
    EOS,
    SEARCHES,
    assert_close,
    engine_of,
    random_table,
    requests_of,
    translated,
)
from tests.fakes import small_network
from tests.variants import Variant, parametrised, variants
from trmt.decoding import beam, graphs
from trmt.decoding.base import Hypothesis, Search
from trmt.decoding.batch import Batch, BatchDecoder
from trmt.decoding.beam import Beam
from trmt.decoding.engine import Engine
from trmt.decoding.graphs import GraphRunner, Repeated
from trmt.decoding.greedy import Greedy
from trmt.decoding.request import Batching, Request
from trmt.decoding.sampling import Sampling
from trmt.nets import kv_cache
from trmt.nets.base import Seq2Seq


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on the CPU: the operations and the memory they read and wrote; no Python."""

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
    """Makes tapes, which differ from graphs in one thing: recording a graph runs nothing."""

    def __init__(self) -> None:
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

        return Recorded()


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches do what they do on a GPU: no C kernels, which tapes cannot record, no values in Python."""
    monkeypatch.setenv("TRMT_KERNELS", "0")
    monkeypatch.setattr(beam, "_on_host", lambda _: False)


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device has lost an ability in another test."""
    monkeypatch.setattr("trmt.devices.abilities._known", {})


def recording_engine(
    net: Seq2Seq, search: Search, *, sentences: int = 64, **options: Any
) -> tuple[Engine, Recorder]:
    engine = engine_of("graphs", net, search, sentences=sentences, **options)
    recorder = runner_of(engine).record = Recorder()
    return engine, recorder


def runner_of(engine: Engine) -> GraphRunner:
    assert isinstance(engine.runner, GraphRunner)
    return engine.runner


def directly(
    net: Seq2Seq, search: Search, requests: Sequence[Request], **options: Any
) -> list[list[Hypothesis]]:
    """What is expected."""
    return translated(engine_of("direct", net, search, **options), requests)


def assert_all_close(found: list[list[Hypothesis]], expected: list[list[Hypothesis]]) -> None:
    for some, others in zip(found, expected, strict=True):
        assert len(some) == len(others)
        assert_close(some, others)


# Every network with a beam, and every search with one of them.
PAIRS = [
    *((variant, SEARCHES[1]) for variant in variants()),
    *((variants()[0], search) for search in SEARCHES),
]


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize(("variant", "search"), PAIRS, ids=str)
def test_a_replayed_step_does_all_that_a_step_does(variant: Variant, search: Search) -> None:
    net = small_network(variant.name, **variant.options)
    requests = requests_of(6, longest=5)
    expected = directly(net, search, requests)
    engine, recorder = recording_engine(net, search, sentences=4)
    for _ in range(2):
        assert_all_close(translated(engine, requests), expected)
    assert recorder.replays > 5 and not runner_of(engine).direct


def test_a_step_may_return_views_of_what_it_was_given() -> None:
    """The table keeps the tokens that it was given, which are overwritten by the next ones."""
    net, requests = random_table(), requests_of(8, longest=6)
    expected = directly(net, Greedy(), requests)
    engine, _ = recording_engine(net, Greedy(), sentences=4)
    for _ in range(2):
        assert_all_close(translated(engine, requests), expected)


class OnTheDevice(TorchDispatchMode):
    """No tensor may be made anywhere else."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        assert all(each.device.type == "meta" for each in tree_leaves(made) if isinstance(each, Tensor)), func
        return made


@torch.inference_mode()
@pytest.mark.parametrize(("variant", "search"), PAIRS, ids=str)
def test_steps_never_ask_the_device_for_a_value(variant: Variant, search: Search) -> None:
    # Tensors of the device "meta" have no values: to ask for one fails.
    requests = [Request((5, 6, 2), 3, prefix=(7,), min_tokens=2), Request((5, 2), 2)]
    here, there = (
        engine_of("graphs", small_network(variant.name, **variant.options).to(device), search)
        for device in ("cpu", "meta")
    )
    slots = runner_of(here)._new_slots(count=4, max_tokens=32, source_length=5)
    slots.put(requests, here.decoder.start(requests, 32, static=True))
    slots.tensors = graphs.mapped(slots.tensors, lambda tensor: tensor.to("meta"))
    slots.masks.banned = torch.tensor(BANNED, device="meta")
    with OnTheDevice():
        slots.run(there.decoder.step, Repeated, pytest.fail)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize(
    ("variant", "search"),
    [
        *(
            pytest.param(*each.values, Beam(size=3, n_best=2), id=each.id, marks=each.marks)
            for each in parametrised(defaults=True)
        ),
        *((variants()[0], search) for search in (Greedy(), Sampling(samples=3))),
    ],
    ids=str,
)
def test_many_sentences_come_and_go(variant: Variant, search: Search) -> None:
    net = small_network(variant.name, **variant.options)
    limits = (0, 1, 2, 31, 32, 33)
    requests = [
        *requests_of(16, longest=9),
        *(Request((5, 8, EOS), limit, min_tokens=limit // 2, key=100 + limit) for limit in limits),
    ]
    longer = requests_of(2, longest=40, seed=8)
    expected, expected_longer = directly(net, search, requests), directly(net, search, longer)
    for sentences in (3, 64):
        engine, recorder = recording_engine(net, search, sentences=sentences)
        # The second time with graphs; and in between longer sources, for which the memory is too small.
        assert_all_close(translated(engine, requests), expected)
        assert_all_close(translated(engine, longer), expected_longer)
        assert_all_close(translated(engine, requests), expected)
        assert recorder.replays > 20, sentences


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("variant", parametrised(defaults=True))
def test_sentences_move_to_the_front_when_none_is_waiting(variant: Variant) -> None:
    net = small_network(variant.name, **variant.options)
    # Nothing ends by itself: one sentence of sixteen goes on for long.
    banned = (*BANNED, EOS)
    requests = [Request((5, 6, EOS), 60 if index == 11 else 33, key=index) for index in range(16)]
    engine, _ = recording_engine(net, Beam(size=2), sentences=16, banned=banned)
    assert_all_close(translated(engine, requests), directly(net, Beam(size=2), requests, banned=banned))
    (slots,) = runner_of(engine).kept.values()
    assert {size[0] for size in slots.seen} == {16, 1}


@pytest.mark.usefixtures("nothing_known")
def test_what_cannot_be_recorded_runs_step_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(run: Callable[[], None]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    net, requests = random_table(), requests_of(12, longest=9)
    expected = directly(net, Beam(), requests)
    engine, _ = recording_engine(net, Beam(), sentences=4)
    runner_of(engine).record = refuse
    for _ in range(3):
        assert_all_close(translated(engine, requests), expected)
    assert capsys.readouterr().err == (
        "warning: CUDA graphs cannot be used on cpu: operation not permitted when stream is capturing; "
        "decoding steps run one by one, slower\n"
    )


class FailingGraph:
    """A graph that is replayed so many times, and then no more."""

    def __init__(self, run: Callable[[], None], replays: int, error: Exception) -> None:
        self.run, self.left, self.error = run, replays, error

    def replay(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error
        self.run()


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize("replays", [0, 1, 3])
def test_what_cannot_be_replayed_runs_step_by_step(replays: int, capsys: pytest.CaptureFixture[str]) -> None:
    net, requests = random_table(), requests_of(12, longest=9)
    expected = directly(net, Beam(), requests)
    engine, _ = recording_engine(net, Beam(), sentences=4)
    error = RuntimeError("CUDA error: unknown error")
    runner_of(engine).record = lambda run: FailingGraph(run, replays, error)
    for _ in range(3):
        assert_all_close(translated(engine, requests), expected)
    assert runner_of(engine).direct
    assert capsys.readouterr().err == (
        "warning: CUDA graphs cannot be used on cpu: CUDA error: unknown error; "
        "decoding steps run one by one, slower\n"
    )


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize("when", ["record", "replay"])
def test_memory_that_ends_while_recording_or_replaying_stays_short_memory(when: str) -> None:
    """Instantiating a graph raises another type of error than allocating a tensor."""
    net, requests = random_table(), requests_of(12, longest=9)
    engine, _ = recording_engine(net, Beam(), sentences=4)
    error = torch.AcceleratorError("CUDA error: out of memory")

    def record(run: Callable[[], None]) -> Any:
        if when == "record":
            raise error
        return FailingGraph(run, 0, error)

    runner_of(engine).record = record
    with pytest.raises(torch.AcceleratorError, match="out of memory"):
        for _ in range(3):
            translated(engine, requests)
    assert not runner_of(engine).direct


def test_a_network_without_static_states_runs_step_by_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net, requests = random_table(), requests_of(12, longest=9)
    expected = directly(net, Beam(), requests)
    monkeypatch.setattr("trmt.nets.base.Stepper.static", False)
    engine, recorder = recording_engine(net, Beam(), sentences=4)
    assert_all_close(translated(engine, requests), expected)
    assert runner_of(engine).direct and not recorder.replays
    assert "the network's states change their shapes" in capsys.readouterr().err


@pytest.mark.usefixtures("as_on_a_device")
def test_short_memory_makes_fewer_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    start = BatchDecoder.start

    def scarce(self: BatchDecoder, requests: Sequence[Request], *arguments: Any, **options: Any) -> Batch:
        if len(requests) > 3:
            raise torch.OutOfMemoryError("there is no more")
        return start(self, requests, *arguments, **options)

    net, requests = random_table(), requests_of(12, longest=9)
    expected = directly(net, Greedy(), requests)
    engine, _ = recording_engine(net, Greedy())
    monkeypatch.setattr(BatchDecoder, "start", scarce)
    assert_all_close(translated(engine, requests), expected)
    assert [len(slots.slots) for slots in runner_of(engine).kept.values()] == [2]


def test_sizes_are_rounded_up_to_few() -> None:
    sizes = [graphs.rounded(count) for count in range(1, 1025)]
    assert sorted(set(sizes)) == [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(count <= size for count, size in enumerate(sizes, 1))


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("search", [Greedy(), Beam(size=3), Beam(size=20), Sampling(samples=2)], ids=str)
def test_static_caches_attend_by_a_kernel_where_there_is_one(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.Size] = []

    def kernel(query_SHKP: Tensor, *arguments: Any) -> Tensor:
        calls.append(query_SHKP.shape)
        return cached_attention(query_SHKP, *arguments).float()

    kernels = {"serves_cached_attention": lambda like, head_dim: True, "cached_attention": kernel}
    net, requests = small_network(variants()[0].name), requests_of(9, longest=6)
    expected = directly(net, search, requests)
    monkeypatch.setattr(kv_cache, "accelerated", kernels.get)
    engine = engine_of("graphs", net, search, sentences=4)
    assert_all_close(translated(engine, requests), expected)
    assert {shape[2] for shape in calls} == ({search.hypotheses} if search.reorders else {1})


@pytest.mark.parametrize("variant", parametrised(defaults=True))
def test_finished_sentences_stay_within_the_networks_positions(variant: Variant) -> None:
    net = small_network(variant.name, **{**variant.options, **limited(variant)})
    # The second ends at once. When the first is done the third is not, and both go on until the next sync.
    requests = [
        Request((5,) * 9, 35, min_tokens=35, key=0),
        Request((5,) * 8, 35, prefix=(EOS,), key=1),
        Request((5,) * 7, 35, min_tokens=35, key=2),
    ]
    batching = Batching(sentences=2)
    engine = Engine(net, Greedy(), bos=BOS, eos=EOS, banned=BANNED, batching=batching, runs="graphs")
    assert_all_close(translated(engine, requests), directly(net, Greedy(), requests))


def limited(variant: Variant) -> dict[str, int]:
    """A limit of positions, for networks that have one."""
    has_one = hasattr(small_network(variant.name, **variant.options).config, "max_positions")
    return {"max_positions": 36} if has_one else {}
