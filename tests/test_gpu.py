"""What only a GPU can show: it computes what the CPU computes, within tolerance, for every network."""

from __future__ import annotations

import pytest
import torch

from tests.fakes import random_sentences, small_network
from trmt.arch.base import Ragged, Source
from trmt.decode.beam import Beam
from trmt.engines.base import Request
from trmt.engines.device import choose_device, choose_precision
from trmt.engines.eager import Eager
from trmt.registry import ARCHITECTURES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_the_gpu_computes_what_the_cpu_computes(architecture: str) -> None:
    net = small_network(architecture)
    sources, targets = random_sentences(5, seed=1), random_sentences(5, seed=2)
    on_cpu = net(Source.of(sources), Ragged.of(targets)).hidden
    on_gpu = net.to("cuda")(Source.of(sources, "cuda"), Ragged.of(targets, "cuda")).hidden.cpu()
    torch.testing.assert_close(on_gpu, on_cpu, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_beam_search_runs_on_the_gpu(architecture: str) -> None:
    requests = [Request(tuple(sentence), limit=12) for sentence in random_sentences(20, seed=3)]
    scores = []
    for device in ("cpu", "cuda"):
        engine = Eager(small_network(architecture).to(device), Beam(4), bos=2, eos=3, banned={0, 1, 2})
        scores.append({index: found[0].score for index, found in engine.translate(requests)})
    assert scores[0].keys() == scores[1].keys()
    for index, score in scores[0].items():
        assert score == pytest.approx(scores[1][index], abs=1e-2)


def test_the_gpu_and_its_precision_are_chosen() -> None:
    device = choose_device("auto")
    assert device.type == "cuda" and choose_precision("auto", device) in ("bf16", "fp16")
