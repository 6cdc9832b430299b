"""One output line for one input line, in order, whatever the bytes, the network and the chunks of input."""

from __future__ import annotations

import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import pytest

from tests import texts
from tests.scripted import (
    ENDLESS,
    Script,
    Scripted,
    hostile_line,
    hostile_lines,
    random_bundle,
    small_tokenizer,
)
from trmt.errors import DataError
from trmt.streaming import StreamReport, translate_stream
from trmt.text.tokenizer import Tokenizer
from trmt.translating import TranslateOptions, Translator

GREEDY = TranslateOptions(search="greedy", batch=256)
# Whatever some program takes for the end of a line.
LINE_ENDS = re.compile("[\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029]")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "random"
    random_bundle(folder, tokenizer, feed_forward=64, d_model=32)
    return folder


def scripted(
    tokenizer: Tokenizer, script: Script, *, longest: int = 60, options: TranslateOptions = GREEDY
) -> Translator:
    net = Scripted(script, vocabulary=tokenizer.target.vocabulary, eos=tokenizer.target.eos)
    return Translator(net, tokenizer, longest=longest, options=options)


def in_chunks(data: bytes, *, seed: int) -> Iterator[bytes]:
    """The bytes in pieces of any size, most of them small at first."""
    chooser = random.Random(seed)
    place = 0
    while place < len(data):
        size = chooser.choice([1, 2, 3, 17, 100, 4096, 65536, 200_000])
        yield data[place : place + size]
        place += size


def through_pipes(translator: Translator, chunks: Iterable[bytes]) -> tuple[bytes, StreamReport]:
    """What a program at the other ends of two real pipes gets."""
    their_end, source = os.pipe()
    result, our_end = os.pipe()
    got: list[bytes] = []

    def write() -> None:
        with open(source, "wb", buffering=0) as pipe:
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    view = view[pipe.write(view) :]

    def read() -> None:
        with open(result, "rb") as pipe:
            got.append(pipe.read())

    threads = [threading.Thread(target=write), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    with open(their_end, "rb", buffering=0) as source_pipe, open(our_end, "wb") as out_pipe:
        report = translate_stream(translator, source_pipe, out_pipe)
    for thread in threads:
        thread.join(timeout=30)
    return got[0], report


def lines_of(output: bytes) -> list[str]:
    """The lines of an output, each of which every program takes for one line; CR stands at ends only."""
    assert output.endswith(b"\n")
    lines = output.decode().split("\n")[:-1]
    for line in lines:
        assert not LINE_ENDS.search(line.removesuffix("\r")), line
        assert "\0" not in line
    return lines


def visible(text: str) -> str:
    """What a copy must keep: all but white space, control characters and sentencepiece's mark."""
    normal = unicodedata.normalize("NFC", " ".join(text.split()))
    return "".join(
        character
        for character in normal
        if not character.isspace() and unicodedata.category(character) != "Cc" and character != "\u2581"
    )


# A network that copies


@pytest.mark.parametrize(("longest", "count"), [(7, 1_000), (60, 5_000)])
def test_a_copying_network_returns_every_hostile_line_in_order(
    tokenizer: Tokenizer, longest: int, count: int
) -> None:
    lines = list(hostile_lines(count, seed=longest))
    output, report = through_pipes(
        scripted(tokenizer, lambda ids: ids, longest=longest),
        in_chunks(b"\n".join(lines) + b"\n", seed=longest),
    )
    answers = lines_of(output)
    assert len(answers) == len(lines) == report.lines
    for number, (line, answer) in enumerate(zip(lines, answers, strict=True)):
        text = line.removesuffix(b"\r").decode(errors="replace")
        text = text.removeprefix("\ufeff") if number == 0 else text
        assert visible(answer) == visible(text), line
        assert answer.endswith("\r") == line.endswith(b"\r")
    assert len(report.split) > 100, "some of the lines have to be cut"
    invalid = [number for number, line in enumerate(lines, 1) if b"\xff" in line]
    assert set(invalid) <= set(report.undecodable)


# A network that emits junk


def junk_script(tokenizer: Tokenizer, *, head: int) -> Script:
    """Junk, the first ids of the source, junk: bytes of newlines and of no UTF-8, special ids, no end."""
    side = tokenizer.target
    spelled = {piece: token for token, piece in enumerate(side.pieces(range(side.vocabulary)))}

    def spell(*values: int) -> list[int]:
        return [spelled[f"<0x{value:02X}>"] for value in values]

    junk = [
        spell(0x0A), spell(0x0D), spell(0x0D, 0x0A), spell(0), spell(0xE2, 0x80, 0xA8), spell(0xC2, 0x85),
        spell(0xE2, 0x80, 0xA9), spell(0xFF), spell(0xED, 0xA0, 0x80), spell(0xF0, 0x9F), spell(0x0B, 0x0C),
        spell(0x1C, 0x1D, 0x1E), spell(0x09), spell(0xEF, 0xBB, 0xBF), spell(0x20), [4],
    ]  # fmt: skip
    # Banned tokens are not chosen; after them this network only wants to end.
    banned = [[side.unk], [side.bos], [side.pad]]

    def script(ids: list[int]) -> list[int]:
        chooser = random.Random(str(ids))
        before = chain.from_iterable(chooser.choices(junk, k=chooser.randrange(4)))
        after = chain.from_iterable(chooser.choices([*junk, *banned], k=chooser.randrange(4)))
        endless = [spelled["<0x0A>"], ENDLESS] if chooser.random() < 0.05 else []
        return [*before, *ids[:head], *after, *endless]

    return script


def test_junk_from_the_network_breaks_no_line(tokenizer: Tokenizer) -> None:
    chooser = random.Random(3)
    lines = [b"#%05d# %s" % (number, hostile_line(chooser)) for number in range(5_000)]
    translator = scripted(tokenizer, junk_script(tokenizer, head=9))
    output, _ = through_pipes(translator, in_chunks(b"\n".join(lines), seed=3))
    answers = lines_of(output)
    assert len(answers) == len(lines)
    for number, answer in enumerate(answers):
        found = re.search(r"#\s*((?:\d\s*){5})#", answer)
        assert found and int(re.sub(r"\s", "", found[1])) == number, answer


@pytest.mark.parametrize("search", ["beam", "sampling"])
def test_junk_in_json_and_in_n_best_breaks_no_line(tokenizer: Tokenizer, search: str) -> None:
    options = TranslateOptions(search=search, n_best=3)  # type: ignore[arg-type]
    translator = scripted(tokenizer, junk_script(tokenizer, head=9), options=options)
    lines = [b"%d %s" % (number, line) for number, line in enumerate(hostile_lines(150, seed=5))]
    output, _ = through_pipes(translator, [b"\n".join(lines)])
    answers = lines_of(output)
    assert len(answers) == len(lines)
    assert {answer.count("\t") for answer in answers} == {2}


@pytest.mark.parametrize("emitted", [[], [1, 1], [0]])
def test_a_network_without_output_gives_blank_lines(tokenizer: Tokenizer, emitted: list[int]) -> None:
    output, report = through_pipes(scripted(tokenizer, lambda ids: emitted), [b"one\n\ntwo\r\nthree"])
    assert output.count(b"\n") == 4 == report.lines


def test_a_network_that_never_ends_is_stopped(tokenizer: Tokenizer) -> None:
    [word] = tokenizer.target.encode(["a"])[0]
    translator = scripted(tokenizer, lambda ids: [word, ENDLESS])
    [first, second] = lines_of(through_pipes(translator, [b"a\na a a a a a\n"])[0])
    assert first.split() == ["a"] * 51
    assert second.split() == ["a"] * 56


# Ends of lines, ends of streams


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        (b"", b""),
        (b"\n", b"\n"),
        (b"\r\n", b"\r\n"),
        (b"\r", b"\r\n"),
        (b"one", b"one\n"),
        (b"one\ntwo", b"one\ntwo\n"),
        (b"one\r\ntwo\n", b"one\r\ntwo\n"),
        (b"one\r\r\n", b"one\r\n"),
        (b"one\rtwo\n", b"one two\n"),
        (b"\n\n \n\t\n\n", b"\n\n\n\n\n"),
        (b"one\xe2\x80\xa8two\x0bthree\n", b"one two three\n"),
        (b"\xef\xbb\xbfone\n", b"one\n"),
        (b"\xef\xbb\xbf\n", b"\n"),
        ("\u3000 \u00a0\n".encode(), b"\n"),
    ],
)
def test_ends_of_lines(tokenizer: Tokenizer, given: bytes, answer: bytes) -> None:
    output, report = through_pipes(scripted(tokenizer, lambda ids: ids), [given])
    assert output == answer
    assert report.lines == answer.count(b"\n")


def test_a_program_that_waits_for_each_translation_gets_it(tokenizer: Tokenizer) -> None:
    their_end, source = os.pipe()
    result, our_end = os.pipe()
    translator = scripted(tokenizer, lambda ids: ids)

    def translate() -> None:
        with open(their_end, "rb", buffering=0) as source_pipe, open(our_end, "wb") as out_pipe:
            translate_stream(translator, source_pipe, out_pipe)

    worker = threading.Thread(target=translate, daemon=True)
    worker.start()
    with open(result, "rb") as answers:
        for sentence in (b"one\n", b"two\r\n", b"\n", b"three\n"):
            os.write(source, sentence)
            assert answers.readline() == sentence
        os.write(source, b"no ")
        os.write(source, b"end")
        os.close(source)
        assert answers.read() == b"no end\n"
    worker.join(timeout=10)


def test_an_input_that_fails_loses_no_whole_line(tokenizer: Tokenizer) -> None:
    class Failing(io.RawIOBase):
        chunks = iter([b"one\ntw", b"o\nthree"])

        def read(self, size: int = -1) -> bytes:
            chunk = next(self.chunks, None)
            if chunk is None:
                raise OSError(5, "Input/output error")
            return chunk

    out = io.BytesIO()
    with pytest.raises(DataError, match="cannot read the input: Input/output error"):
        translate_stream(scripted(tokenizer, lambda ids: ids), Failing(), out)  # type: ignore[arg-type]
    assert out.getvalue() == b"one\ntwo\n", "of the third line the rest may be missing"


def test_an_input_that_does_not_block_is_waited_for(tokenizer: Tokenizer) -> None:
    their_end, source = os.pipe()
    os.set_blocking(their_end, False)

    def write() -> None:
        for piece in (b"on", b"e\n", b"two\n"):
            threading.Event().wait(0.05)
            os.write(source, piece)
        os.close(source)

    writer = threading.Thread(target=write)
    writer.start()
    out = io.BytesIO()
    with open(their_end, "rb", buffering=0) as pipe:
        translate_stream(scripted(tokenizer, lambda ids: ids), pipe, out)
    writer.join()
    assert out.getvalue() == b"one\ntwo\n"


# The command


def command(bundle: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "trmt", "translate", str(bundle), *options]


def run(bundle: Path, data: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(bundle, *options), input=data, capture_output=True, timeout=500, check=True)


def check_command(bundle: Path, count: int, *options: str) -> None:
    lines = list(hostile_lines(count, seed=count))
    done = run(bundle, b"\n".join(lines) + b"\n", *options)
    answers = lines_of(done.stdout)
    assert len(answers) == count
    for line, answer in zip(lines, answers, strict=True):
        if not line.decode(errors="replace").strip():
            assert not answer.strip(), line
        assert answer.endswith("\r") == line.endswith(b"\r")
    assert b"Traceback" not in done.stderr


def test_the_command_answers_hostile_lines(bundle: Path) -> None:
    check_command(bundle, 250, "--beam", "2", "--max-length", "20")


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--beam", "1"], [], ["--sample", "--top-k", "50"]])
def test_the_command_answers_thousands_of_hostile_lines(bundle: Path, options: list[str]) -> None:
    check_command(bundle, 4_000, "--max-length", "20", *options)


def test_a_program_that_writes_one_line_and_waits_gets_its_answer(bundle: Path) -> None:
    process = subprocess.Popen(
        command(bundle, "--max-length", "5"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        for number in range(5):
            process.stdin.write(b"%d more\n" % number)
            process.stdin.flush()
            assert process.stdout.readline().endswith(b"\n"), "killed by the watchdog"
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"\n"
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.wait() == 0
    finally:
        watchdog.cancel()
        process.kill()
        process.stdout.close()


def test_output_starts_before_the_input_ends(bundle: Path) -> None:
    """The input is longer than what pipes hold, and its end is written only after the first answer."""
    process = subprocess.Popen(
        command(bundle, "--beam", "1", "--max-length", "2"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin and process.stdout
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    answered = threading.Event()
    count = 500

    def write() -> None:
        assert process.stdin
        for _ in range(count):
            process.stdin.write(b"%s\n" % (b"word " * 15))
        process.stdin.flush()
        answered.wait(60)
        process.stdin.write(b"the end\n")
        process.stdin.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        first = process.stdout.readline()
        answered.set()
        assert first
        assert len(process.stdout.readlines()) == count
        assert process.wait() == 0
    finally:
        watchdog.cancel()
        process.kill()
        writer.join()
        process.stdout.close()


# The same text whatever the batch


def check_batches(bundle: Path, count: int, *, ways: list[tuple[int, int]]) -> None:
    """`ways` are pairs of a batch size and a number of threads."""
    chooser = random.Random(count)
    words = " ".join(texts.ENGLISH).split()
    sentences = [" ".join(chooser.choices(words, k=chooser.randrange(1, 13))) for _ in range(count)]
    data = "".join(f"{sentence}\n" for sentence in sentences).encode()
    options = ["--json", "--max-length", "12"]
    outputs = [
        run(bundle, data, "--batch", str(batch), "--threads", str(threads), *options).stdout
        for batch, threads in ways
    ]
    translations = [json.loads(line)["translation"] for line in outputs[0].splitlines()]
    assert len(translations) == count
    assert len(set(translations)) > len(set(sentences)) / 4, "translations have to differ"
    assert len(set(outputs)) == 1


@pytest.fixture(scope="module")
def wider_bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "wider"
    random_bundle(folder, tokenizer, d_model=64, feed_forward=256, heads=4)
    return folder


def test_text_and_scores_do_not_depend_on_batch_and_threads(wider_bundle: Path) -> None:
    check_batches(wider_bundle, 60, ways=[(1, 1), (7, 1), (64, 1), (64, 2)])


@pytest.mark.slow
def test_text_and_scores_do_not_depend_on_batch_and_threads_for_thousands(wider_bundle: Path) -> None:
    check_batches(wider_bundle, 2_000, ways=[(16, 1), (64, 1), (16, 2), (64, 2)])
