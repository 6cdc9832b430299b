"""Compares another program with trmt on the same sentences: log probabilities, and what greedy search finds.

Axes: N target tokens in a row, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trmt.bundles.bundles import Bundle
from trmt.decoding.engine import Engine
from trmt.decoding.greedy import Greedy
from trmt.decoding.request import Request
from trmt.errors import BundleError
from trmt.interop.base import CheckInputs, CheckResults
from trmt.nets.base import Seq2Seq
from trmt.nets.ragged import Ragged, Source
from trmt.text.tokenizer import Side, Tokenizer

PerToken = tuple[tuple[float, ...], ...]  # a number for each token of each sentence, the end included

SENTENCES = 6  # at least; random ones are added if the bundle has fewer golden sentences
MAX_TOKENS = 40  # of a translation, because an untrained network may never end it
TOLERANCE = 1e-3  # of a log probability; rounding in fp32 makes a hundredth of that


@dataclass(frozen=True)
class Reference:
    """What our network computes from the inputs."""

    inputs: CheckInputs
    results: CheckResults
    margins: PerToken  # by which each token of a translation was more probable than any other


def check_sentences(bundle: Bundle) -> list[str]:
    """The bundle's golden sentences, and random ones if these are few."""
    golden = [str(each["source"]) for each in bundle.manifest.golden]
    random_texts = _random_texts(bundle.tokenizer.source, SENTENCES)
    return golden + random_texts[: max(SENTENCES - len(golden), 2)]


def _random_texts(side: Side, count: int) -> list[str]:
    """Texts of random tokens, the same at each call."""
    chooser = random.Random(1)
    usable = [token for token in range(side.vocabulary) if token not in side.banned_ids and token != side.eos]
    return [side.decode(chooser.choices(usable, k=2 + 2 * number)) for number in range(count)]


@torch.inference_mode()
def reference(
    net: Seq2Seq, tokenizer: Tokenizer, texts: Sequence[str], *, max_source_length: int
) -> Reference:
    """Run our network on the texts that are not longer; the targets that are scored are random."""
    source, target = tokenizer.source, tokenizer.target
    encoded = zip(texts, map(tuple, source.encode(texts)), strict=True)
    fitting = [(text, ids) for text, ids in encoded if 0 < len(ids) <= max_source_length]
    if not fitting:
        raise BundleError("no sentence is short enough for this network to compare it on; pass --no-check")
    limit = min(MAX_TOKENS, net.max_positions - 1)
    targets = target.encode(_random_texts(target, len(fitting)))
    inputs = CheckInputs(
        texts=tuple(text for text, _ in fitting),
        sources=tuple(ids for _, ids in fitting),
        targets=tuple(tuple(ids[:limit]) for ids in targets),
        max_tokens=limit,
    )
    padding = range(target.vocabulary, int(getattr(net.config, "target_vocabulary", 0)))
    banned = sorted({*target.banned_ids, *padding})

    def log_prob_NV(targets: Sequence[tuple[int, ...]]) -> Tensor:
        prefixes = Ragged.of([(target.bos, *ids) for ids in targets])
        hidden_ND = net(Source.of([(*ids, source.eos) for ids in inputs.sources]), prefixes).hidden
        return net.readout(hidden_ND).float().index_fill(1, torch.tensor(banned), -torch.inf).log_softmax(-1)

    engine = Engine(net, Greedy(), bos=target.bos, eos=target.eos, banned=banned)
    requests = [Request((*ids, source.eos), limit, key=index) for index, ids in enumerate(inputs.sources)]
    found = {request.key: hypotheses for request, hypotheses in engine.translate(requests)}
    translations = tuple(found[index][0].ids for index in range(len(requests)))
    scores, _ = _scores_and_margins(log_prob_NV(inputs.targets), inputs.targets, target.eos)
    _, margins = _scores_and_margins(log_prob_NV(translations), translations, target.eos)
    return Reference(inputs, CheckResults(translations, scores), margins)


def _scores_and_margins(
    log_prob_NV: Tensor, targets: Sequence[tuple[int, ...]], eos: int
) -> tuple[PerToken, PerToken]:
    """The log probability of each token and of the end, and by how much it exceeds that of any other."""
    token_N = torch.tensor([token for ids in targets for token in (*ids, eos)])
    score_N = log_prob_NV.gather(1, token_N[:, None])[:, 0]
    margin_N = score_N - log_prob_NV.scatter(1, token_N[:, None], -torch.inf).amax(1)
    lengths = [len(ids) + 1 for ids in targets]
    return _by_sentence(score_N, lengths), _by_sentence(margin_N, lengths)


def _by_sentence(values_N: Tensor, lengths: list[int]) -> PerToken:
    return tuple(tuple(values.tolist()) for values in values_N.split(lengths))


def compare(ours: Reference, theirs: CheckResults, *, name: str) -> float:
    """The largest difference of a log probability; an error if rounding cannot explain it."""
    inputs = ours.inputs
    for text, our_ids, their_ids in zip(inputs.texts, inputs.sources, theirs.sources or (), strict=False):
        if our_ids != their_ids:
            raise BundleError(
                f"{name} tokenizes {text!r} differently; please report it with the output of trmt env"
            )
    differences = _differences(ours.results.scores, theirs.scores)
    largest = max(differences, key=lambda each: (math.isnan(each), each))
    if not largest <= TOLERANCE:  # also if it is not a number
        raise BundleError(
            f"{name} gives a token another log probability, off by {largest:.2g}; this is a bug of trmt or "
            "of the installed version, so please report it with the output of trmt env"
        )
    translations = zip(ours.results.translations, theirs.translations, ours.margins, strict=True)
    for number, (our_ids, their_ids, margins) in enumerate(translations, 1):
        if our_ids != their_ids and not _is_tie(our_ids, their_ids, margins):
            raise BundleError(
                f"{name} translates sentence {number} of the comparison differently, though log "
                "probabilities agree; please report it with the output of trmt env"
            )
    return largest


def _differences(ours: PerToken, theirs: PerToken) -> list[float]:
    rows = zip(ours, theirs, strict=True)
    return [abs(a - b) for our_row, their_row in rows for a, b in zip(our_row, their_row, strict=True)]


def _is_tie(ours: Sequence[int], theirs: Sequence[int], margins: Sequence[float]) -> bool:
    """Whether two translations first differ where two tokens were equally probable."""
    pairs = list(zip(ours, theirs, strict=False))
    position = next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return position < len(margins) and margins[position] < TOLERANCE
