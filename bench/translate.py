"""Measures translation on the CPU, and that of other engines with the same weights.

    python bench/translate.py BUNDLE SOURCE REFERENCE --peers FOLDER --points 'trained/*/1/*' --pairs 7

BUNDLE is a trained network, SOURCE and REFERENCE a test set for it; they make the points called `trained`.
The points called `base` and `deep` are networks of 6+6 and 12+1 layers of 512 with 32,000 pieces and seeded
random weights, which translate random sentences of 30 pieces into exactly 30: they say how fast an engine
computes, not how well it translates. FOLDER is what `bench/peers/install.py` made. A point is

    network / fp32 or int8 / sentences in a batch, or whole / greedy or beam / threads

and `--points` takes patterns of them. Each engine has the network in a process of its own that is told again
and again to translate the same calls: in every round all engines, one after the other, beginning with
another one each time, so that what else happens on the machine meets all of them. A batch is one call with so
many sentences; `whole` is one call with all sentences, which every engine sorts and cuts as it likes best:
the size of its batches is tried out before. Results of earlier calls for other points are kept.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from peers.install import python_of
from provenance import RESULTS, ROOT, provenance, record
from rounds import ratio
from translators.client import Engine, Failed
from translators.server import How

ENGINES = {"trmt": "", "ctranslate2": "ctranslate2", "transformers": "huggingface"}  # and `trmt export --to`
BATCHES = ("1", "16", "64", "whole")
SEARCHES = {"greedy": 1, "beam": 4}
RANDOM = {"base": (6, 6), "deep": (12, 1)}
VOCABULARY, WIDTH, FEED_FORWARD, HEADS = 32_000, 512, 2048, 8
FORCED = 30  # pieces of a random source, and of its translation
WHOLE = 128  # random sentences in a file
SIZES = (16, 32, 64, 128)  # batches tried for a whole file
PENALTY = 0.6


@dataclass(frozen=True)
class Point:
    """One thing to measure."""

    network: str
    compute: str
    batch: str
    search: str
    threads: int

    def __str__(self) -> str:
        return "/".join(map(str, vars(self).values()))


@dataclass(frozen=True)
class Network:
    """What is translated with, and what."""

    bundle: Path
    sentences: list[list[str]]
    references: list[str]  # none where the weights are random
    forced: int

    @property
    def power(self) -> float:
        """What a power of the length must be to change as the length penalty does at the usual length."""
        mean = sum(map(len, self.sentences)) / len(self.sentences)
        return round(PENALTY * mean / (5 + mean), 2)


# --------------------------------------------------------------------------------- networks


def random_network(name: str, work: Path) -> Network:
    """A bundle with seeded random weights, and random sentences."""
    import torch

    from synthetic import word_tokenizer
    from trmt.bundles import bundles
    from trmt.nets.transformer import Transformer, TransformerConfig

    tokenizer = word_tokenizer(VOCABULARY)
    bundle = work / name / "trmt-fp32"
    if not bundle.exists():
        encoder, decoder = RANDOM[name]
        torch.manual_seed(1)
        net = Transformer(
            TransformerConfig(
                source_vocabulary=VOCABULARY,
                target_vocabulary=VOCABULARY,
                d_model=WIDTH,
                feed_forward=FEED_FORWARD,
                heads=HEADS,
                encoder_layers=encoder,
                decoder_layers=decoder,
            )
        )
        longest = {"source": 256, "target": 256}
        manifest = bundles.make_manifest(net, "transformer", tokenizer, longest=longest)
        bundles.save_bundle(bundle, manifest, net.state_dict(), tokenizer)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (WHOLE, FORCED), generator=generator).tolist()
    return Network(bundle, [tokenizer.source.pieces(row) for row in ids], [], FORCED)


def trained_network(bundle: Path, source: Path, reference: Path) -> Network:
    """A bundle and a test set."""
    from trmt.text.tokenizer import Tokenizer

    side = Tokenizer.load(bundle / "tokenizer").source
    texts, references = ([*path.read_text(encoding="utf-8").splitlines()] for path in (source, reference))
    assert len(texts) == len(references), "a test set has a reference for each line"
    return Network(bundle, [side.pieces(ids) for ids in side.encode(texts)], references, 0)


def model_of(network: Network, engine: str, compute: str, work: Path) -> Path:
    """The network as this engine reads it, made if it is not there."""
    if engine == "trmt" and compute == "fp32":
        return network.bundle
    # The others make int8 weights of fp32 ones when they load them.
    kind = f"{engine}-int8" if engine == "trmt" else engine
    folder = work / kind
    if not folder.exists():
        words = ["quantize"] if engine == "trmt" else ["export", "--to", ENGINES[engine]]
        command = [sys.executable, "-m", "trmt", *words, str(network.bundle), "--out", str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise Failed(done.stderr.strip().splitlines()[-1])
    return folder


# ---------------------------------------------------------------------------------- a point


def calls_of(point: Point, network: Network) -> list[tuple[int, int]]:
    """Where each call of a point begins and ends."""
    count = len(network.sentences)
    size = count if point.batch == "whole" else int(point.batch)
    return [(begin, begin + size) for begin in range(0, count - size + 1, size)]


def measure(
    point: Point, network: Network, engines: Mapping[str, Engine], given: argparse.Namespace
) -> dict[str, Any]:
    """All rounds of one point."""
    how = How(
        beam=SEARCHES[point.search],
        batch=int(point.batch) if point.batch != "whole" else SIZES[-1],
        penalty=PENALTY,
        power=network.power,
        forced=network.forced,
    )
    hows = dict.fromkeys(engines, how)
    calls = calls_of(point, network)
    warm: dict[str, Any] = {}
    for name, engine in engines.items():
        tried = SIZES if point.batch == "whole" and name != "transformers" else (how.batch,)
        runs = {}
        for size in tried:
            hows[name] = How(**{**asdict(how), "batch": size})
            runs[size] = engine.ask(calls=calls, how=asdict(hows[name]), seconds=given.seconds)
        best = min(runs, key=lambda size: runs[size]["seconds"] / runs[size]["calls"])
        hows[name] = How(**{**asdict(how), "batch": best})
        warm[name] = runs[best]
    calls = calls[: warm["trmt"]["calls"]]
    runs_of: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    shown: dict[str, list[list[str]]] = {}
    for number in range(given.pairs):
        turn = number % len(engines)
        names = [*engines]
        for name in [*names[turn:], *names[:turn]]:
            run = engines[name].ask(calls=calls, how=asdict(hows[name]), show=number == 0)
            if number == 0:
                shown[name] = run.pop("translations")
            runs_of[name].append(run)
    return summed_up(point, network, runs_of, shown, hows) | {"calls": len(calls)}


def summed_up(
    point: Point,
    network: Network,
    runs_of: Mapping[str, list[dict[str, Any]]],
    shown: Mapping[str, list[list[str]]],
    hows: Mapping[str, How],
) -> dict[str, Any]:
    """Medians, ratios, scores."""
    found: dict[str, Any] = {"engines": {}, "ratios": {}, "ratios_by_cpu_time": {}}
    for name, runs in runs_of.items():
        one = {key: round(median(run[key] for run in runs), 4) for key in runs[0] if key != "calls"}
        one["batch"] = hows[name].batch
        one["same_as_trmt"] = round(
            sum(mine == theirs for mine, theirs in zip(shown["trmt"], shown[name], strict=True))
            / len(shown[name]),
            3,
        )
        if network.references:
            one["chrf"] = chrf(network, shown[name])
        found["engines"][name] = one
        if name != "trmt":
            found["ratios"][name] = ratio(runs_of["trmt"], runs)
            found["ratios_by_cpu_time"][name] = ratio(
                runs_of["trmt"], runs, key="target_tokens_per_cpu_second"
            )
    return found


def chrf(network: Network, translations: Sequence[list[str]]) -> dict[str, Any]:
    """The score of the first sentences' translations."""
    import sacrebleu

    from trmt.text.tokenizer import Tokenizer

    side = Tokenizer.load(network.bundle / "tokenizer").target
    ids = {piece: number for number, piece in enumerate(side.pieces(range(side.vocabulary)))}
    texts = [side.decode([ids[piece] for piece in pieces]) for pieces in translations]
    metric = sacrebleu.CHRF()
    score = metric.corpus_score(texts, [network.references[: len(texts)]])
    return {
        "value": round(score.score, 2),
        "signature": str(metric.get_signature()),
        "sentences": len(texts),
    }


# ------------------------------------------------------------------------------ the program


def points_of(patterns: Sequence[str], networks: Sequence[str], cores: int) -> list[Point]:
    """Those that a pattern asks for, with the same network beside one another."""
    threads = sorted({1, cores})
    every = itertools.product(networks, ("fp32", "int8"), BATCHES, SEARCHES, threads)
    points = [Point(*one) for one in every]
    return [point for point in points if any(fnmatch.fnmatch(str(point), one) for one in patterns)]


def run(given: argparse.Namespace, work: Path) -> Iterator[tuple[Point, dict[str, Any]]]:
    names = [*(["trained"] if given.bundle else []), *RANDOM]
    points = points_of(given.points, names, os.cpu_count() or 1)
    if not points:
        raise SystemExit("no point is called so")
    for (name, compute, threads), group in itertools.groupby(
        sorted(points, key=lambda one: (one.network, one.compute, one.threads)),
        key=lambda one: (one.network, one.compute, one.threads),
    ):
        place = work / name
        place.mkdir(parents=True, exist_ok=True)
        network = (
            trained_network(given.bundle, given.source, given.reference)
            if name == "trained"
            else random_network(name, work)
        )
        asked = place / "sentences.json"
        asked.write_text(json.dumps(network.sentences), encoding="utf-8")
        todo = [*group]
        engines, failed = started(given, network, todo[0], place)
        for engine in engines.values():
            engine.ask(sentences=str(asked))
        try:
            if "trmt" not in engines:
                print(f"{name}/{compute}/*/*/{threads}: {failed['trmt']}", file=sys.stderr)
                continue
            for point in todo:
                found = measure(point, network, engines, given)
                told = {name: engine.told for name, engine in engines.items()}
                for engine, one in found["engines"].items():
                    one |= told[engine]
                found["failed"] = failed
                tell(point, found)
                yield point, found
        finally:
            for engine in engines.values():
                engine.end()


def started(
    given: argparse.Namespace, network: Network, point: Point, place: Path
) -> tuple[dict[str, Engine], dict[str, str]]:
    """The engines that can do these points, and why the others cannot."""
    engines, failed = {}, {}
    for name in given.engines:
        if name == "transformers" and point.compute == "int8":
            continue
        if name == "trmt":
            python = Path(sys.executable)
        elif given.peers:
            python = python_of(given.peers, name)
        else:
            continue
        try:
            model = model_of(network, name, point.compute, place)
            words = [str(model), point.compute, str(point.threads)]
            engines[name] = Engine(python, name, words, threads=point.threads, log=place / f"{name}.log")
        except (Failed, OSError) as error:
            failed[name] = str(error)
    return engines, failed


def tell(point: Point, found: Mapping[str, Any]) -> None:
    parts = [f"{point}:"]
    for name, one in found["engines"].items():
        parts.append(f"{name} {one['target_tokens_per_second']:,.0f}")
        if times := found["ratios"].get(name):
            parts.append(f"(trmt {times['median']:.2f} {times['interval']})")
    print(*parts, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure translation, and that of other engines.")
    parser.add_argument("bundle", type=Path, nargs="?", help="a trained network")
    parser.add_argument("source", type=Path, nargs="?", help="sentences to translate with it")
    parser.add_argument("reference", type=Path, nargs="?", help="their translations")
    parser.add_argument("--peers", type=Path, help="what bench/peers/install.py made; none: trmt alone")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--points", nargs="+", default=["*"], help="patterns such as 'base/fp32/16/*/1'")
    parser.add_argument("--pairs", type=int, default=7, help="rounds of all engines")
    parser.add_argument("--seconds", type=float, default=0.5, help="of trmt's part of a round, about")
    parser.add_argument("--work", type=Path, help="scratch folder to keep (a temporary one)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result")
    parser.add_argument("--name", default="translate", help="of the result file")
    given = parser.parse_args()
    if given.bundle and not given.reference:
        parser.error("a trained network needs SOURCE and REFERENCE")
    path = given.out / f"{given.name}.json"
    kept = json.loads(path.read_bytes())["figures"]["points"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for point, found in run(given, (given.work or Path(scratch)).resolve()):
            at = {"commit": provenance()["commit"], "date": time.strftime("%Y-%m-%d")}
            kept[str(point)] = found | at
            words = shlex.join(_words(given))
            figures = {"penalty": PENALTY, "forced": FORCED, "pairs": given.pairs, "points": kept}
            record(given.name, figures, command=f"python bench/translate.py {words}", folder=given.out)


def _words(given: argparse.Namespace) -> list[str]:
    """The command line without the folders of this machine."""
    names = ("bundle", "source", "reference", "peers", "work", "out")
    hidden = {str(getattr(given, name)): name.upper() for name in names if getattr(given, name)}
    return [hidden.get(word, word) for word in sys.argv[1:]]


if __name__ == "__main__":
    main()
