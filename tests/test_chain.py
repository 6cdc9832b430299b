"""Steps chained in a kernel against the same ones by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trmt.decoding.eager import Eager

from tests.fakes import random_sentences, small_network
from trmt.decoding.base import Hypothesis, Search
from trmt.decoding.beam import Beam
from trmt.decoding.engine import Batching, Request
from trmt.decoding.greedy import Greedy
from trmt.decoding.sampling import Sampling
from trmt.errors import BundleError
from trmt.native import products

VOCABULARY, EOS, BANNED = 700, 2, (0, 1, 20)
pytestmark = pytest.mark.skipif(not products.best(), reason="no C compiler here")


def network(**options: Any) -> Any:
    sizes = {"width": 32, "source_vocabulary": VOCABULARY, "target_vocabulary": VOCABULARY}
    net = small_network("transformer", **sizes, **options)
    with torch.no_grad():
        net.output.weight[EOS] *= 3  # or translations hardly ever end by themselves
    return net


def requests() -> list[Request]:
    """Sentences of many lengths, with prefixes that are banned and lengths that are asked for."""
    return [
        Request(
            (*sentence, EOS),
            limit=52 - 3 * index,
            prefix=(VOCABULARY - 1, 7, 20)[: index % 4],
            least=index % 3 * 4,
        )
        for index, sentence in enumerate(random_sentences(13, longest=12))
    ]


def engine(search: Search, *, sentences: int = 1, **options: Any) -> Eager:
    return Eager(
        network(),
        search,
        bos=1,
        eos=EOS,
        banned=options.pop("banned", BANNED),
        batching=Batching(sentences=sentences),
        **options,
    )


def translated(engine: Eager) -> list[list[Hypothesis]]:
    return [hypotheses for _, hypotheses in sorted(engine.translate(requests()))]


@pytest.mark.parametrize("search", [Greedy(), Beam(size=4, n_best=2), Beam(size=1)])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_chain_takes_the_same_steps(search: Search, precision: products.Precision) -> None:
    by_one = engine(search, precision=precision)
    assert by_one.chain
    by_one.chain = None
    expected = translated(by_one)
    lengths = {len(each[0].ids) for each in expected}
    assert len(lengths) > 3 and max(lengths) > 32  # and caches grow
    for sentences in (1, 4, 13):
        assert translated(engine(search, sentences=sentences, precision=precision)) == expected


def test_bans_that_are_no_range_hold() -> None:
    free = translated(engine(Greedy(), banned=()))
    banned = {free[0][0].ids[-1], free[1][0].ids[-1], 0} - {EOS}
    found = translated(engine(Greedy(), banned=banned))
    for request, (best,) in zip(requests(), found, strict=True):
        assert not banned & {*best.ids[len(request.prefix) :]}


def test_what_has_no_kernel_goes_step_by_step() -> None:
    assert network(activation="gelu").frozen(lambda weight, bias: None).kernel is None
    sampled = engine(Sampling(samples=2))
    assert sampled.chain and len(translated(sampled)) == len(requests())
    # As many hypotheses as these, the kernels do not keep in order.
    assert all(len(each) == 30 for each in translated(engine(Beam(size=30, n_best=30), banned=())))


def test_broken_weights_show() -> None:
    broken = network()
    with torch.no_grad():
        broken.decoder[1].own.weight[3, 5] = torch.nan
    with pytest.raises(BundleError, match="not numbers"):
        list(Eager(broken, Greedy(), bos=1, eos=EOS).translate(requests()))
