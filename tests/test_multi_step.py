"""Several decoding steps in one call of a kernel, against the same steps one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.fakes import random_sentences, small_network
from trmt.decoding.base import Hypothesis, Search
from trmt.decoding.beam import Beam
from trmt.decoding.direct import DirectRunner
from trmt.decoding.engine import Engine
from trmt.decoding.greedy import Greedy
from trmt.decoding.request import Batching, Request
from trmt.decoding.sampling import Sampling
from trmt.errors import BundleError
from trmt.native import products
from trmt.native.transformer import NativeStepper
from trmt.nets.base import Precision, Seq2Seq

VOCABULARY, EOS, BANNED = 700, 2, (0, 1, 20)
pytestmark = pytest.mark.skipif(not products.best_processor(), reason="no C compiler here")
NATIVE = ("transformer", "ssru")  # networks whose steps are kernels


def network(name: str = "transformer", **options: Any) -> Seq2Seq:
    sizes = {"d_model": 32, "source_vocabulary": VOCABULARY, "target_vocabulary": VOCABULARY}
    net = small_network(name, **sizes, **options)
    with torch.no_grad():
        net.output.weight[EOS] *= 3  # or translations hardly ever end by themselves
    return net


def requests() -> list[Request]:
    """Sentences of many lengths, with prefixes that hold banned tokens, and with least lengths."""
    return [
        Request(
            (*sentence, EOS),
            52 - 3 * index,
            prefix=(VOCABULARY - 1, 7, 20)[: index % 4],
            key=index,
            min_tokens=index % 3 * 4,
        )
        for index, sentence in enumerate(random_sentences(13, longest=12))
    ]


def engine_of(search: Search, *, name: str = "transformer", sentences: int = 1, **options: Any) -> Engine:
    options = {"bos": 1, "eos": EOS, "banned": BANNED, **options}
    return Engine(network(name), search, batching=Batching(sentences=sentences), **options)


def runner_of(engine: Engine) -> DirectRunner:
    assert isinstance(engine.runner, DirectRunner)
    return engine.runner


def translated(engine: Engine) -> list[list[Hypothesis]]:
    found = {request.key: hypotheses for request, hypotheses in engine.translate(requests())}
    return [found[key] for key in sorted(found)]


@pytest.mark.parametrize("search", [Greedy(), Beam(size=4, n_best=2), Beam(size=1)], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", NATIVE)
def test_several_steps_are_the_same_as_one_by_one(search: Search, precision: Precision, name: str) -> None:
    one_by_one = engine_of(search, precision=precision, name=name)
    assert runner_of(one_by_one).multi_step
    runner_of(one_by_one).multi_step = None
    expected = translated(one_by_one)
    lengths = {len(each[0].ids) for each in expected}
    assert len(lengths) > 3 and max(lengths) > 32  # so that caches grow
    for sentences in (1, 4, 13):
        assert translated(engine_of(search, sentences=sentences, precision=precision, name=name)) == expected


def test_bans_need_not_follow_one_another() -> None:
    free = translated(engine_of(Greedy(), banned=()))
    banned = {free[0][0].ids[-1], free[1][0].ids[-1], 0} - {EOS}
    found = translated(engine_of(Greedy(), banned=banned))
    for request, (best,) in zip(requests(), found, strict=True):
        assert not banned & {*best.ids[len(request.prefix) :]}


def test_without_a_kernel_steps_run_one_by_one() -> None:
    plain = Engine(network(activation="gelu"), Greedy(), bos=1, eos=EOS)
    assert not isinstance(plain.decoder.stepper, NativeStepper) and not runner_of(plain).multi_step
    sampled = engine_of(Sampling(samples=2))
    assert runner_of(sampled).multi_step and len(translated(sampled)) == len(requests())
    # More hypotheses than the kernels keep in order.
    assert all(len(each) == 30 for each in translated(engine_of(Beam(size=30, n_best=30), banned=())))


@pytest.mark.parametrize("name", NATIVE)
def test_broken_weights_are_an_error(name: str) -> None:
    broken = network(name)
    with torch.no_grad():
        broken.get_parameter("decoder.layers.1.cross_out.weight")[3, 5] = torch.nan
    with pytest.raises(BundleError, match="not numbers"):
        list(Engine(broken, Greedy(), bos=1, eos=EOS).translate(requests()))
