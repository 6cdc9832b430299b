"""Comparing two programs on the same sentences: what they find probable, and what greedy search finds.

Axes: N target tokens in a row, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trmt.bundles.bundles import Bundle
from trmt.decoding.engine import Engine
from trmt.decoding.greedy import Greedy
from trmt.decoding.request import Request
from trmt.errors import BundleError
from trmt.interop.base import Outcome, Probe
from trmt.nets.base import Ragged, Seq2Seq, Source
from trmt.text.tokenizer import Side, Tokenizer

Lists = tuple[tuple[float, ...], ...]

SENTENCES = 6  # at least; what the bundle's golden sentences lack is made up
LIMIT = 40  # tokens of a translation: a network that knows nothing never ends
TOLERANCE = 1e-3  # of a log probability; fp32 itself is off by a hundredth of that


@dataclass(frozen=True)
class Expected:
    """What our network makes of a probe."""

    probe: Probe
    outcome: Outcome
    margins: Lists  # by which each token of a translation was the best


def sentences(bundle: Bundle) -> list[str]:
    """The bundle's golden sentences, and some made up of its pieces where there are few."""
    golden = [str(each["source"]) for each in bundle.manifest.golden]
    made = _made_up(bundle.tokenizer.source, SENTENCES)
    return golden + made[: max(SENTENCES - len(golden), 2)]


def _made_up(side: Side, count: int) -> list[str]:
    chooser = random.Random(1)
    usable = [token for token in range(side.vocabulary) if token not in side.banned_ids and token != side.eos]
    return [side.decode(chooser.choices(usable, k=2 + 2 * number)) for number in range(count)]


@torch.inference_mode()
def expected(net: Seq2Seq, tokenizer: Tokenizer, texts: Sequence[str], *, longest: int) -> Expected:
    """What our network makes of these texts; what it scores as translations is made up."""
    source, target = tokenizer.source, tokenizer.target
    encoded = zip(texts, map(tuple, source.encode(texts)), strict=True)
    fitting = [(text, ids) for text, ids in encoded if 0 < len(ids) <= longest]
    if not fitting:
        raise BundleError("no sentence is short enough for this network to compare it on; pass --no-check")
    sources = tuple(ids for _, ids in fitting)
    limit = min(LIMIT, net.max_positions - 1)
    made = target.encode(_made_up(target, len(sources)))
    probe = Probe(
        tuple(text for text, _ in fitting), sources, tuple(tuple(ids[:limit]) for ids in made), limit
    )
    filling = range(target.vocabulary, int(getattr(net.config, "target_vocabulary", 0)))
    banned = sorted({*target.banned_ids, *filling})

    def log_NV(targets: Sequence[tuple[int, ...]]) -> Tensor:
        before = Ragged.of([(target.bos, *ids) for ids in targets])
        hidden_ND = net(Source.of([(*ids, source.eos) for ids in sources]), before).hidden
        return net.readout(hidden_ND).float().index_fill(1, torch.tensor(banned), -torch.inf).log_softmax(-1)

    engine = Engine(net, Greedy(), bos=target.bos, eos=target.eos, banned=banned)
    requests = [Request((*ids, source.eos), limit, key=number) for number, ids in enumerate(sources)]
    found = {request.key: hypotheses for request, hypotheses in engine.translate(requests)}
    translations = tuple(found[number][0].ids for number in range(len(sources)))
    scores, _ = _chosen(log_NV(probe.targets), probe.targets, target.eos)
    _, margins = _chosen(log_NV(translations), translations, target.eos)
    return Expected(probe, Outcome(translations, scores), margins)


def _chosen(log_NV: Tensor, targets: Sequence[tuple[int, ...]], eos: int) -> tuple[Lists, Lists]:
    """The log probability of each token and of the end, and by how much it is better than any other."""
    token_N = torch.tensor([token for ids in targets for token in (*ids, eos)])
    chosen_N = log_NV.gather(1, token_N[:, None])[:, 0]
    margin_N = chosen_N - log_NV.scatter(1, token_N[:, None], -torch.inf).amax(1)
    lengths = [len(ids) + 1 for ids in targets]
    return _lists(chosen_N, lengths), _lists(margin_N, lengths)


def _lists(values_N: Tensor, lengths: list[int]) -> Lists:
    return tuple(tuple(part.tolist()) for part in values_N.split(lengths))


def compare(ours: Expected, theirs: Outcome, *, name: str) -> float:
    """By how much log probabilities differ at most; a difference that rounding cannot explain is an error."""
    for text, mine, other in zip(ours.probe.texts, ours.probe.sources, theirs.sources or (), strict=False):
        if mine != other:
            raise BundleError(
                f"{name} cuts {text!r} into other pieces; please report it with the output of trmt env"
            )
    differences = sorted(_differences(ours, theirs), key=lambda each: (math.isnan(each), each))
    worst = differences[-1]
    if not worst <= TOLERANCE:  # what is not a number is no agreement
        raise BundleError(
            f"{name} gives a token another log probability, off by {worst:.2g}; this is a bug of trmt or of "
            "the installed version, so please report it with the output of trmt env"
        )
    rows = zip(ours.outcome.translations, theirs.translations, ours.margins, strict=True)
    for number, (mine, other, margins) in enumerate(rows, 1):
        if mine != other and not _tie(mine, other, margins):
            raise BundleError(
                f"{name} translates sentence {number} of the comparison otherwise, though it scores it the "
                "same; please report it with the output of trmt env"
            )
    return worst


def _differences(ours: Expected, theirs: Outcome) -> Iterator[float]:
    for mine, other in zip(ours.outcome.scores, theirs.scores, strict=True):
        yield from (abs(one - two) for one, two in zip(mine, other, strict=True))


def _tie(mine: Sequence[int], other: Sequence[int], margins: Sequence[float]) -> bool:
    """Whether two translations part where two tokens were as good as each other."""
    pairs = list(zip(mine, other, strict=False))
    place = next((place for place, (one, two) in enumerate(pairs) if one != two), len(pairs))
    return place < len(margins) and margins[place] < TOLERANCE
