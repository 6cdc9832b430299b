"""A real Ray cluster that loses a worker and is stopped: no part is lost, repeated or out of order."""

from __future__ import annotations

import io
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.scripted import hostile_lines, random_bundle, small_tokenizer
from tests.texts import ENGLISH, GERMAN
from trmt.cli import corpus
from trmt.errors import ConfigError, TrmtError
from trmt.scale.ray_pool import ray_cluster
from trmt.sets.preparing import PrepareOptions, prepare
from trmt.streaming import translate_stream
from trmt.translating import TranslateOptions, Translator

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Other users of this machine must not reach these clusters.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}

installed = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@contextmanager
def cluster() -> Iterator[str]:
    """A new cluster with three cores, and two GPUs as far as Ray knows; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # its sockets must have short names
    words = f"start --head --block --port {port} --node-ip-address 127.0.0.1 --num-cpus 3 --temp-dir {folder}"
    words += (
        f" --num-gpus 2 --include-dashboard false --object-store-memory {100 << 20} --disable-usage-stats"
    )
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *words.split()],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: listens(port))
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        head.wait()
        for process in processes_with(folder):
            os.kill(process, signal.SIGKILL)
        wait_for(lambda: not processes_with(folder))
        shutil.rmtree(folder, ignore_errors=True)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def processes_with(word: str) -> list[int]:
    """Processes with this word in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if word.encode() in command and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], object], seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition has not become true"
        time.sleep(0.02)


@contextmanager
def started(command: str, address: str, words: str) -> Iterator[subprocess.Popen[str]]:
    """The command running on the cluster; it ends with the block."""
    line = [sys.executable, "-W", "error", "-m", "trmt", command, *words.split()]
    line += ["--ray", address, "--workers", "2"]
    with subprocess.Popen(
        line, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as driver:
        try:
            yield driver
        finally:
            driver.kill()


def writers(folder: Path) -> list[int]:
    """The processes that are writing a part: their ids are in the names of the partial files."""
    partials = [path.name for path in folder.glob(".partial-part-*")]
    return [int(found[1]) for name in partials if (found := re.search(r"-(\d+)-[0-9a-f]{8}$", name))]


@installed
@pytest.mark.slow
def test_no_part_is_lost_repeated_or_out_of_order(tmp_path: Path) -> None:
    random_bundle(tmp_path / "bundle", small_tokenizer(tmp_path / "text"))
    data = b"\n".join(hostile_lines(1200, seed=9))
    (tmp_path / "source").write_bytes(data)
    out = tmp_path / "out"
    words = f"{tmp_path}/bundle --beam 1 --max-length 12 --input {tmp_path}/source --output {out}"
    words += " --part-size 0.006 --device cpu"

    def done() -> list[Path]:
        return sorted(out.glob("part-*"))

    with cluster() as address, started("translate", address, words) as driver:
        wait_for(lambda: driver.poll() is not None or (done() and writers(out)))
        victim = writers(out)[0]
        os.kill(victim, signal.SIGKILL)
        there = len(done())
        wait_for(lambda: driver.poll() is not None or len(done()) > there + 2)
        driver.kill()
        assert "is processed again: a worker died" in driver.communicate()[1]
    before = {path: path.stat().st_mtime_ns for path in done()}
    with cluster() as address:
        with started("translate", address, words) as driver:
            err = driver.communicate(timeout=180)[1]
        assert driver.returncode == 0, err
        assert re.search(rf"{len(before)} of \d+ parts in .* are already done", err)
        check_preparing(tmp_path, address)
        check_gpus(address)
    assert len(done()) > len(before) and not writers(out), "the command was stopped before the end"
    assert all(path.stat().st_mtime_ns == when for path, when in before.items()), (
        "no part was processed twice"
    )
    whole = io.BytesIO()
    options = TranslateOptions(search="greedy", max_length=12, device="cpu")
    translate_stream(Translator.load(tmp_path / "bundle", options=options), io.BytesIO(data), whole)
    assert b"".join(path.read_bytes() for path in done()) == whole.getvalue()


def check_preparing(tmp_path: Path, address: str) -> None:
    """Preparing on the cluster gives the same set as preparing here."""
    for language, sentences in (("en", ENGLISH), ("de", GERMAN)):
        text = "\n".join(f"{sentence} {number}" for number in range(100) for sentence in sentences)
        (tmp_path / f"train.{language}").write_text(text, encoding="utf-8")
    tokenizer = tmp_path / "bundle" / "tokenizer"
    words = f"{tmp_path}/there --train {tmp_path}/train --tokenizer {tokenizer}"
    with started("prepare", address, words) as driver:
        err = driver.communicate(timeout=180)[1]
    assert driver.returncode == 0, err
    options = {"train": (str(tmp_path / "train"),), "tokenizer": tokenizer, "workers": 1}
    prepare(PrepareOptions(out=tmp_path / "here", **options))
    for path in (tmp_path / "here").rglob("*"):
        twin = tmp_path / "there" / path.relative_to(tmp_path / "here")
        assert path.is_dir() or twin.read_bytes() == path.read_bytes()


def check_gpus(address: str) -> None:
    """Workers on GPUs see one each."""
    program = """
import sys, tempfile
from tests.pools import GpuQuestion, ReportGpus
from trmt.scale.parts import process_parts
from trmt.scale.ray_pool import ray_cluster

with ray_cluster(sys.argv[1]) as cluster, tempfile.TemporaryDirectory() as folder:
    with cluster.pool(ReportGpus(), gpu=True) as pool:
        outcome = process_parts([GpuQuestion(name, folder) for name in "ab"], pool, title="")
print(sorted(visible for _, visible in outcome.done))
"""
    line = [sys.executable, "-c", program, address]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "['0', '1']", done.stderr


@pytest.mark.parametrize("device", ["cuda:1", "cuda:0,cuda:1", "mps"])
def test_a_numbered_gpu_cannot_be_combined_with_ray(device: str) -> None:
    with (
        pytest.raises(ConfigError, match=f"--device {device} cannot be used with --ray"),
        corpus._ray_pool("auto", None, device),
    ):
        pass


@installed
def test_an_address_without_a_cluster_is_one_sentence() -> None:
    with (
        pytest.raises(TrmtError, match=r"the Ray cluster 127.0.0.1:1: .* refused; start one"),
        ray_cluster("127.0.0.1:1"),
    ):
        pass


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'trmt\[ray\]'"), ray_cluster("auto"):
        pass
