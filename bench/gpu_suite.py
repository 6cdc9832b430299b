"""Everything that needs a GPU, in order of value: whoever has a card for ten minutes fills in the next rows.

    python bench/gpu_suite.py --budget 9m --data FOLDER --out FOLDER
    python bench/gpu_suite.py --collect --out FOLDER

First it is proven what the card can do; then come rows that take longer and longer, and the tests last.
Results are written after each round, each point and each test, so that a call that is ended loses little.

Run again with the same --out, it goes on: a row that is done is not repeated unless --again names it. What
was interrupted comes after what has not been begun, and goes on from its last checkpoint if --work is still
there. --out keeps two small files: suite.json, with the rows, their state and their results in full, and
suite.log. So it can be carried from one machine to the next; --work holds checkpoints and may be left behind.
--collect writes the results of all rows that are done into bench/results, from which README's tables are
made.

FOLDER with the data has folders whose names hold multi30k, tatoeba and laws; bench/multi30k.py and
bench/corpora.py say what is in them. Where the copy at hand is no git repository, TRMT_COMMIT says which
commit it is.

--smoke runs every row on a CPU with toy data and toy sizes, to see that it runs. Small networks leave most
of a GPU idle: --beside 5 trains five experiments at once, which takes far less time in all, but says little
of the time that each takes; their results tell.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from budget import AGAIN, Budget, OutOfTime, TooLong, seconds, stop_together
from provenance import RESULTS, ROOT, read_json, write_json

GRACE = 15.0  # seconds that are left when the budget ends
DONE, INTERRUPTED, FAILED, UNAVAILABLE, PENDING = "done", "interrupted", "failed", "unavailable", "pending"
SMOKE = (
    *("network.d_model=16", "network.feed_forward=16", "network.heads=2", "batches.tokens=600"),
    *("training.steps=6", "training.log_every=2", "training.save_every=2"),
    *("validation.every=3", "validation.sentences=5"),
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the suite runs."""

    data: Path
    work: Path
    device: str
    smoke: bool
    beside: int = 1  # so many rows of experiments at once

    @property
    def results(self) -> Path:
        """Where the programs of the rows write their results."""
        return self.work / "results"

    def corpus(self, name: str) -> Path | None:
        """The folder of a corpus; None if it is not there."""
        found = [folder for folder in sorted(self.data.glob(f"*{name}*")) if folder.is_dir()]
        return found[0] if found else None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing to measure."""

    name: str  # also of its result
    measures: str
    command: Callable[[Place], list[str]]  # without Python; it takes --out
    corpus: str | None = None  # what it needs of the data
    packages: tuple[str, ...] = ()  # what must be installed for it
    least: float = 45  # seconds for which it is worth beginning
    most: float = float("inf")  # seconds that it may take: a hanging one must not take those of all others
    paced: bool = False  # whether it takes --budget, and goes on where it stopped
    alone: bool = False  # whether nothing may run beside it, although it is paced


def bench(program: str, *words: str) -> Callable[[Place], list[str]]:
    """A program of this folder that takes --device."""
    return lambda place: [str(ROOT / "bench" / program), *words, "--device", place.device]


def experiment(program: str, name: str, corpus: str, measures: str, *, seeds: int = 1) -> Row:
    """A row that trains, translates and scores."""

    def command(place: Place) -> list[str]:
        folder = place.corpus(corpus)
        assert folder, "a row whose corpus is missing is not run"
        words = [str(ROOT / "bench" / program), str(folder), "--experiment", name]
        words += ["--seeds", "1" if place.smoke else str(seeds)]
        # Small networks leave most of a GPU idle: several runs share it.
        words += [
            "--at-once",
            str(seeds),
            "--device",
            place.device,
            "--work",
            str(place.work / name),
            "--keep",
        ]
        if place.smoke:
            words += ["--name", name, "--threads", "1", *(f"--set={change}" for change in SMOKE)]
        return words

    return Row(name=name, measures=measures, command=command, corpus=corpus, paced=True)


def speed(name: str, measures: str, *, least: float, packages: tuple[str, ...] = ()) -> Row:
    """A row that measures how fast training is."""

    def command(place: Place) -> list[str]:
        words = [str(ROOT / "bench" / "gpu_speed.py"), name, "--device", place.device]
        return [*words, "--work", str(place.work / "speed"), *(["--smoke"] if place.smoke else [])]

    return Row(name=name, measures=measures, command=command, least=least, most=3 * least, packages=packages)


def translation(network: str) -> Row:
    """A row that measures how fast translation is."""
    name = f"translate-{network}"
    # Other programs take long to load: tiny, one network shows that they run.
    tiny = ["--smoke", "--rounds", "1", *(["--engines", "graphs", "direct"] if network == "big" else [])]

    def command(place: Place) -> list[str]:
        words = bench("gpu_translate.py", network, "--work", str(place.work / name))(place)
        return [*words, *(tiny if place.smoke else [])]

    measures = f"translation with the {network} network: speed with and without graphs, other programs"
    return Row(name=name, measures=measures, command=command, least=90, most=300, paced=True, alone=True)


def gpu_tests(place: Place) -> list[str]:
    selected = ["tests/test_config.py"] if place.smoke else ["-m", "gpu"]
    return [str(ROOT / "bench" / "gpu_tests.py"), *selected]


def machine(place: Place) -> list[str]:
    size = ["--size", "64"] if place.smoke else []
    return bench("machine.py", *size)(place)


def translate_kernels(place: Place) -> list[str]:
    return bench("gpu_kernels.py", *(["--smoke"] if place.smoke else []))(place)


def lineage(place: Place) -> list[str]:
    folder = place.corpus("multi30k")
    assert folder, "a row whose corpus is missing is not run"
    words = [str(ROOT / "bench" / "lineage.py"), "--name", "lineage-multi30k", "--keep"]
    words += ["--work", str(place.work / "lineage-multi30k"), "--device", place.device]
    if place.smoke:
        return [*words, "--scale", "toy", "--seeds", "1", "--only", "fixed", "transformer"]
    return [*words, "--scale", "multi30k", "--corpus", str(folder), "--at-once", "6"]


ROWS = (
    Row(
        name="gpu-probes",
        measures="what the GPU can do, proven by tiny runs",
        command=bench("gpu_probes.py"),
        least=20,
        most=120,
    ),
    Row(
        name="machine",
        measures="limits of the GPU: matrix products, copies, kernel launches",
        command=machine,
        most=120,
    ),
    Row(
        name="translate-kernels",
        measures="Triton kernels compared with PyTorch: times, share of the memory bandwidth",
        command=translate_kernels,
        most=180,
        packages=("triton",),
    ),
    speed("train-base", "training of the base network in bf16: speed, memory, data wait", least=90),
    translation("base"),
    speed("train-big", "training of the big network in bf16: speed, memory, data wait", least=150),
    experiment(
        *("multi30k.py", "multi30k", "multi30k"),
        "Multi30k English-German, recipe multi30k, mean BLEU of 3 seeds",
        seeds=3,
    ),
    speed(
        "train-peers",
        "training of the base network compared with Hugging Face's Seq2SeqTrainer",
        least=240,
        packages=("transformers", "accelerate"),
    ),
    translation("big"),
    speed("train-deterministic", "cost of training.deterministic", least=200),
    experiment(
        *("multi30k.py", "multi30k-raw", "multi30k"),
        "Multi30k English-German from raw text, recipe multi30k-plus, mean of 3 seeds",
        seeds=3,
    ),
    experiment(
        *("multi30k.py", "multi30k-plus", "multi30k"),
        "the same recipe on the published, preprocessed text, mean of 3 seeds",
        seeds=3,
    ),
    experiment(
        *("corpora.py", "tatoeba", "tatoeba"), "Tatoeba English-German to convergence: time and scores"
    ),
    experiment(*("corpora.py", "laws", "laws"), "laws of Canada, English-French: time and scores"),
    Row(
        name="lineage-multi30k",
        measures="claims about translation networks, with systems trained on Multi30k, 3 seeds",
        command=lineage,
        corpus="multi30k",
        packages=("gensim",),
        paced=True,
    ),
    Row(
        name="gpu-tests",
        measures="tests that need a GPU: passed and failed",
        command=gpu_tests,
        paced=True,
        alone=True,
    ),
)


class State:
    """What is known of every row, in a file that is there whole or not at all."""

    def __init__(self, path: Path, *, smoke: bool = False) -> None:
        self.path = path
        self._lock = threading.Lock()
        self.tree: dict[str, Any] = {"smoke": smoke, "rows": {}}
        if path.exists():
            self.tree = read_json(path) or self._set_aside()
            if self.tree["smoke"] != smoke:
                raise SystemExit(f"{path} is of another kind of run (--smoke); name another --out")

    def _set_aside(self) -> dict[str, Any]:
        """Keep a file that cannot be read under another name, and begin anew."""
        damaged = self.path.with_name(f"{self.path.name}.damaged")
        self.path.replace(damaged)
        print(f"{self.path} cannot be read and is now {damaged}; all rows are run anew", file=sys.stderr)
        return self.tree

    def of(self, name: str) -> dict[str, Any]:
        return self.tree["rows"].get(name, {"status": PENDING})

    def note(self, row: Row, status: str, **known: Any) -> None:
        with self._lock:
            self._note(row, status, **known)

    def _note(self, row: Row, status: str, *, spent: float = 0.0, why: str = "", result: Any = None) -> None:
        before = self.of(row.name)
        self.tree["rows"][row.name] = {
            "measures": row.measures,
            "status": status,
            "why": why,
            "seconds": round(before.get("seconds", 0.0) + spent, 1),
            "calls": before.get("calls", 0) + bool(spent),
            "result": result if result is not None else before.get("result"),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.tree, indent=1)


def main() -> None:
    given = arguments()
    state = State(given.out / "suite.json", smoke=given.smoke)
    if given.collect:
        collect(state)
        return
    if not given.smoke and given.device.startswith("cuda"):
        refuse_without_gpu()
    work = (given.work or given.out / "work").resolve()
    work.mkdir(parents=True, exist_ok=True)
    if given.smoke:
        toy_data(work / "data")
    place = Place(
        data=work / "data" if given.smoke else given.data.resolve(),
        work=work,
        device="cpu" if given.smoke else given.device,
        smoke=given.smoke,
        beside=given.beside,
    )
    budget = Budget(seconds(given.budget), grace=GRACE)
    stop_together()
    chosen = [row for row in ROWS if not given.only or row.name in given.only]
    for rows in in_groups(to_do(chosen, state, again=given.again), given.beside):
        with ThreadPoolExecutor(max_workers=given.beside) as threads:
            list(threads.map(lambda row: attempt(row, place, state, budget), rows))
    show(state)
    if any(state.of(row.name)["status"] in (PENDING, INTERRUPTED, FAILED) for row in chosen):
        raise SystemExit(AGAIN)


def refuse_without_gpu() -> None:
    from trmt.devices.hardware import gpu_count

    if not gpu_count():
        raise SystemExit("torch sees no GPU here; --smoke runs everything tiny, on the CPU")


def arguments() -> argparse.Namespace:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description="Run what needs a GPU.")
    parser.add_argument("--budget", default="9m", help="stop in good time before this has passed")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="the folder with the corpora")
    parser.add_argument("--out", type=Path, required=True, help="where state and results are kept")
    parser.add_argument("--work", type=Path, help="where checkpoints are kept [default: work in --out]")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--beside", type=int, default=1, help="so many experiments at once share the GPU")
    parser.add_argument("--only", nargs="+", choices=names, help="these rows alone")
    parser.add_argument("--again", nargs="+", choices=names, default=[], help="these rows though done")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, on the CPU")
    parser.add_argument("--collect", action="store_true", help="write what is done into bench/results")
    return parser.parse_args()


def to_do(rows: list[Row], state: State, *, again: list[str]) -> list[Row]:
    """What is not done, in order: first what was never begun, then what was interrupted, then what failed.

    Otherwise a row that is too long for every call, or that fails late, would take all the time of each.
    """
    open_rows = [row for row in rows if row.name in again or state.of(row.name)["status"] != DONE]
    last = (INTERRUPTED, FAILED)
    return sorted(
        open_rows,
        key=lambda row: (state.of(row.name)["status"] in last) + (state.of(row.name)["status"] == FAILED),
    )


def in_groups(rows: list[Row], beside: int) -> list[list[Row]]:
    """One after the other; or what measures speed one after the other, and then all experiments together.

    What stands behind the last experiment stays there.
    """
    together = [row for row in rows if row.paced and not row.alone]
    if beside == 1 or not together:
        return [[row] for row in rows]
    last = rows.index(together[-1])
    before = [[row] for row in rows[:last] if row not in together]
    return [*before, together, *([row] for row in rows[last + 1 :])]


def attempt(row: Row, place: Place, state: State, budget: Budget) -> None:
    """Run a row as far as the time goes, and note what became of it."""
    if lacking := what_lacks(row, place):
        state.note(row, UNAVAILABLE, why=lacking)
        return
    if budget.left() < (0 if place.smoke else row.least):
        return
    result, log = place.results / f"{row.name}.json", place.work / f"{row.name}.log"
    hand_back(row, place, state)
    command = [sys.executable, *row.command(place), "--out", str(place.results)]
    if row.paced:
        command += ["--budget", f"{min(budget.left(), row.most - GRACE):.0f}s"]
    print(f"{row.name}: {row.measures}", file=sys.stderr, flush=True)
    began = time.monotonic()
    status, why = DONE, ""
    try:
        budget.run(command, log=log, cwd=ROOT, own_group=True, most=row.most)
    except TooLong:
        status, why = FAILED, f"it took longer than {row.most:.0f} s and was ended"
    except OutOfTime:
        status = INTERRUPTED
    except SystemExit as error:
        status, why = FAILED, str(error)
    found = read_json(result)
    if status == DONE and found is None:
        status, why = FAILED, "it left no result, or one that was cut off"
    state.note(row, status, spent=time.monotonic() - began, why=why, result=found)
    with state.path.with_suffix(".log").open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%F %T')} {row.name}: {status} {why}\n")


def hand_back(row: Row, place: Place, state: State) -> None:
    """What an earlier call, perhaps on another machine, has of this row: it goes on from there."""
    known, result = state.of(row.name), place.results / f"{row.name}.json"
    result.unlink(missing_ok=True)
    if known["status"] == DONE:  # and yet it is run: all of it again
        shutil.rmtree(place.work / row.name, ignore_errors=True)
    elif row.paced and known.get("result"):
        result.parent.mkdir(exist_ok=True)
        write_json(result, known["result"])


def what_lacks(row: Row, place: Place) -> str | None:
    """Why a row cannot be measured here."""
    if row.corpus and not place.corpus(row.corpus):
        return f"there is no folder *{row.corpus}* in the data"
    if missing := [package for package in row.packages if not find_spec(package)]:
        return f"{' and '.join(missing)} must be installed"
    return None


def show(state: State) -> None:
    """The rows and their state, on standard output."""
    for row in ROWS:
        known = state.of(row.name)
        print(f"{row.name:20} {known['status']:12} {known.get('seconds', 0):7.0f} s  {row.measures}")
        if known.get("why"):
            print(f"    {known['why'].strip().splitlines()[-1]}")


def collect(state: State) -> None:
    """Write the results of what is done, or begun, where README's tables are made from."""
    if state.tree["smoke"]:
        raise SystemExit("a smoke run has no figures to collect")
    for row in ROWS:
        if result := state.of(row.name).get("result"):
            path = RESULTS / f"{row.name}.json"
            write_json(path, result)
            print(path)


def toy_data(folder: Path) -> None:
    """The phrasebook in the guise of the three corpora."""
    sys.path.insert(0, str(ROOT / "data"))
    from phrasebook import generate

    splits = generate(1)
    tests = ("test_2016_flickr", "test_2017_flickr", "test_2017_mscoco")
    layouts = {
        "multi30k": (("en", "de"), "val", tests),
        "tatoeba": (("en", "de"), "dev", ("test", "dev.allrefs", "test.allrefs")),
        "laws": (("en", "fr"), "dev", ("test",)),
    }
    for corpus, (languages, dev, others) in layouts.items():
        place = folder / corpus
        place.mkdir(parents=True, exist_ok=True)
        pairs = {"train": splits["train"][:500], dev: splits["dev"][:8]}
        pairs |= {name: splits["dev" if name.startswith("dev") else "test"][:8] for name in others}
        for name, texts in pairs.items():
            for side, language in enumerate(languages):
                text = "".join(f"{pair[side]}\n" for pair in texts)
                (place / f"{name}.{language}").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
