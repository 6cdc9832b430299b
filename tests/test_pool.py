"""Every part is processed once or given up by name, whatever happens to the workers."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.pools import FakePool
from trmt.errors import TrmtError
from trmt.scale.parts import MAX_TRIES, process_parts
from trmt.scale.pool import ProcessPool, WorkerReply, start_job


@dataclass(frozen=True)
class Number:
    name: str
    value: int = 0


@dataclass(frozen=True)
class Doubling:
    def load(self) -> Callable[[Number], int]:
        return lambda part: 2 * part.value


def numbers(count: int) -> list[Number]:
    return [Number(f"part-{number}", number) for number in range(count)]


@pytest.mark.parametrize("seed", range(8))
def test_every_part_is_processed_once(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    chooser = random.Random(seed)
    accidents: Counter[str] = Counter()

    def accident(part: Number) -> str | None:
        if accidents[part.name] < MAX_TRIES - 1 and chooser.random() < 0.4:
            accidents[part.name] += 1
            return chooser.choice(["died", "the disk is full"])
        return None

    pool = FakePool(Doubling(), count=chooser.randrange(1, 5), accident=accident)
    outcome = process_parts(numbers(30), pool, title="doubling")
    assert not outcome.failed and sorted(pool.done) == sorted(part.name for part in numbers(30))
    assert all(result == 2 * part.value for part, result in outcome.done) and len(outcome.done) == 30
    assert capsys.readouterr().err.count("is processed again") == accidents.total() > 0


@pytest.mark.parametrize("happens", ["died", "no such file"])
def test_a_part_that_always_fails_is_given_up_by_name(
    happens: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: Counter[str] = Counter()

    def accident(part: Number) -> str | None:
        tried[part.name] += 1
        return happens if part.value == 3 else None

    outcome = process_parts(numbers(9), FakePool(Doubling(), accident=accident), title="doubling")
    assert list(outcome.failed) == ["part-3"] and len(outcome.done) == 8
    assert tried["part-3"] == MAX_TRIES and tried.total() == 8 + MAX_TRIES
    assert "part-3 failed 3 times and is given up" in capsys.readouterr().err


def test_when_everything_fails_not_everything_is_tried() -> None:
    tried: list[str] = []

    def accident(part: Number) -> str:
        tried.append(part.name)
        return "the disk is full"

    with pytest.raises(TrmtError, match=r"50 parts in a row failed, .* the disk is full; correct that"):
        process_parts(numbers(2000), FakePool(Doubling(), count=1, accident=accident), title="doubling")
    assert len(tried) == 50


class FailingPool(FakePool):
    """A pool whose workers cannot start, except some."""

    def __init__(self, *, count: int, good: int) -> None:
        super().__init__(Doubling(), count=count)
        for number in range(good, count):
            self.waiting[number] = WorkerReply(number, "lost", "there is no model")


def test_workers_that_cannot_start_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = process_parts(numbers(5), FailingPool(count=4, good=1), title="doubling")
    assert len(outcome.done) == 5
    assert capsys.readouterr().err.count("a worker cannot start: there is no model") == 3


def test_without_any_worker_the_last_reason_is_the_error() -> None:
    with pytest.raises(TrmtError, match="no worker is left; the last one could not start: there is no model"):
        process_parts(numbers(5), FailingPool(count=2, good=0), title="doubling")


def test_another_version_is_refused() -> None:
    with pytest.raises(TrmtError, match=r"has trmt .*, but not 0\.0; install the same version"):
        start_job(Doubling(), "0.0")


# Real processes


@dataclass(frozen=True)
class Dying:
    """Returns the process; a part that finds the file `NAME.kill` removes it and kills the process."""

    folder: str

    def load(self) -> Callable[[Number], Any]:
        return self.process

    def process(self, part: Number) -> int:
        order = Path(self.folder, f"{part.name}.kill")
        if order.exists():
            order.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if part.name == "bug":
            raise ZeroDivisionError("a real one")
        return os.getpid()


def test_a_killed_process_is_replaced_and_its_part_processed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "part-2.kill").touch()
    parts = [*numbers(6), Number("bug")]
    with ProcessPool(Dying(str(tmp_path)), devices=("cpu", "cpu")) as pool:
        outcome = process_parts(parts, pool, title="dying")
        processes = [worker.process for worker in pool._workers.values()]
    assert all(process.exitcode is not None for process in processes), "they end with the block"
    assert sorted(part.name for part, _ in outcome.done) == [part.name for part in numbers(6)]
    assert outcome.deaths == 1 and "ZeroDivisionError: a real one" in outcome.failed["bug"]
    assert "part-2 is processed again: a worker died (killed by SIGKILL)" in capsys.readouterr().err


@dataclass(frozen=True)
class Unstartable:
    how: str

    def load(self) -> Callable[[Number], Any]:
        if self.how == "error":
            raise TrmtError("there is no model here")
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize(("how", "message"), [("error", "no model here"), ("kill", "died 3 times .*SIGKILL")])
def test_processes_that_cannot_start_end_the_work(how: str, message: str) -> None:
    with ProcessPool(Unstartable(how), devices=("cpu",)) as pool, pytest.raises(TrmtError, match=message):
        process_parts(numbers(2), pool, title="dying")
