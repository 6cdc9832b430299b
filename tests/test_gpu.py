"""What only a GPU can show: it computes what the CPU computes, within tolerance, for every network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toy
from tests.contracts.test_engine import requests_of
from tests.contracts.test_training import HARD, final, log
from tests.fakes import random_sentences, small_network
from tests.scripted import hostile_lines, random_bundle, small_tokenizer
from trmt.decoding.base import Search
from trmt.decoding.beam import Beam
from trmt.decoding.engine import Engine
from trmt.decoding.graphs import GraphRunner
from trmt.decoding.greedy import Greedy
from trmt.decoding.request import Batching, Request
from trmt.decoding.sampling import Sampling
from trmt.devices.abilities import ABILITIES, abilities
from trmt.devices.choice import choose_device, choose_precision
from trmt.devices.cuda_graphs import GraphRecorder
from trmt.nets.layers import Spans, attend_packed
from trmt.nets.ragged import Ragged, Source
from trmt.registry import ARCHITECTURES, installed
from trmt.resume_check import CheckOptions, check_resume
from trmt.scale.parallel_translator import ParallelTranslator
from trmt.training.run import TrainingRun, train
from trmt.training.step import train_step
from trmt.translating import TranslateOptions, Translator

pytestmark = [
    pytest.mark.gpu,
    # Of torch's compiler, about torch, and about TF32, which fp32 does without
    pytest.mark.filterwarnings("default::DeprecationWarning", "default:TensorFloat32:UserWarning"),
]


@pytest.mark.parametrize("architecture", installed(ARCHITECTURES))
@torch.inference_mode()
def test_the_gpu_computes_what_the_cpu_computes(architecture: str) -> None:
    net = small_network(architecture)
    sources, targets = random_sentences(5, seed=1), random_sentences(5, seed=2)
    on_cpu = net(Source.of(sources), Ragged.of(targets)).hidden
    on_gpu = net.to("cuda")(Source.of(sources, "cuda"), Ragged.of(targets, "cuda")).hidden.cpu()
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("architecture", installed(ARCHITECTURES))
def test_beam_search_runs_on_the_gpu(architecture: str) -> None:
    sentences = random_sentences(20, seed=3)
    requests = [Request(tuple(sentence), 12, key=number) for number, sentence in enumerate(sentences)]
    scores = []
    for device in ("cpu", "cuda"):
        engine = Engine(
            small_network(architecture).to(device), Beam(4), bos=2, eos=3, banned={0, 1, 2}, runs="direct"
        )
        scores.append({request.key: found[0].score for request, found in engine.translate(requests)})
    assert scores[0].keys() == scores[1].keys()
    for key, score in scores[0].items():
        assert score == pytest.approx(scores[1][key], abs=1e-2)


@pytest.mark.parametrize("architecture", installed(ARCHITECTURES))
@pytest.mark.parametrize("search", [Greedy(), Beam(4), Beam(20), Sampling(samples=2)], ids=str)
def test_steps_are_recorded_and_replayed(architecture: str, search: Search) -> None:
    requests = requests_of(60, longest=20)
    net = small_network(architecture).to("cuda")
    direct = Engine(net, search, bos=2, eos=3, banned={0, 1, 2}, runs="direct")
    engine = Engine(net, search, bos=2, eos=3, banned={0, 1, 2}, batching=Batching(sentences=16))
    assert isinstance(engine.runner, GraphRunner)
    expected = {request.key: found for request, found in direct.translate(requests)}
    for _ in range(3):
        found = {request.key: found for request, found in engine.translate(requests)}
        alike = sum(found[key][0].ids == expected[key][0].ids for key in expected)
        assert found.keys() == expected.keys() and alike >= 58  # near ties may fall either way
    assert not engine.runner.direct, "something was not recorded"
    assert sum(len(slots.graphs) for slots in engine.runner.kept.values()) > 1


def test_translating_on_the_gpu_is_in_bf16(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path / "text")
    random_bundle(tmp_path / "bundle", tokenizer)
    lines = [line.decode("utf-8", "replace") for line in hostile_lines(60, seed=4)]
    on_cpu = Translator.load(tmp_path / "bundle", options=TranslateOptions(device="cpu")).translate(lines)
    translator = Translator.load(tmp_path / "bundle", options=TranslateOptions(device="cuda"))
    assert isinstance(translator.engine.runner, GraphRunner)
    for _ in range(3):
        on_gpu = translator.translate(lines)
        assert [each.status for each in on_gpu] == [each.status for each in on_cpu]
        alike = sum(one.text == other.text for one, other in zip(on_gpu, on_cpu, strict=True))
        assert alike > len(lines) / 2  # weights are random, and many choices are close


@pytest.mark.parametrize("name", ABILITIES)
def test_a_recent_gpu_can_do_everything(name: str) -> None:
    if torch.cuda.get_device_capability() < (8, 0) or torch.version.hip:
        pytest.skip("needs an NVIDIA GPU from Ampere on")
    assert abilities(torch.device("cuda")).lacks(name) == ""


@pytest.mark.parametrize("causal", [True, False])
def test_empty_sentences_change_no_gradient(causal: bool) -> None:
    """Batches are filled up with sentences of which some have no token."""
    if not abilities(torch.device("cuda")).has("varlen"):
        pytest.skip("needs attention without padding")
    x = torch.randn(40, 3, 2, 64, device="cuda", dtype=torch.bfloat16)
    gradients = []
    for starts in ((0, 9, 40), (0, 0, 9, 9, 9, 40, 40, 40)):
        given = x.clone().requires_grad_()
        starts_S = torch.tensor(starts, device="cuda")
        spans = Spans(starts_S, starts_S.int(), 31)
        out = attend_packed(*given.unbind(1), spans, spans, causal=causal)
        out.square().sum().backward()
        assert given.grad is not None and bool(given.grad.isfinite().all())
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients)


def test_a_step_that_cannot_be_recorded_leaves_the_gpu_as_it_was() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x, recorder = torch.zeros(4, device=device), GraphRecorder(device)
    with pytest.raises(Exception, match="captur"):
        recorder(lambda: print(x.add_(1).tolist()))  # which asks for values
    torch.cuda.synchronize()
    assert torch.rand(3, device=device).isfinite().all(), "random numbers can be drawn"
    x.zero_()
    graph = recorder(lambda: x.add_(1))  # type: ignore[arg-type, return-value]
    graph.replay()
    assert x.tolist() == [1.0] * 4


def test_the_gpu_and_its_precision_are_chosen() -> None:
    device = choose_device("auto")
    assert device.type == "cuda" and choose_precision("auto", device) in ("bf16", "fp16")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_judging_a_step_never_waits_for_the_gpu(toy_set: Path, tmp_path: Path, precision: str) -> None:
    recipe = toy.recipe(tmp_path, {"optim": {"clip": 1.0, "ema": 0.9}, "training": {"device": "cuda"}})
    settings = toy.options(tmp_path / "run", toy_set, recipe, f"training.precision={precision}")
    run = TrainingRun.from_options(settings)
    [pairs] = run.batches.plan(0)[0]
    train_step(run.state, [run.batches.load(pairs)])  # the first one allocates and chooses kernels
    guard = run.state.guard
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(5):
            norm, nll = guard.sums[0].abs(), guard.sums[1].abs()
            guard.update(run.state.optimizer, step=number, norm=norm, nll=nll, tokens=9, clip=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(guard.pop_reports()) == 6


ON_GPU: dict[str, Any] = {**HARD, "training": {**HARD["training"], "device": "cuda", "deterministic": True}}


@pytest.mark.parametrize("architecture", installed(ARCHITECTURES))
def test_resuming_on_the_gpu_is_exact_where_it_is_deterministic(
    architecture: str, toy_set: Path, tmp_path: Path
) -> None:
    recipe = toy.recipe(tmp_path, ON_GPU, architecture=architecture)
    run = train(toy.options(tmp_path / "run", toy_set, recipe, "training.steps=6"))
    assert log(run, "begin")[0]["device"] == "cuda"
    assert check_resume(CheckOptions(run=run)) == []
    whole = train(toy.options(tmp_path / "whole", toy_set, recipe))
    train(toy.options(run, toy_set, recipe))
    assert final(run)[:2] == final(whole)[:2]


def test_memory_that_ends_on_the_gpu_is_met_with_smaller_parts(toy_set: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path, {"training": {"device": "cuda"}, "batches": {"tokens": 3000}})
    wide = ("network.d_model=256", "network.feed_forward=8192")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    plenty = train(toy.options(tmp_path / "plenty", toy_set, recipe, *wide))
    needed = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(0.6 * needed / total)
    try:
        run = train(toy.options(tmp_path / "run", toy_set, recipe, *wide))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert final(run, 6)[2]["halvings"] >= 1
    found, expected = (log(folder, "train")[-1]["loss"] for folder in (run, plenty))
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("count", [1, 2])
def test_processes_with_a_gpu_each_translate_as_one_does(count: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    random_bundle(tmp_path / "bundle", small_tokenizer(tmp_path / "text"))
    texts = [line.decode(errors="replace") for line in hostile_lines(300, seed=2)]
    options = TranslateOptions(beam=2, max_length=12, device="cuda", precision="fp32")
    devices = [f"cuda:{number}" for number in range(count)]
    with ParallelTranslator(tmp_path / "bundle", devices=devices, options=options) as several:
        found = dict(several.ready(texts))
    for number, expected in enumerate(Translator.load(tmp_path / "bundle", options=options).translate(texts)):
        assert found[number].status == expected.status
        scores = [translation.candidates[:1] for translation in (found[number], expected)]
        for mine, theirs in zip(*scores, strict=True):
            assert mine.normalised == pytest.approx(theirs.normalised, abs=1e-2)
