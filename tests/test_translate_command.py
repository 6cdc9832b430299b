"""The command trmt translate: options, messages, and how it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests import texts
from tests.commands import Command
from tests.edited import edit
from tests.scripted import random_bundle, small_tokenizer
from trmt.bundles import bundles, checkpoints
from trmt.cli import main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    random_bundle(folder / "random", small_tokenizer(folder / "tokenizer"))
    return folder / "random"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sample", "--beam", "4"], ["--beam", "--sample"]),
        (["--sample", "--length-penalty", "1"], ["--length-penalty", "--sample"]),
        (["--temperature", "0.5"], ["--temperature", "--sample"]),
        (["--top-k", "5"], ["--top-k", "--sample"]),
        (["--top-p", "0.5", "--beam", "2"], ["--top-p", "--sample"]),
        (["--seed", "1"], ["--seed", "--sample"]),
        (["--n-best", "9"], ["--n-best 9", "beam"]),
        (["--beam", "0"], ["beam", "at least 1"]),
        (["--device", "abacus"], ["abacus", "auto"]),
        (["--device", "cuda:x"], ["cuda:x", "auto"]),
        (["--device", "cuda:999"], ["cuda:999", "auto"]),
        (["--device", "cpu:-1"], ["cpu:-1", "auto"]),
        (["--length-penalty", "11"], ["length penalty", "10"]),
    ],
    ids=str,
)
def test_the_command_names_both_options_that_exclude_each_other(
    trmt: Command,
    bundle: Path,
    options: list[str],
    words: list[str],
) -> None:
    code, out, err = trmt("translate", bundle, *options, stdin=b"a\n")
    assert (code, out) == (1, b"")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words)


def spoil_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def spoil_longest(folder: Path) -> None:
    edit(folder / "manifest.json", longest={})


def spoil_weights(folder: Path) -> None:
    weights = bytearray((folder / "weights.safetensors").read_bytes())
    weights[-5] ^= 1
    (folder / "weights.safetensors").write_bytes(weights)


def cut_weights(folder: Path) -> None:
    weights = (folder / "weights.safetensors").read_bytes()
    (folder / "weights.safetensors").write_bytes(weights[: len(weights) // 2])


def lose_weights(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()


def lose_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def lose_all(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "spoil",
    [spoil_manifest, spoil_longest, spoil_weights, cut_weights, lose_weights, lose_tokenizer, lose_all],
)
def test_a_broken_bundle_is_one_sentence(
    trmt: Command,
    bundle: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    assert trmt("translate", copy, stdin=b"\n")[:2] == (0, b"\n")
    spoil(copy)
    code, out, err = trmt("translate", copy, stdin=b"\n")
    assert (code, out) == (1, b"")
    assert err.startswith("error: ") and err.count("\n") == 1 and str(copy) in err


# Standard input and output


def test_the_default_model_is_printed_on_standard_error(
    trmt: Command,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = trmt("translate", bundle, stdin=b"It rains.\n")
    assert expected[0] == 0 and expected[2] == ""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRMT_MODEL", raising=False)
    monkeypatch.setattr(checkpoints, "SHIPPED", ())
    code, out, err = trmt("translate", stdin=b"It rains.\n")
    assert (code, out) == (1, b"") and "TRMT_MODEL" in err and err.count("\n") == 1
    for age, name in enumerate(["newest", "old", "oldest"]):
        shutil.copytree(bundle, tmp_path / "models" / name)
        bundles.rewrite_manifest(tmp_path / "models" / name, created=10.0**9 - age)
    code, out, err = trmt("translate", stdin=b"It rains.\n")
    newest = Path("models", "newest")
    assert (code, out) == expected[:2] and err == f"model: {newest} (the newest finished one in models/)\n"
    monkeypatch.setenv("TRMT_MODEL", str(bundle))
    code, out, err = trmt("translate", stdin=b"It rains.\n")
    assert (code, out) == expected[:2] and err == f"model: {bundle} ($TRMT_MODEL)\n"
    assert trmt("--quiet", "translate", stdin=b"It rains.\n") == expected
    monkeypatch.setenv("TRMT_MODEL", "nowhere")
    assert trmt("translate", "old", stdin=b"It rains.\n") == expected, "found by its name in models/"


def test_split_and_undecodable_lines_are_named(trmt: Command, bundle: Path) -> None:
    long = " ".join(texts.GERMAN).encode()
    data = b"fine\nbad \xff\n%s\n\xed\xa0\x80\r\nreplaced \xef\xbf\xbd before\n" % long
    code, out, err = trmt("translate", bundle, "--max-length", "5", stdin=data)
    assert code == 0 and out.count(b"\n") == 5 and b"\n\n" not in out
    split, undecodable = err.splitlines()
    assert split == "warning: line 3 is longer than anything in training and was translated in pieces"
    assert undecodable.startswith("warning: 2 lines are not valid UTF-8; ") and undecodable.endswith(": 2, 4")


def test_a_closed_stream_is_one_sentence(
    trmt: Command,
    bundle: Path,
    capsysbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["trmt", "translate", str(bundle)])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as ended:
        main()
    err = capsysbinary.readouterr().err
    assert ended.value.code == 1 and b"closed" in err and err.count(b"\n") == 1


# How processes end


def started(bundle: Path, *options: str, **streams: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "trmt", "translate", str(bundle), "--max-length", "4", *options]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, **{**pipes, **streams})  # type: ignore[call-overload]


def errors_of(process: subprocess.Popen[bytes]) -> bytes:
    """The standard error of a process, which must end by itself."""
    assert process.stderr
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    with process:
        errors = process.stderr.read()
        process.wait()
        watchdog.cancel()
        if process.stdin:
            with suppress(BrokenPipeError):
                process.stdin.close()
    return errors


def ask(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin and process.stdout
    process.stdin.write(b"It rains.\n")
    process.stdin.flush()
    assert process.stdout.readline().endswith(b"\n")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_interrupt_ends_the_command_while_the_input_is_open(bundle: Path) -> None:
    process = started(bundle)
    ask(process)
    process.send_signal(signal.SIGINT)
    errors = errors_of(process)
    assert process.returncode == 130
    assert errors.count(b"\n") <= 1 and b"Traceback" not in errors


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_closed_output_ends_the_command_while_the_input_is_open(bundle: Path) -> None:
    process = started(bundle)
    ask(process)
    assert process.stdin and process.stdout
    process.stdout.close()
    process.stdin.write(b"It rains.\n")
    process.stdin.flush()
    assert errors_of(process) == b""
    assert process.returncode == 141


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX shell")
def test_head_and_a_closed_standard_error_cause_no_message(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "many").write_bytes(b"It rains.\n" * 3_000)
    program = f"'{sys.executable}' -m trmt translate '{bundle}' --max-length 2 --beam 1"
    shell = f"({program} < many; echo $? >> codes) {{}} | head -n 1"
    for errors in ("2> errors", "2>&-"):
        done = subprocess.run(
            ["sh", "-c", shell.format(errors)],
            cwd=tmp_path,
            capture_output=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        )
        assert done.stdout.count(b"\n") == 1 and done.stderr == b""
    assert (tmp_path / "errors").read_bytes() == b""
    assert (tmp_path / "codes").read_text().split() == ["141", "141"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full")
def test_a_full_disk_is_one_sentence(bundle: Path) -> None:
    with open("/dev/full", "wb") as full:
        process = started(bundle, stdout=full)
        assert process.stdin
        process.stdin.write(b"It rains.\n")
        process.stdin.flush()
        errors = errors_of(process)
    assert process.returncode == 1
    assert errors.startswith(b"error: cannot write the translations: No space left")
    assert errors.count(b"\n") == 1
