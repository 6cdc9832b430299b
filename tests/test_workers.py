"""Several processes translate as one does, whatever becomes of some of them."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import texts
from tests.scripted import hostile_lines, random_bundle, small_tokenizer
from trmt.errors import BundleError, TrmtError
from trmt.scale import workers
from trmt.scale.workers import Workers
from trmt.streaming import translate_stream
from trmt.translating import TranslateOptions, Translator

SHORT = TranslateOptions(beam=2, max_length=12, device="cpu")
TWO = ("cpu", "cpu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundle")
    random_bundle(place / "random", small_tokenizer(place / "text"))
    return place / "random"


@pytest.fixture(scope="module")
def two(bundle: Path) -> Iterator[Workers]:
    with Workers(bundle, devices=TWO, options=SHORT) as found:
        yield found


def streamed(translator: Any, data: bytes, **options: Any) -> bytes:
    out = io.BytesIO()
    translate_stream(translator, io.BytesIO(data), out, **options)
    return out.getvalue()


def lines(count: int) -> list[str]:
    words = " ".join(texts.ENGLISH).split()
    return [" ".join(words[(7 * at) % 50 : (7 * at) % 50 + at % 9]) for at in range(count)]


def test_the_lines_are_those_of_one_process(bundle: Path, two: Workers) -> None:
    data = b"\n".join(hostile_lines(400, seed=2))
    one = Translator.load(bundle, options=SHORT)
    assert streamed(two, data, as_json=True) == streamed(one, data, as_json=True)
    prefixed = b"It rains.\tDer Zug\nIt rains.\t\n" * 30
    assert streamed(two, prefixed, prefixed=True) == streamed(one, prefixed, prefixed=True)


@pytest.mark.slow
def test_samples_do_not_depend_on_who_draws_them(bundle: Path) -> None:
    options = TranslateOptions(search="sampling", max_length=8, device="cpu")
    data = "\n".join(lines(100)).encode()
    with Workers(bundle, devices=TWO, options=options) as found:
        assert streamed(found, data) == streamed(Translator.load(bundle, options=options), data)


def test_a_killed_workers_lines_are_done_again(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = lines(300)
    with Workers(bundle, devices=TWO, options=SHORT) as found:
        ready = found.ready(asked)
        done = dict([next(ready)])
        victims = [worker.process.pid for worker in found._workers if worker.runs]
        assert victims, "somebody is busy as long as lines are missing"
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        for number, translation in ready:
            assert number not in done, "no line is answered twice"
            done[number] = translation
    assert [done[number] for number in range(300)] == Translator.load(bundle, options=SHORT).translate(asked)
    assert "killed by SIGKILL" in capsys.readouterr().err


@pytest.mark.slow
def test_idle_workers_that_are_killed_are_missed_by_nobody(bundle: Path) -> None:
    asked = lines(40)
    with Workers(bundle, devices=TWO, options=SHORT) as found:
        first = dict(found.ready(asked))
        for worker in found._workers:
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.join()
        assert dict(found.ready(asked)) == first


@pytest.mark.slow
def test_lines_that_kill_every_worker_end_the_work(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def send_or_kill(worker: Any, work: Any) -> None:
        if "poison" in work[0]:
            os.kill(worker.process.pid, signal.SIGKILL)
        else:
            worker.pipe.send(work)

    monkeypatch.setattr(Workers, "_send", staticmethod(send_or_kill))
    asked = [*lines(20), "poison"]
    with (
        Workers(bundle, devices=TWO, options=SHORT) as found,
        pytest.raises(TrmtError, match=r"3 worker processes died over lines 117 to 121, the last one killed"),
    ):
        list(found.ready(asked, first_key=100))


@pytest.mark.slow
def test_they_leave_nothing_behind(bundle: Path) -> None:
    with Workers(bundle, devices=TWO, options=SHORT) as found:
        processes = [worker.process for worker in found._workers]
        next(found.ready(lines(200)))
    assert all(process.exitcode is not None for process in processes)


def test_a_broken_bundle_is_one_sentence(bundle: Path, tmp_path: Path) -> None:
    random_bundle(tmp_path / "bundle", small_tokenizer(tmp_path / "text"))
    (tmp_path / "bundle" / "weights.safetensors").write_bytes(b"not this")
    with pytest.raises(BundleError, match="its checksum differs"), Workers(tmp_path / "bundle", devices=TWO):
        pass


@pytest.mark.parametrize("count", [1, 5, 16, 100, 4096])
@pytest.mark.parametrize(("least", "most"), [(16, 512), (1, 1), (512, 512)])
def test_runs_hold_every_line_once(count: int, least: int, most: int) -> None:
    runs = list(workers._runs(count, 3, least, most))
    assert [number for run in runs for number in range(run.begin, run.end)] == list(range(count))
    sizes = [run.end - run.begin for run in runs]
    assert (
        sizes == sorted(sizes, reverse=True) and sizes[0] <= most and min(sizes[:-1], default=least) >= least
    )


def test_each_has_a_run_before_anyone_has_two(two: Workers) -> None:
    first, second = two._workers
    assert two._wanting(9) == [first, second, first, second]
    assert two._wanting(3) == [first, second, first]
    first.runs.append(workers._Run(0, 1))
    try:
        assert two._wanting(9) == [second, first, second]
    finally:
        first.runs.clear()


# The command


def command(bundle: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "trmt", "translate", str(bundle)),
        *("--workers", "2", "--beam", "1", "--max-length", "6", *options),
    ]


def test_the_command_translates_line_by_line_for_who_waits(bundle: Path) -> None:
    process = subprocess.Popen(command(bundle), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin and process.stdout
    try:
        for number in range(3):
            process.stdin.write(b"%d more\n" % number)
            process.stdin.flush()
            assert process.stdout.readline().endswith(b"\n")
        process.stdin.close()
        assert process.stdout.read() == b"" and process.wait() == 0
    finally:
        process.kill()
        process.stdout.close()


def children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
def test_several_devices_and_a_kill_give_the_lines_of_one_process(bundle: Path) -> None:
    line = [*(sys.executable, "-m", "trmt", "translate", str(bundle)), "--max-length", "12", "--json"]
    data = b"\n".join(hostile_lines(600, seed=4))
    one = subprocess.run([*line, "--device", "cpu"], input=data, capture_output=True, check=True)
    with subprocess.Popen(
        [*line, "--device", "cpu,cpu"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout
        process.stdin.write(data[: data.index(b"\n") + 1])
        process.stdin.flush()
        first = process.stdout.readline()
        os.kill(children(process.pid)[0], signal.SIGKILL)
        rest, said = process.communicate(data[data.index(b"\n") + 1 :])
    assert process.returncode == 0 and first + rest == one.stdout
    assert b"a worker process died (killed by SIGKILL)" in said


@pytest.mark.slow
def test_a_reader_that_has_gone_ends_the_command_and_its_workers(bundle: Path) -> None:
    process = subprocess.Popen(
        command(bundle), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr
    try:
        process.stdin.write(b"one\n")
        process.stdin.flush()
        process.stdout.readline()
        born = children(process.pid)
        assert len(born) == 2
        process.stdout.close()
        process.stdin.write(b"two\n")
        process.stdin.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""
        until = time.monotonic() + 30
        while any(Path(f"/proc/{child}").exists() for child in born):
            assert time.monotonic() < until, "a worker outlives the command"
            time.sleep(0.02)
    finally:
        process.kill()
        process.stderr.close()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(bundle: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command(bundle), input=b"one\ntwo\n", stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1 and b"No space left on device" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--threads", "2"), b"leave out --threads"), (("--device", "cpu,cpu"), b"--workers")],
)
def test_what_excludes_workers_is_refused(bundle: Path, options: tuple[str, ...], said: bytes) -> None:
    done = subprocess.run(command(bundle, *options), input=b"", capture_output=True, check=False)
    assert done.returncode == 1 and said in done.stderr and done.stderr.count(b"\n") == 1
