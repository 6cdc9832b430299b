"""Measures training, and that of other toolkits: target tokens per second, share of the machine's arithmetic.

    python bench/train.py DATA_SET --peers FOLDER --rounds 5 --threads 2

DATA_SET is what `trmt prepare` wrote, with a joint tokenizer; FOLDER what `bench/peers/install.py` made. In
each round every toolkit trains in a process of its own, one after the other, beginning with another one each
time, and the machine's matrix products are measured beside them; each process warms up before its window
opens. What is counted, and how, is in `peers/probe.py`; how each toolkit was told to train the same network
is in `peers/<toolkit>.py` and, word for word, in the result. A toolkit that fails is in the result with the
end of its log.

The set that the table in README is measured on is made of Multi30k (German to English) like this:

    trmt tokenizer --train FOLDER/train --from de --to en --size 8000
    trmt prepare --train FOLDER/train --dev FOLDER/val

Without DATA_SET a synthetic one is made (`--pairs`, and the vocabulary of `--preset`). On a GPU:

    python bench/train.py --device cuda --precision bf16 --preset base --batch-tokens 32768
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peers.install import python_of
from peers.job import Job, Shape
from provenance import ROOT, record, without_places
from rounds import per_second, summed_up, table

# Toolkit: the distribution that is compared.
TOOLKITS = {
    "fairseq": "",  # a checkout: its commit is told instead
    "joeynmt": "joeynmt",
    "eole": "eole",
    "opennmt": "OpenNMT-py",
    "sockeye": "sockeye",
    "transformers": "transformers",
}
PRESETS = {
    "small": Shape(),
    "base": Shape(
        width=512, feed_forward=2048, heads=8, encoder_layers=6, decoder_layers=6, vocabulary=32000
    ),
    "big": Shape(
        width=1024,
        feed_forward=4096,
        heads=16,
        encoder_layers=6,
        decoder_layers=6,
        vocabulary=32000,
        dropout=0.3,
    ),
}
LOG_LINES = 15  # of a failed process's log that the result keeps
STARTUP = 900.0  # seconds that a process may take beside its warm-up and window


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What to measure: `measure` takes it."""

    data_set: Path
    work: Path  # scratch folder; what toolkits prepare is kept there from call to call
    shape: Shape = field(default_factory=Shape)
    peers: Path | None = None  # folder of environments; none: trmt alone
    toolkits: tuple[str, ...] = tuple(TOOLKITS)
    recipe: str = ""  # trmt trains this instead of `shape`, and then alone
    rounds: int = 5
    threads: int = 2
    device: str = "cpu"
    precision: str = "fp32"
    batch_tokens: int = 4096
    warmup_updates: int = 5
    warmup_seconds: float = 5.0
    seconds: float = 30.0
    options: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # toolkit: its own options


def measure(spec: Spec, keep: Callable[[dict[str, Any]], object] | None = None) -> dict[str, Any]:
    """All rounds of all toolkits, and what they add up to; `keep` gets that after each round."""
    from peers import corpus

    spec.work.mkdir(parents=True, exist_ok=True)
    names = ["trmt", *(spec.toolkits if spec.peers else ())]
    if len(names) > 1:
        corpus.write(spec.data_set, spec.work / "corpus")
    shape, real_tokens = _plan(spec)
    jobs = {name: _job(spec, name, shape, real_tokens) for name in names}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in names:
        if error := prepare(jobs[name], _python(spec, name), name):
            runs[name].append({"error": error})
    products = []
    for number in range(spec.rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            if any("error" in run for run in runs[name]):
                continue
            load, before = os.getloadavg()[0], _products(spec, shape) if name == "trmt" else None
            run = train(replace(jobs[name], seed=number + 1), _python(spec, name), name)
            if before:
                # The machine's speed drifts: the better of two, one on either side of the training.
                products.append(max(before, _products(spec, shape), key=lambda found: found["peak"]))
            runs[name].append({**run, "load_before": round(load, 2)})
            _tell(number, name, run)
        if keep:
            keep(_figures(spec, shape, runs, products) | {"rounds": number + 1})
    return _figures(spec, shape, runs, products)


def _figures(
    spec: Spec, shape: Shape, runs: dict[str, list[dict[str, Any]]], products: list[dict[str, Any]]
) -> dict[str, Any]:
    figures = summed_up(runs, products)
    for name in runs:
        figures["toolkits"][name] = {"version": _version(spec, name), **figures["toolkits"][name]}
    return _settings(spec, shape) | figures


def _settings(spec: Spec, shape: Shape) -> dict[str, Any]:
    return {
        "data": _data(spec.data_set),
        "shape": asdict(shape),
        "recipe": spec.recipe or None,
        "device": spec.device,
        "device_name": _device_name(spec.device),
        "precision": spec.precision,
        "threads": spec.threads,
        "batch_tokens": spec.batch_tokens,
        "rounds": spec.rounds,
        "window_seconds": spec.seconds,
    }


def _data(data_set: Path) -> dict[str, Any]:
    from trmt.sets.shards import PreparedSet

    data = PreparedSet.open(data_set)
    split = data.index["splits"]["train"]
    return {"languages": data.languages, "pairs": split["pairs"], "pieces": split["values"]}


def _device_name(device: str) -> str | None:
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.get_device_name(device)


def _plan(spec: Spec) -> tuple[Shape, int]:
    """The network's sizes with the data's vocabulary, and the real target tokens in a batch of trmt's."""
    from trmt.registry import ARCHITECTURES, resolve
    from trmt.sets.batches import BatchConfig, Batches
    from trmt.sets.shards import PreparedSet

    data, architecture = PreparedSet.open(spec.data_set), "transformer"
    shape = replace(spec.shape, vocabulary=max(data.index["vocabulary"]))
    tokens = spec.batch_tokens
    if spec.recipe:
        from trmt.training.recipe import load_recipe

        recipe = load_recipe(spec.recipe, network={"source_vocabulary": 1, "target_vocabulary": 1})
        names = ("feed_forward", "heads", "encoder_layers", "decoder_layers", "dropout")
        sizes = {name: recipe.network[name] for name in names if name in recipe.network}
        shape = replace(shape, width=recipe.network.get("d_model", shape.width), **sizes)
        tokens, architecture = recipe.batches.tokens, recipe.architecture
    padding_free = bool(resolve(ARCHITECTURES, architecture).packs_tokens)
    batches = Batches(data, BatchConfig(tokens=tokens), seed=1, padding_free=padding_free)
    real = int(batches.target_lengths.sum()) + len(batches.target_lengths)
    return shape, round(real / len(batches.plan(0)))


def _job(spec: Spec, name: str, shape: Shape, real_tokens: int) -> Job:
    work = spec.work / name
    return Job(
        corpus=str((spec.work / "corpus").resolve()),
        work=str(work.resolve()),
        report=str((work / "report.json").resolve()),
        shape=shape,
        data_set=str(spec.data_set.resolve()),
        recipe=spec.recipe,
        batch_tokens=spec.batch_tokens,
        real_tokens=real_tokens,
        threads=spec.threads,
        device=spec.device,
        precision=spec.precision,
        warmup_updates=spec.warmup_updates,
        warmup_seconds=spec.warmup_seconds,
        seconds=spec.seconds,
        options=dict(spec.options.get(name, {})),
    )


def _python(spec: Spec, name: str) -> Path:
    return Path(sys.executable) if name == "trmt" or not spec.peers else python_of(spec.peers.resolve(), name)


# One process


def prepare(job: Job, python: Path, name: str) -> str | None:
    """Let a toolkit make its own format of the corpus, unless it has; an error as text."""
    work = Path(job.work)
    stamp = work / "prepared.json"
    corpus = Path(job.corpus) / "fingerprint"
    made_from = [corpus.read_text() if corpus.is_file() else "", job.shape.vocabulary, job.device]
    if stamp.is_file() and json.loads(stamp.read_bytes()) == made_from:
        return None
    code, log = _run(job, python, name, stage="prepare")
    if code:
        return f"preparing failed ({code}): {log}"
    stamp.write_text(json.dumps(made_from), encoding="utf-8")
    return None


def train(job: Job, python: Path, name: str) -> dict[str, Any]:
    """What the probe reported of one training process, or an `error`."""
    Path(job.report).unlink(missing_ok=True)
    code, log = _run(job, python, name, stage="train")
    try:
        report: dict[str, Any] = json.loads(Path(job.report).read_bytes())
    except (OSError, ValueError):
        return {"error": f"training failed ({code}): {log}"}
    return report | per_second(report, job.shape)


def _run(job: Job, python: Path, name: str, *, stage: str) -> tuple[int | str, str]:
    """Exit status and the end of the log of `python -m peers.NAME STAGE`."""
    work = Path(job.work)
    work.mkdir(parents=True, exist_ok=True)
    job.write(work / "job.json")
    threads = str(job.threads)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "bench"), *([str(ROOT)] if name == "trmt" else [])]),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": threads,
        "GOMP_SPINCOUNT": "10000",  # what trmt sets for itself: beside a busy program everyone gains by it
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
    }
    log = work / f"{stage}.log"
    with log.open("wb") as stream:
        try:
            code: int | str = subprocess.run(
                [str(python), "-m", f"peers.{name}", stage, str((work / "job.json").resolve())],
                cwd=work,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=STARTUP + job.warmup_seconds + 10 * job.seconds,
            ).returncode
        except subprocess.TimeoutExpired:
            code = "it took too long"
        except OSError as error:
            code = str(error)
    return code, "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def _products(spec: Spec, shape: Shape) -> dict[str, Any]:
    """The machine's matrix products at this moment, measured in a process of its own."""
    command = [sys.executable, str(ROOT / "bench" / "arithmetic.py"), "--device", spec.device]
    command += ["--precision", spec.precision, "--shape", json.dumps(asdict(shape))]
    command += ["--rows", str(spec.batch_tokens)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(spec.threads), "MKL_NUM_THREADS": str(spec.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _tell(number: int, name: str, run: Mapping[str, Any]) -> None:
    if "error" in run:
        what = run["error"]
    else:
        speed, update = run["target_tokens_per_second"], run["target_tokens_per_update"]
        what = f"{speed:,.0f} target tokens/s, {update:,} an update, {run['padding']:.1%} padding, "
        what += f"{run['busy']} cores, {run['peak_mib']:,.0f} MiB"
    print(f"round {number + 1}, {name}: {what}", file=sys.stderr, flush=True)


def _version(spec: Spec, name: str) -> str | None:
    if name == "trmt" or not spec.peers:
        return None
    if name == "fairseq":
        commit = spec.peers / "fairseq" / "commit"
        return commit.read_text().strip()[:12] if commit.is_file() else None
    ask = f"from importlib.metadata import version; print(version({TOOLKITS[name]!r}))"
    try:
        done = subprocess.run([str(_python(spec, name)), "-c", ask], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure training, and that of other toolkits.")
    parser.add_argument("data_set", type=Path, nargs="?", help="a prepared set; none: a synthetic one")
    parser.add_argument("--peers", type=Path, help="what bench/peers/install.py made; none: trmt alone")
    parser.add_argument("--toolkits", nargs="+", choices=TOOLKITS, default=list(TOOLKITS))
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--recipe", default="", help="trmt's recipe instead of the preset; without peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--warmup-updates", type=int, default=5)
    parser.add_argument("--warmup-seconds", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each window")
    parser.add_argument(
        "--options",
        type=json.loads,
        default={},
        help='JSON, for instance {"fairseq": {"batch_tokens": 4000, "arguments": ["--amp"]}}',
    )
    parser.add_argument("--pairs", type=int, default=300_000, help="of the synthetic set")
    parser.add_argument("--work", type=Path, help="scratch folder to keep (a temporary one)")
    parser.add_argument("--name", help="of the result file: train-NAME")
    given = parser.parse_args()
    if given.recipe and given.peers:
        parser.error("a recipe is trmt's alone: leave out --peers, or use --preset")
    with tempfile.TemporaryDirectory() as scratch:
        work = given.work or Path(scratch)
        places = {"WORK": work, "DATA_SET": given.data_set, "FOLDER": given.peers}
        hidden = {str(place): name for name, place in places.items() if place}
        figures = without_places(run(given, work), hidden)
    data = given.data_set.resolve().name if given.data_set else "synthetic"
    name = given.name or f"{data}-{given.preset}-{given.device}"
    words = shlex.join(without_places(sys.argv[1:], hidden))
    print(record(f"train-{name}", figures, command=f"python bench/train.py {words}"))
    print(table(figures))


def run(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    shape = PRESETS[given.preset]
    data_set = given.data_set
    if not data_set:
        import synthetic

        folder = work / f"synthetic-{given.pairs}-{shape.vocabulary}"
        data_set = synthetic.prepared(folder, pairs=given.pairs, vocabulary=shape.vocabulary)
    spec = Spec(
        data_set=data_set,
        work=work,
        shape=shape,
        peers=given.peers,
        toolkits=tuple(given.toolkits),
        recipe=given.recipe,
        rounds=given.rounds,
        threads=given.threads,
        device=given.device,
        precision=given.precision,
        batch_tokens=given.batch_tokens,
        warmup_updates=given.warmup_updates,
        warmup_seconds=given.warmup_seconds,
        seconds=given.seconds,
        options=given.options,
    )
    return measure(spec)


if __name__ == "__main__":
    main()
