"""The speed of translation on a GPU: ids in, ids out, with seeded random weights at forced length.

    python bench/gpu_translate.py base --work FOLDER [--budget 4m]

The networks are those of the recipes transformer-base and transformer-big with 32,000 pieces. Sources are
random pieces, their lengths drawn as in news, from 8 to 60; a translation has exactly as many pieces as its
source. So what is measured is how fast an engine computes, not how well anything is translated. A point is

    precision / sentences in a batch / greedy or beam (of 4)

and is measured with trmt in both ways, `graphs` and `direct`; some of them also with Hugging Face's
`generate` in the same precision and CTranslate2 in fp16, with the same weights, if they are installed. Each
engine is a process of its own, which is told how many sentences to translate: as many as take it about
--seconds. All engines take turns for --rounds rounds; medians count.

Before that come passes of warm-up. An engine that records CUDA graphs records one when it needs a size for
the second time: passes are repeated until nothing is recorded any more. How long that took is in the result.
trmt forces every sentence to its own length. The others force one length on a batch, that of its longest
sentence; neighbours in length are batched, and every piece they write counts.

Points that the result file has are not measured again; with --budget it stops in time, and goes on when it is
run again. --smoke is a tiny network and few sentences, on the CPU.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from budget import AGAIN, Budget, die_together, seconds
from gpu_networks import FORMATS, TOY, Network, Size
from peers.install import python_of
from provenance import RESULTS, provenance, read_json, record
from rounds import SPEED, ratio
from translators.client import Engine, Failed
from translators.server import How

OWN = ("graphs", "direct")
PEERS = tuple(FORMATS)
OTHER_PRECISIONS = {("ctranslate2", "bf16"): "fp16"}
NETWORKS = ("base", "big")
BEAM, PENALTY = 4, 0.6
BATCHES_AT_LEAST = 4  # in a pass
WARM_PASSES = 8  # at most
LEAST = 60.0  # seconds for which a point is worth beginning
GRACE = 5.0


@dataclass(frozen=True)
class Point:
    """One thing to measure."""

    compute: str
    batch: int
    search: str
    peers: bool = False

    def __str__(self) -> str:
        return f"{self.compute}/{self.batch}/{self.search}"

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that are measured there."""
        return (*OWN, *PEERS) if self.peers else OWN


POINTS = (
    Point("bf16", 32, "beam", peers=True),
    Point("bf16", 512, "beam", peers=True),
    Point("bf16", 1, "beam"),
    Point("bf16", 4096, "greedy"),
    Point("fp32", 32, "beam"),
    Point("fp32", 512, "beam"),
)
TOY_POINTS = (Point("fp32", 1, "beam"), Point("fp32", 8, "beam", peers=True), Point("fp32", 16, "greedy"))


# ---------------------------------------------------------------------------------------- who translates


class Crew:
    """The engines that run; one that cannot be started is not tried again."""

    def __init__(self, network: Network, given: argparse.Namespace) -> None:
        self.network, self.given = network, given
        self.running: dict[tuple[str, str], Engine] = {}
        self.unable: dict[tuple[str, str], str] = {}

    def get(self, name: str, compute: str) -> Engine:
        """An engine that has its sentences."""
        key = name, compute
        if key in self.unable:
            raise Failed(self.unable[key])
        if key not in self.running:
            try:
                self.running[key] = self._started(name, compute)
            except (Failed, OSError) as error:
                self.unable[key] = str(error)
                raise
        return self.running[key]

    def _started(self, name: str, compute: str) -> Engine:
        given, model = self.given, self.network.model(name)
        words = [str(model), compute, str(given.threads), given.device]
        own = name in OWN
        python = Path(sys.executable) if own or not given.peers else python_of(given.peers, name)
        log = self.network.work / f"{self.network.name}-{name}-{compute}.log"
        module, words = ("trmt_engine", [*words, name]) if own else (name, words)
        engine = Engine(python, module, words, threads=given.threads, log=log)
        engine.ask(sentences=str(self.network.sentences("ids" if own else "pieces")))
        return engine

    def dismiss(self, name: str, compute: str) -> None:
        """End an engine, if it runs."""
        if engine := self.running.pop((name, compute), None):
            engine.end()

    def keep(self, compute: str) -> None:
        """End all engines of other precisions: their memory is wanted."""
        for name, other in [*self.running]:
            if own_precision(name, compute) != other:
                self.dismiss(name, other)

    def close(self) -> None:
        for key in [*self.running]:
            self.dismiss(*key)


def own_precision(name: str, compute: str) -> str:
    """What an engine computes in where a point says `compute`."""
    return OTHER_PRECISIONS.get((name, compute), compute)


# ---------------------------------------------------------------------------------------------- a point


class Answers(Protocol):
    """What translates and says how long it took; `told` is what it said of itself."""

    told: dict[str, Any]

    def ask(self, **question: Any) -> dict[str, Any]: ...


class Lane:
    """One engine at one point."""

    def __init__(self, engine: Answers, how: How, *, most: int, seconds: float) -> None:
        self.engine, self.how, self.most, self.seconds = engine, how, most, seconds
        self.sentences = min(BATCHES_AT_LEAST * how.batch, most)
        self.warm: dict[str, Any] = {}
        self.runs: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        return self.engine.ask(calls=[(0, self.sentences)], how=asdict(self.how))

    def warm_up(self) -> None:
        """Passes until one takes long enough and has recorded no more than the one before it."""
        spent, passes, graphs, settled = 0.0, 0, -1, False
        while passes < WARM_PASSES and not settled:
            run = self.run()
            spent, passes = spent + run["seconds"], passes + 1
            wanted, recorded = self._wanted(run["seconds"]), run.get("graphs", 0)
            settled = wanted == self.sentences and recorded == graphs
            # With more sentences other sizes are met.
            graphs = recorded if wanted == self.sentences else -1
            self.sentences = wanted
        self.warm = {"warm_up_seconds": round(spent, 2), "warm_up_passes": passes, "settled": settled}

    def _wanted(self, taken: float) -> int:
        """So many sentences make a pass that is long enough: whole batches, but for the last of all."""
        if taken >= self.seconds / 2:
            return self.sentences
        batches = math.ceil(self.sentences * self.seconds / taken / self.how.batch)
        return min(batches * self.how.batch, self.most)

    def figures(self) -> dict[str, Any]:
        """Medians, and what the engine said of itself."""
        last = self.runs[-1]
        return {
            SPEED: round(median(run[SPEED] for run in self.runs), 1),
            "rounds": [round(run[SPEED], 1) for run in self.runs],
            "seconds": round(median(run["seconds"] for run in self.runs), 3),
            "sentences": self.sentences,
            "target_tokens": last["target_tokens"],
            **{key: last[key] for key in TOLD if key in last},
            **self.warm,
            **{key: self.engine.told[key] for key in ("version", "load_seconds")},
        }


TOLD = ("peak_device_mib", "peak_reserved_mib", "batching_tokens", "graphs", "fell_back")


def measure(point: Point, crew: Crew, given: argparse.Namespace, *, most: int) -> dict[str, Any]:
    """All rounds of one point; who fails is left out of what remains."""
    beam = BEAM if point.search == "beam" else 1
    how = How(beam=beam, batch=point.batch, penalty=PENALTY, mirrored=True)
    lanes: dict[str, Lane] = {}
    failed: dict[str, str] = {}
    crew.keep(point.compute)

    def attempt(name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except (Failed, OSError) as error:
            failed[name] = str(error)
            lanes.pop(name, None)
            crew.dismiss(name, own_precision(name, point.compute))

    def enter(name: str) -> None:
        engine = crew.get(name, own_precision(name, point.compute))
        lanes[name] = Lane(engine, how, most=most, seconds=given.seconds)
        lanes[name].warm_up()

    for name in point.engines:
        if name in given.engines:
            attempt(name, lambda name=name: enter(name))
    for number in range(given.rounds):
        for name in turned([*lanes], number):
            attempt(name, lambda lane=lanes[name]: lane.runs.append(lane.run()))
    return summed_up(point, lanes, failed)


def turned(names: list[str], number: int) -> list[str]:
    """The names, beginning with another one each time."""
    turn = number % max(len(names), 1)
    return [*names[turn:], *names[:turn]]


def summed_up(point: Point, lanes: Mapping[str, Lane], failed: Mapping[str, str]) -> dict[str, Any]:
    """What a point's result is."""
    engines: dict[str, Any] = {name: {"failed": why} for name, why in failed.items()}
    for name, lane in lanes.items():
        engines[name] = {"compute": own_precision(name, point.compute), **lane.figures()}
    ratios = {
        name: ratio(lanes["graphs"].runs, lane.runs)
        for name, lane in lanes.items()
        if name != "graphs" and "graphs" in lanes
    }
    return {"engines": {name: engines[name] for name in point.engines if name in engines}, "ratios": ratios}


def tell(point: Point, found: Mapping[str, Any]) -> None:
    parts = [f"{point}:"]
    for name, one in found["engines"].items():
        parts.append(f"{name} {one[SPEED]:,.0f}" if SPEED in one else f"{name} failed: {one['failed']}")
        if why := one.get("fell_back"):
            parts.append(f"(fell back: {why})")
    print(*parts, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------ the program


class Results:
    """The result file: what it has of the same measurement is kept."""

    def __init__(self, given: argparse.Namespace, about: Mapping[str, Any]) -> None:
        self.name, self.folder = f"translate-{given.network}", given.out
        self.command = f"python bench/gpu_translate.py {given.network}"
        self.figures: dict[str, Any] = {**about, "points": {}}
        path = self.folder / f"{self.name}.json"
        before = (read_json(path) or {}).get("figures", {})
        if {**before, "points": {}} == self.figures:
            self.figures = before
        elif before:
            print(f"{path} is of another measurement: all of it is measured anew", file=sys.stderr)

    def lacks(self, points: Sequence[Point]) -> list[Point]:
        """The points at which nothing has been measured."""
        found = self.figures["points"]
        return [point for point in points if not self._has(found.get(str(point), {"engines": {}}))]

    @staticmethod
    def _has(found: Mapping[str, Any]) -> bool:
        return any(SPEED in one for one in found["engines"].values())

    def add(self, point: Point, found: Mapping[str, Any]) -> None:
        at = {"commit": provenance()["commit"], "date": time.strftime("%Y-%m-%d")}
        self.figures["points"][str(point)] = {**found, **at}
        record(self.name, self.figures, command=self.command, folder=self.folder)


def main() -> None:
    given = arguments()
    size, points, least = (TOY, TOY_POINTS, 0.0) if given.smoke else (Size(), POINTS, LEAST)
    chosen = [each for each in points if any(fnmatch.fnmatch(str(each), one) for one in given.points)]
    budget = Budget(seconds(given.budget), grace=GRACE) if given.budget else Budget()
    with tempfile.TemporaryDirectory() as scratch:
        network = Network(given.network, (given.work or Path(scratch)).resolve(), size)
        about = {"device": given.device.partition(":")[0], "rounds": given.rounds, "seconds": given.seconds}
        results = Results(given, network.about() | about)
        if results.lacks(chosen):
            network.prepare()
        with closing(Crew(network, given)) as crew:
            for point in results.lacks(chosen):
                if budget.left() < least:
                    raise SystemExit(AGAIN)
                found = measure(point, crew, given, most=size.sentences)
                tell(point, found)
                results.add(point, found)
    if failed := results.lacks(chosen):
        raise SystemExit(f"nothing could be measured at {', '.join(map(str, failed))}; the result says why")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure translation on a GPU, and that of other engines.")
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 4), help="of each engine")
    parser.add_argument("--points", nargs="+", default=["*"], help="patterns such as 'bf16/*/beam'")
    parser.add_argument("--engines", nargs="+", choices=(*OWN, *PEERS), default=[*OWN, *PEERS])
    parser.add_argument("--peers", type=Path, help="what bench/peers/install.py made (the same Python)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="that a pass takes, about")
    parser.add_argument("--budget", help="stop in good time before this has passed, such as 4m")
    parser.add_argument("--work", type=Path, help="where networks are kept (a temporary folder)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, for the CPU")
    return parser.parse_args()


if __name__ == "__main__":
    die_together()
    main()
