"""Measures what a shortlist gains and loses: `python bench/shortlist.py BUNDLE SOURCE REFERENCE`.

BUNDLE is a trained network with a lexicon (`trmt shortlist`), SOURCE and REFERENCE a test set, plain or
.gz. Beside it, a network of 6+6 layers of 512 with 32,000 pieces, random weights and a random lexicon
translates random sentences of 30 pieces into 30: that says what readouts cost, and nothing of quality. Random
sentences have hardly a piece in common, so the lists of a batch have less in common than those of real ones.

In each round both ways translate the same sentences on one thread, in turn and in the same process; times are
those of the processor.
"""

from __future__ import annotations

import argparse
import gzip
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import sacrebleu
import torch

from provenance import RESULTS, record
from rounds import ratio
from translate import SEARCHES, VOCABULARY, random_network
from trmt.decode.beam import Beam
from trmt.decode.greedy import Greedy
from trmt.engines.base import Batching, Request
from trmt.engines.eager import Eager
from trmt.saved import bundles
from trmt.saved.lexicon import Lexicon
from trmt.translating import EXTRA

BATCHES = (1, 16, 64)
BEST, FREQUENT, ROOM = 50, 500, 1500  # of the random lexicon
RATE = "target_tokens_per_cpu_second"


def engines(bundle: Any, found: Lexicon, *, search: str, batch: int, precision: Any) -> dict[str, Eager]:
    side = bundle.tokenizer.target
    beam = SEARCHES[search]
    return {
        name: Eager(
            bundle.net,
            Greedy() if beam == 1 else Beam(size=beam),
            bos=side.bos,
            eos=side.eos,
            banned=side.never,
            batching=Batching(sentences=batch),
            precision=precision,
            lexicon=lexicon,
        )
        for name, lexicon in (("shortlist", found), ("whole", None))
    }


def translated(engine: Eager, requests: Sequence[Request], batch: int) -> tuple[list[tuple[int, ...]], float]:
    """The ids of each translation, and the processor time that all took; one by one if batches are of one."""
    began = time.process_time()
    ids: list[tuple[int, ...]] = [()] * len(requests)
    calls = [[index] for index in range(len(requests))] if batch == 1 else [[*range(len(requests))]]
    for call in calls:
        for place, hypotheses in engine.translate([requests[index] for index in call]):
            ids[call[place]] = hypotheses[0].ids
    return ids, time.process_time() - began


def measured(
    both: dict[str, Eager], requests: Sequence[Request], *, batch: int, pairs: int
) -> dict[str, Any]:
    """Rates of both ways and their ratios."""
    for engine in both.values():
        translated(engine, requests[:2], batch)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in both}
    for number in range(pairs):
        for name in [*both][:: 1 if number % 2 else -1]:
            ids, seconds = translated(both[name], requests, batch)
            runs[name].append({RATE: sum(map(len, ids)) / seconds})
    return {
        "rates": {name: round(median(run[RATE] for run in found)) for name, found in runs.items()},
        "times": ratio(runs["shortlist"], runs["whole"], key=RATE),
        "sentences": len(requests),
    }


def points(
    bundle: Any, found: Lexicon, requests: Sequence[Request], given: argparse.Namespace
) -> dict[str, Any]:
    done = {}
    for precision in ("fp32", "int8"):
        for batch in given.batches:
            for search in SEARCHES:
                both = engines(bundle, found, search=search, batch=batch, precision=precision)
                some = requests[: given.sentences if batch == 1 else max(batch, given.sentences)]
                name = f"{precision}/{batch}/{search}"
                done[name] = measured(both, some, batch=batch, pairs=given.pairs)
                print(name, done[name]["rates"], done[name]["times"]["median"], file=sys.stderr, flush=True)
    return done


def quality(
    bundle: Any, found: Lexicon, requests: Sequence[Request], references: list[str]
) -> dict[str, Any]:
    """chrF of both ways, and what the lists hold of the references."""
    side = bundle.tokenizer.target
    metric, scores, texts = sacrebleu.CHRF(), {}, {}
    for search in SEARCHES:
        for name, engine in engines(bundle, found, search=search, batch=64, precision="fp32").items():
            ids, _ = translated(engine, requests, 64)
            texts[name] = [side.decode(each).strip() for each in ids]
            scores[f"{name}/{search}"] = round(metric.corpus_score(texts[name], [references]).score, 2)
        same = sum(one == other for one, other in zip(texts["whole"], texts["shortlist"], strict=True))
        scores[f"same/{search}"] = round(same / len(references), 3)
    lists = [found.listed(request.source) for request in requests]
    pieces = zip(lists, side.encode(references), strict=True)
    held = [float(np.isin(ids, listed).mean()) for listed, ids in pieces if ids]
    return {
        "chrf": scores,
        "signature": str(metric.get_signature()),
        "of_references_listed": round(mean(held), 4),
        "listed": round(mean(map(len, lists))),
        "vocabulary": found.vocabulary,
    }


def trained(given: argparse.Namespace) -> dict[str, Any]:
    bundle = bundles.load_bundle(given.bundle)
    found = bundles.read_lexicon(given.bundle, bundle.manifest, bundle.tokenizer)
    sources, references = (_lines(path) for path in (given.source, given.reference))
    side = bundle.tokenizer.source
    requests = [Request((*ids, side.eos), limit=len(ids) + EXTRA) for ids in side.encode(sources)]
    return quality(bundle, found, requests, references) | {
        "points": points(bundle, found, requests, given),
        "made_with": {key: bundle.manifest.shortlist.get(key) for key in ("best", "frequent", "pairs")},
    }


def random(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    network = random_network("base", work)
    bundle = bundles.load_bundle(network.bundle)
    targets = np.random.default_rng(1).integers(4, VOCABULARY, VOCABULARY * BEST)
    begins, always = np.arange(VOCABULARY + 1) * BEST, np.arange(FREQUENT)
    found = Lexicon(begins, targets, always, ROOM, VOCABULARY)
    side = bundle.tokenizer.source
    ids = {piece: number for number, piece in enumerate(side.pieces(range(VOCABULARY)))}
    requests = [
        Request((*map(ids.__getitem__, pieces), side.eos), limit=network.forced, least=network.forced)
        for pieces in network.sentences
    ]
    listed = round(mean(len(found.listed(request.source)) for request in requests))
    return {"listed": listed, "vocabulary": VOCABULARY, "points": points(bundle, found, requests, given)}


def _lines(path: Path) -> list[str]:
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a shortlist gains and loses.")
    parser.add_argument("bundle", type=Path, help="a trained network with a lexicon")
    parser.add_argument("source", type=Path, help="sentences to translate with it")
    parser.add_argument("reference", type=Path, help="their translations")
    parser.add_argument("--pairs", type=int, default=7, help="rounds of both ways")
    parser.add_argument("--sentences", type=int, default=16, help="in a round; a batch at least")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        figures = {"trained": trained(given), "base": random(given, Path(work))}
    options = {"--pairs": given.pairs, "--sentences": given.sentences, "--batches": given.batches}
    words = [word for name, value in options.items() for word in (name, *map(str, np.ravel(value)))]
    command = f"python bench/shortlist.py BUNDLE SOURCE REFERENCE {shlex.join(words)}"
    print(record("shortlist", figures, command=command, folder=given.out))


if __name__ == "__main__":
    main()
