"""Measures the claims that everybody repeats about translation networks: which hold here, and which do not.

    python bench/lineage.py [--seeds 3] [--at-once 2] [--budget 9m] [--work FOLDER]
    python bench/lineage.py --scale multi30k --corpus FOLDER --device cuda [--at-once 5]

Every system (bench/claims/systems.py) is trained on the same data with the same budget of steps, once for
each seed, and serves all claims (bench/claims/sayings.py) that ask for it. By itself the data are sentences of
the phrasebook, several in a row, and everything takes less than an hour of two CPU cores; FOLDER holds
Multi30k, as bench/multi30k.py says. What is done is not repeated: ended at any moment, the same command goes
on, and inside a run from its checkpoint. --runs 1 does one run more, --only names systems, --speed measures
speed, which wants a machine with nothing else to do.

The result says of each claim what is known by now; `python bench/readme.py` makes docs/claims.md from it, and
--figures draws its pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from budget import AGAIN, Budget, OutOfTime, seconds
from claims import computed, data, sayings, speed, verdicts
from claims.run import RESULT, place_of
from claims.scale import SCALES, Scale
from claims.systems import ALL, BERT, BY_NAME, System
from provenance import RESULTS, ROOT, record

RUN = str(ROOT / "bench" / "claims" / "run.py")
Job = tuple[System, int]


def main() -> None:
    given = arguments()
    scale = SCALES[given.scale]
    work = (given.work or ROOT / "models" / f"lineage-{scale.name}").resolve()
    budget = Budget(seconds(given.budget))
    jobs = [(BY_NAME[name], seed) for name in given.only for seed in range(1, given.seeds + 1)]
    if given.speed:
        measure_speed(work, scale, given, budget)
    else:
        train(jobs, work, scale, given, budget)
    figures = found(work, scale, given.seeds)
    print(record(result_name(scale), figures, command=command(given), folder=given.out))
    if any(not done(work, job) for job in jobs) or rounds_left(work, scale):
        raise SystemExit(AGAIN)


def arguments() -> argparse.Namespace:
    names = [system.name for system in ALL]
    parser = argparse.ArgumentParser(description="Measure what is said of translation networks.")
    parser.add_argument("--scale", choices=list(SCALES), default="phrasebook")
    parser.add_argument("--corpus", type=Path, help="the folder of Multi30k, for --scale multi30k")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these systems alone")
    parser.add_argument("--speed", action="store_true", help="rounds of measuring speed, instead of training")
    parser.add_argument("--runs", type=int, default=0, help="so many more runs or rounds; 0: all")
    parser.add_argument("--at-once", type=int, default=1, help="so many runs beside one another")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", default="24h", help="stop in good time before this has passed: 9m, 540s")
    parser.add_argument("--work", type=Path, help="where runs are kept [default: in models/]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result")
    given = parser.parse_args()
    if not SCALES[given.scale].templates and not given.corpus:
        parser.error(f"--scale {given.scale} needs --corpus")
    return given


def command(given: argparse.Namespace) -> str:
    """What has to be called to get the result, folders aside."""
    words = ["python bench/lineage.py"]
    if given.scale != "phrasebook":
        words.append(f"--scale {given.scale} --corpus FOLDER --device {given.device}")
    return " ".join([*words, f"--seeds {given.seeds}"])


def result_name(scale: Scale) -> str:
    return "lineage" if scale.name == "phrasebook" else f"lineage-{scale.name}"


# ------------------------------------------------------------------------------------- runs


def done(work: Path, job: Job) -> bool:
    return (place_of(work, job[0].name, job[1]) / RESULT).exists()


def train(jobs: list[Job], work: Path, scale: Scale, given: argparse.Namespace, budget: Budget) -> None:
    """As many of the jobs that are left as wanted, or as there is time for."""
    left = in_order([job for job in jobs if not done(work, job)])[: given.runs or None]
    for seed in sorted({seed for _, seed in left}):
        data.prepare(work, seed, scale, given.corpus)

    def attempt(job: Job) -> None:
        system, seed = job
        words = [str(work), system.name, str(seed), "--scale", scale.name, "--device", given.device]
        log = work / f"seed-{seed}" / f"{system.name}.log"
        with suppress(OutOfTime):
            budget.run([sys.executable, RUN, *words], log=log, cwd=ROOT)
            print(f"{system.name}, seed {seed}: done", file=sys.stderr, flush=True)

    beginnings = [job for job in left if job[0].start != BERT]
    for some in (beginnings, left[len(beginnings) :]):
        with ThreadPoolExecutor(max_workers=given.at_once) as threads:
            list(threads.map(attempt, some))


def in_order(jobs: list[Job]) -> list[Job]:
    """The jobs with those last that begin with another's network."""
    return sorted(jobs, key=lambda job: job[0].start == BERT)


# ------------------------------------------------------------------------------------ speed


def rounds_left(work: Path, scale: Scale) -> list[int]:
    return [number for number in range(1, scale.rounds + 1) if not speed.path(work, number).exists()]


def measure_speed(work: Path, scale: Scale, given: argparse.Namespace, budget: Budget) -> None:
    """As many rounds as wanted, or as there is time for."""
    import torch

    if given.device == "cpu":
        torch.set_num_threads(1)
    for number in rounds_left(work, scale)[: given.runs or None]:
        if budget.left() <= 0:
            return
        speed.measure(work, number, scale, device=given.device)
        print(f"speed, round {number}: done", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------- result


def found(work: Path, scale: Scale, seeds: int) -> dict[str, Any]:
    """Everything that is known by now, and the verdicts that follow from it."""
    jobs = [(system, seed) for system in ALL for seed in range(1, seeds + 1)]
    results = [place_of(work, system.name, seed) / RESULT for system, seed in jobs]
    runs = [json.loads(result.read_bytes()) for result in results if result.exists()]
    figures: dict[str, Any] = {
        "scale": scale.name,
        "seeds": seeds,
        "runs": runs,
        "speed": speed.read(work, scale),
        "computed": computed.values(),
    }
    evidence = sayings.evidence(figures)
    figures["claims"] = {
        claim.name: [verdicts.as_tree(verdicts.judged(contrast, evidence)) for contrast in claim.contrasts]
        for claim in sayings.claims(scale)
    }
    return figures


if __name__ == "__main__":
    main()
