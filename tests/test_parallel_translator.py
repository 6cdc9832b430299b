"""Several processes translate as one does, even if some of them die."""

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
from trmt.scale import parallel_translator
from trmt.scale.parallel_translator import ParallelTranslator
from trmt.scale.pool import ProcessPool
from trmt.streaming import translate_stream
from trmt.translating import TranslateOptions, Translator

SHORT = TranslateOptions(beam=2, max_length=12, device="cpu")
TWO = ("cpu", "cpu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    random_bundle(folder / "random", small_tokenizer(folder / "text"))
    return folder / "random"


@pytest.fixture(scope="module")
def two(bundle: Path) -> Iterator[ParallelTranslator]:
    with ParallelTranslator(bundle, devices=TWO, options=SHORT) as found:
        yield found


def streamed(translator: Any, data: bytes, **options: Any) -> bytes:
    out = io.BytesIO()
    translate_stream(translator, io.BytesIO(data), out, **options)
    return out.getvalue()


def pids(translator: ParallelTranslator) -> list[int]:
    return [worker.process.pid for _, worker in sorted(translator._pool._workers.items())]


def lines(count: int) -> list[str]:
    words = " ".join(texts.ENGLISH).split()
    return [" ".join(words[(7 * number) % 50 : (7 * number) % 50 + number % 9]) for number in range(count)]


def test_the_lines_are_those_of_one_process(bundle: Path, two: ParallelTranslator) -> None:
    data = b"\n".join(hostile_lines(400, seed=2))
    one = Translator.load(bundle, options=SHORT)
    assert streamed(two, data, as_json=True) == streamed(one, data, as_json=True)
    prefixed = b"It rains.\tDer Zug\nIt rains.\t\n" * 30
    assert streamed(two, prefixed, prefixed=True) == streamed(one, prefixed, prefixed=True)


@pytest.mark.slow
def test_samples_do_not_depend_on_the_process(bundle: Path) -> None:
    options = TranslateOptions(search="sampling", max_length=8, device="cpu")
    data = "\n".join(lines(100)).encode()
    with ParallelTranslator(bundle, devices=TWO, options=options) as found:
        assert streamed(found, data) == streamed(Translator.load(bundle, options=options), data)


def test_the_lines_of_a_killed_worker_are_translated_again(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = lines(300)
    with ParallelTranslator(bundle, devices=TWO, options=SHORT) as found:
        ready = found.ready(source)
        done = dict([next(ready)])
        victims = [pid for pid, chunks in zip(pids(found), found._assigned, strict=True) if chunks]
        assert victims, "a worker is busy as long as lines are missing"
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        for number, translation in ready:
            assert number not in done, "no line is translated twice"
            done[number] = translation
    assert [done[number] for number in range(300)] == Translator.load(bundle, options=SHORT).translate(source)
    assert "killed by SIGKILL" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_idle_workers_are_replaced(bundle: Path) -> None:
    source = lines(40)
    with ParallelTranslator(bundle, devices=TWO, options=SHORT) as found:
        first = dict(found.ready(source))
        for worker in found._pool._workers.values():
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.join()
        assert dict(found.ready(source)) == first


@pytest.mark.slow
def test_lines_that_kill_every_worker_end_the_work(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send = ProcessPool.send

    def send_or_kill(pool: ProcessPool, worker: int, item: Any) -> None:
        if "poison" in item[0]:
            os.kill(pool._workers[worker].process.pid, signal.SIGKILL)
        else:
            send(pool, worker, item)

    monkeypatch.setattr(ProcessPool, "send", send_or_kill)
    source = [*lines(20), "poison"]
    with (
        ParallelTranslator(bundle, devices=TWO, options=SHORT) as found,
        pytest.raises(
            TrmtError, match=r"3 worker processes died over lines 117 to 121, the last one: killed"
        ),
    ):
        list(found.ready(source, first_key=100))


@pytest.mark.slow
def test_no_process_is_left_behind(bundle: Path) -> None:
    with ParallelTranslator(bundle, devices=TWO, options=SHORT) as found:
        processes = [worker.process for worker in found._pool._workers.values()]
        next(found.ready(lines(200)))
    assert all(process.exitcode is not None for process in processes)


def test_a_broken_bundle_is_one_sentence(bundle: Path, tmp_path: Path) -> None:
    random_bundle(tmp_path / "bundle", small_tokenizer(tmp_path / "text"))
    (tmp_path / "bundle" / "weights.safetensors").write_bytes(b"not this")
    with (
        pytest.raises(BundleError, match="its checksum differs"),
        ParallelTranslator(tmp_path / "bundle", devices=TWO),
    ):
        pass


@pytest.mark.parametrize("count", [1, 5, 16, 100, 4096])
@pytest.mark.parametrize(("smallest", "largest"), [(16, 512), (1, 1), (512, 512)])
def test_chunks_hold_every_line_once(count: int, smallest: int, largest: int) -> None:
    chunks = list(parallel_translator._chunks(count, 3, smallest, largest))
    assert [line for chunk in chunks for line in range(chunk.begin, chunk.end)] == list(range(count))
    sizes = [chunk.end - chunk.begin for chunk in chunks]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] <= largest
    assert min(sizes[:-1], default=smallest) >= smallest


def test_each_worker_has_a_chunk_before_any_has_two(two: ParallelTranslator) -> None:
    assert two._next_workers(9) == [0, 1, 0, 1]
    assert two._next_workers(3) == [0, 1, 0]
    two._assigned[0].append(parallel_translator._Chunk(0, 1))
    try:
        assert two._next_workers(9) == [1, 0, 1]
    finally:
        two._assigned[0].clear()


# The command


def command(bundle: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "trmt", "translate", str(bundle)),
        *("--workers", "2", "--beam", "1", "--max-length", "6", *options),
    ]


def test_the_command_answers_each_line_at_once(bundle: Path) -> None:
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
        rest, err = process.communicate(data[data.index(b"\n") + 1 :])
    assert process.returncode == 0 and first + rest == one.stdout
    assert b"a worker process died (killed by SIGKILL)" in err


@pytest.mark.slow
def test_a_closed_output_ends_the_command_and_its_workers(bundle: Path) -> None:
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
    ("options", "message"),
    [(("--threads", "2"), b"leave out --threads"), (("--device", "cpu,cpu"), b"--workers")],
)
def test_options_that_exclude_workers_are_refused(
    bundle: Path, options: tuple[str, ...], message: bytes
) -> None:
    done = subprocess.run(command(bundle, *options), input=b"", capture_output=True, check=False)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count(b"\n") == 1
