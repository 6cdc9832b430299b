"""Measures the claims that everybody repeats about translation networks: which hold here, and which do not.

    python bench/lineage.py [--seeds 3] [--at-once 2] [--budget 9m] [--work FOLDER]
    python bench/lineage.py --scale multi30k --corpus FOLDER --device cuda [--at-once 5]

Every system (bench/claims/systems.py) is trained on the same data with the same budget of steps, once for
each seed, and serves all claims (bench/claims/on_*.py) that ask for it. By itself the data are sentences
of the phrasebook, several in a row, and sizes are chosen for about an hour of two CPU cores; FOLDER holds
Multi30k, as bench/multi30k.py says. What is done is not repeated: ended at any moment, the same command goes
on, and inside a run from its checkpoint. --runs 1 does one run more, --only names systems, --part speed
measures speed alone, which wants a machine with nothing else to do.

The result says of each claim what is known by now. `python bench/claims/figures.py` draws its pictures, and
`python bench/readme.py` writes docs/claims.md.
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
from experiment import write_lines
from provenance import RESULTS, ROOT, record

RUN = str(ROOT / "bench" / "claims" / "run.py")
Job = tuple[System, int]


def main() -> None:
    given = arguments()
    scale = SCALES[given.scale]
    work = (given.work or ROOT / "models" / f"lineage-{scale.name}").resolve()
    budget = Budget(seconds(given.budget))
    jobs = [(BY_NAME[name], seed) for name in given.only for seed in range(1, given.seeds + 1)]
    name = given.name or ("lineage" if scale.name == "phrasebook" else f"lineage-{scale.name}")
    if given.keep:
        take_over(given.out / f"{name}.json", work)
    if given.part != "speed":
        train(jobs, work, scale, given, budget)
    if given.part != "runs":
        measure_speed(work, scale, given, budget)
    figures = found(work, scale, given.seeds)
    print(record(name, figures, command=command(given), folder=given.out))
    left = given.part != "speed" and any(not done(work, job) for job in jobs)
    if left or (given.part != "runs" and rounds_left(work, scale)):
        raise SystemExit(AGAIN)


def arguments() -> argparse.Namespace:
    names = [system.name for system in ALL]
    parser = argparse.ArgumentParser(description="Measure what is said of translation networks.")
    parser.add_argument("--scale", choices=list(SCALES), default="phrasebook")
    parser.add_argument("--corpus", type=Path, help="the folder of Multi30k, for --scale multi30k")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these systems alone")
    parser.add_argument("--part", choices=("all", "runs", "speed"), default="all")
    parser.add_argument("--runs", type=int, default=0, help="so many more runs or rounds; 0: all")
    parser.add_argument("--at-once", type=int, default=1, help="so many runs beside one another")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", default="24h", help="stop in good time before this has passed: 9m, 540s")
    parser.add_argument("--work", type=Path, help="where runs are kept [default: in models/]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the result")
    parser.add_argument("--name", help="of the result [default: that of the scale]")
    parser.add_argument("--keep", action="store_true", help="runs that a result in --out has are done")
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


# ------------------------------------------------------------------------------------- runs


def done(work: Path, job: Job) -> bool:
    return (place_of(work, job[0].name, job[1]) / RESULT).exists()


def take_over(path: Path, work: Path) -> None:
    """The runs of an earlier result, where their folders are long gone; BERT's network would be missed."""
    runs = json.loads(path.read_bytes())["figures"]["runs"] if path.exists() else []
    for run in runs:
        place = place_of(work, run["system"], run["seed"])
        if run["system"] != BERT and not place.exists():
            place.mkdir(parents=True)
            write_lines(place / RESULT, [json.dumps(run, ensure_ascii=False)])


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
    measured = {"speed": speed.read(work, scale), "computed": computed.values()}
    return with_verdicts({"scale": scale.name, "seeds": seeds, "runs": runs, **measured})


def with_verdicts(figures: dict[str, Any]) -> dict[str, Any]:
    """The same with what they say of each claim."""
    evidence = sayings.evidence(figures)
    judged = {
        claim.name: [verdicts.as_tree(verdicts.judged(contrast, evidence)) for contrast in claim.contrasts]
        for claim in sayings.claims(sayings.scale_of(figures))
    }
    return {**figures, "claims": judged}


if __name__ == "__main__":
    main()
