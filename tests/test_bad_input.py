"""What no translator should be given: it is answered, or refused in one sentence with the right status."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.edited import edit
from tests.scripted import random_bundle, small_tokenizer

WAYS = [(), pytest.param(("--workers", "2"), marks=pytest.mark.slow)]
Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundle")
    random_bundle(place / "random", small_tokenizer(place / "text"))
    return place / "random"


def run(bundle: Path, data: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "trmt", "translate", str(bundle), "--beam", "1", "--max-length", "4"]
    return subprocess.run([*command, *options], input=data, capture_output=True, timeout=500, check=False)


@pytest.mark.parametrize("options", WAYS)
def test_a_binary_file_has_a_line_for_each_line(bundle: Path, options: tuple[str, ...]) -> None:
    data = random.Random(1).randbytes(20_000)
    done = run(bundle, data, *options)
    assert done.returncode == 0
    assert done.stdout.count(b"\n") == data.count(b"\n") + (not data.endswith(b"\n"))
    assert b"not valid UTF-8" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--workers", "2")])
def test_a_line_of_many_megabytes_is_one_line(bundle: Path, options: tuple[str, ...]) -> None:
    # Blanks, so that it is the reading that is tested: that many words would be translated for hours.
    done = run(bundle, b"one\n" + b" " * (100 << 20) + b"\ntwo\n", *options)
    assert done.returncode == 0 and done.stdout.count(b"\n") == 3


def change(bundle: Path, **fields: object) -> None:
    edit(bundle / "manifest.json", **fields)


def cut(bundle: Path) -> None:
    path = bundle / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BROKEN = {
    "newer trmt": lambda bundle: change(bundle, format=99),
    "checksum differs": cut,
    "not valid JSON": lambda bundle: (bundle / "manifest.json").write_text("{"),
    "joint.model": lambda bundle: (bundle / "tokenizer" / "joint.model").unlink(),
}


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("said", BROKEN)
def test_a_broken_bundle_is_one_sentence(tmp_path: Path, said: str, options: tuple[str, ...]) -> None:
    place = tmp_path / "bundle"
    random_bundle(place, small_tokenizer(tmp_path / "text"))
    BROKEN[said](place)
    done = run(place, b"one\n", *options)
    assert done.returncode == 1 and done.stdout == b""
    assert said.encode() in done.stderr and done.stderr.count(b"\n") == 1
