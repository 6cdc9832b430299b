"""The parts of a file contain its translation as a stream, wherever it is cut and whichever workers die."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pools import Accident, FakePool
from tests.scripted import hostile_lines, random_bundle, small_tokenizer
from trmt import cli
from trmt.errors import BundleError, ConfigError, DataError, TrmtError
from trmt.scale.corpus_translating import CorpusOptions, TextPart, translate_corpus
from trmt.scale.pool import WorkerJob
from trmt.storage import files
from trmt.storage.locks import exclusive
from trmt.streaming import translate_stream
from trmt.translating import TranslateOptions, Translator

SHORT = TranslateOptions(search="greedy", max_length=6, device="cpu")
SMALL = 0.001  # MiB in a part, about a thousand bytes


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    random_bundle(folder / "random", small_tokenizer(folder / "text"))
    return folder / "random"


@pytest.fixture
def run(bundle: Path) -> Callable[..., list[str]]:
    """Translates with fake workers; returns the names of the parts they did."""

    def run(
        source: str | Path, out: str | Path, *, accident: Accident = lambda part: None, **more: Any
    ) -> Any:
        done: list[str] = []

        class WatchedPool(FakePool):
            def __exit__(self, *_: object) -> None:
                done.extend(self.done)

        options = {"part_mib": SMALL, "search": SHORT, "model": bundle, **more}
        corpus = CorpusOptions(source=str(source), out=str(out), **options)
        translate_corpus(corpus, lambda job: WatchedPool(job, accident=accident))
        return sorted(done)

    return run


def streamed(bundle: Path, data: bytes, search: TranslateOptions = SHORT, **options: Any) -> bytes:
    out = io.BytesIO()
    translate_stream(Translator.load(bundle, options=search), io.BytesIO(data), out, **options)
    return out.getvalue()


def parts(folder: Path) -> list[Path]:
    """The files that a shell finds with `part-*`."""
    return sorted(folder.glob("part-*"))


def joined(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in parts(folder))


def hostile(count: int, seed: int) -> bytes:
    return b"\n".join(hostile_lines(count, seed=seed))


def test_every_file_is_translated_as_a_stream_is(
    bundle: Path, run: Callable[..., list[str]], tmp_path: Path
) -> None:
    text = {
        "hostile.txt": b"\xef\xbb\xbf" + hostile(150, seed=3),
        "deep/in/it.txt": b"It rains.\r\n\xef\xbb\xbfIt rains.\n" * 60,
        "empty.txt": b"",
        "newlines": b"\n" * 2000,
    }
    for name, data in text.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "in" / ".hidden").write_text("not this\n")
    (tmp_path / "in" / "packed.txt.gz").write_bytes(gzip.compress(text["hostile.txt"]))
    done = run(tmp_path / "in", tmp_path / "out")
    assert len(parts(tmp_path / "out" / "hostile.txt")) > 3 and len(done) == len(set(done))
    for name, data in text.items():
        assert joined(tmp_path / "out" / name) == streamed(bundle, data), name
    assert joined(tmp_path / "out" / "packed.txt.gz") == streamed(bundle, text["hostile.txt"])
    assert not (tmp_path / "out" / ".hidden").exists()


@pytest.mark.parametrize("search", [SHORT, TranslateOptions(search="sampling", max_length=4, device="cpu")])
def test_line_numbers_and_samples_are_those_of_the_whole_file(
    bundle: Path, run: Callable[..., list[str]], tmp_path: Path, search: TranslateOptions
) -> None:
    data = b"It rains.\nNobody expected it.\n" * 60
    (tmp_path / "text").write_bytes(data)
    assert len(run(tmp_path / "text", tmp_path / "out", search=search, as_json=True)) > 1
    assert joined(tmp_path / "out") == streamed(bundle, data, search, as_json=True)


def test_a_second_start_translates_only_missing_parts(run: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(hostile(120, seed=4))
    assert len(run(tmp_path / "text", tmp_path / "out")) > 4
    before = {path.name: path.read_bytes() for path in parts(tmp_path / "out")}
    assert run(tmp_path / "text", tmp_path / "out") == []
    for name in ("part-00001", "part-00003"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / ".partial-part-00001-17-01234567").write_bytes(b"half")
    kept = {path: path.stat().st_mtime_ns for path in parts(tmp_path / "out")}
    assert run(tmp_path / "text", tmp_path / "out") == ["part-00001", "part-00003"]
    assert {path.name: path.read_bytes() for path in parts(tmp_path / "out")} == before
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    assert not list((tmp_path / "out").glob(".partial*"))


def test_input_and_output_in_a_store(bundle: Path, run: Callable[..., list[str]], tmp_path: Path) -> None:
    store, data = f"memory://{uuid.uuid4().hex}", hostile(60, seed=5)
    with files.atomic_file(f"{store}/in/a.txt") as stream:
        stream.write(data)
    run(f"{store}/in", f"{store}/out")
    names = [name for name in files.list_files(f"{store}/out/a.txt") if name.startswith("part-")]
    assert len(names) > 1
    found = b"".join(files.open_file(f"{store}/out/a.txt/{name}").read() for name in names)
    assert found == streamed(bundle, data)
    files.remove(f"{store}/out/a.txt/{names[1]}")
    assert run(f"{store}/in", f"{store}/out") == [f"a.txt/{names[1]}"]


def dies(*names: str) -> Accident:
    def accident(part: TextPart) -> str | None:
        return "died" if part.name in names else None

    return accident


def test_a_part_that_fails_is_named_and_the_others_are_done(
    bundle: Path, run: Callable[..., list[str]], tmp_path: Path
) -> None:
    data = hostile(120, seed=6)
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(TrmtError, match=r"1 parts are missing in .*, part-00002 because: a worker died"):
        run(tmp_path / "text", tmp_path / "out", accident=dies("part-00002"))
    there = [path.name for path in parts(tmp_path / "out")]
    assert "part-00002" not in there and len(there) > 3
    assert run(tmp_path / "text", tmp_path / "out") == ["part-00002"]
    assert joined(tmp_path / "out") == streamed(bundle, data)


def test_text_that_changes_after_the_cut_is_not_translated(
    run: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "text").write_bytes(b"It rains.\n" * 300)

    def changes(part: TextPart) -> None:
        (tmp_path / "text").write_bytes(b"It shone.\n" * 300)

    with pytest.raises(TrmtError, match=r"3 parts are missing .* has changed since it was split"):
        run(tmp_path / "text", tmp_path / "out", accident=changes)
    assert parts(tmp_path / "out") == []


def test_a_damaged_archive_is_named_and_the_others_are_done(
    run: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.gz").write_bytes(gzip.compress(hostile(50, seed=1))[:-20])
    (tmp_path / "in" / "good").write_bytes(b"It rains.\n")
    with pytest.raises(TrmtError, match=r"bad.gz/part-00000 because: .*bad.gz is damaged"):
        run(tmp_path / "in", tmp_path / "out")
    assert joined(tmp_path / "out" / "good").count(b"\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": TranslateOptions(beam=3, max_length=6, device="cpu")}, "search.beam was 4 and is 3"),
        ({"as_json": True}, "json was false and is true"),
        ({"part_mib": 0.002}, "part size was 0.001 and is 0.002"),
        ({"search": TranslateOptions(search="greedy", max_length=6, device="cuda")}, 'device was "cpu"'),
    ],
)
def test_a_second_start_with_other_options_is_refused(
    run: Callable[..., list[str]], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "text").write_bytes(b"It rains.\n")
    run(tmp_path / "text", tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "text", tmp_path / "out", **change)


def test_the_batch_size_may_change(run: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"It rains.\n")
    run(tmp_path / "text", tmp_path / "out")
    other = TranslateOptions(search="greedy", max_length=6, device="cpu", batch=3)
    assert run(tmp_path / "text", tmp_path / "out", search=other) == []


def test_another_model_and_a_changing_one_are_refused(
    bundle: Path, run: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "text").write_bytes(b"It rains.\n")
    run(tmp_path / "text", tmp_path / "out")
    other = tmp_path / "other"
    random_bundle(other, small_tokenizer(tmp_path / "t"), eagerness=3.0)
    with pytest.raises(ConfigError, match=r"model\.weights was"):
        run(tmp_path / "text", tmp_path / "out", model=other)

    def exchanged(job: WorkerJob) -> FakePool:
        random_bundle(other, small_tokenizer(tmp_path / "t"), eagerness=1.5)
        return FakePool(job)

    text, out = str(tmp_path / "text"), str(tmp_path / "out2")
    options = CorpusOptions(source=text, out=out, model=other, search=SHORT)
    with pytest.raises(BundleError, match="other weights on this machine than on the one that started"):
        translate_corpus(options, exchanged)


def test_two_commands_for_one_folder_are_refused(run: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"It rains.\n")
    with exclusive(tmp_path / "out"), pytest.raises(TrmtError, match="is at work in"):
        run(tmp_path / "text", tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "out", "error", "message"),
    [
        ("nothing", "out", DataError, "nothing is neither a file nor a folder"),
        ("in", "in", ConfigError, "is inside the input folder"),
        ("in", "in/out", ConfigError, "is inside the input folder"),
    ],
)
def test_impossible_paths_are_refused(
    run: Callable[..., list[str]], tmp_path: Path, source: str, out: str, error: type[TrmtError], message: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "text").write_bytes(b"It rains.\n")
    with pytest.raises(error, match=message):
        run(tmp_path / source, tmp_path / out)


def test_an_input_with_a_reserved_name_is_refused(run: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "manifest.json").write_bytes(b"It rains.\n")
    with pytest.raises(ConfigError, match=r"manifest.json has a name that is reserved"):
        run(tmp_path / "in", tmp_path / "out")


# The command


@pytest.mark.slow
def test_the_command_translates_in_processes(bundle: Path, tmp_path: Path) -> None:
    data = hostile(80, seed=8)
    (tmp_path / "text").write_bytes(data)
    words = f"--input {tmp_path}/text --output {tmp_path}/out --part-size 0.001 --workers 2"
    words = f"translate {bundle} --beam 1 --max-length 6 {words}"
    line = [sys.executable, "-m", "trmt", *words.split()]
    done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout == b"", done.stderr
    assert len(parts(tmp_path / "out")) > 1 and joined(tmp_path / "out") == streamed(bundle, data)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--part-size 1", "--part-size is for files translated in parts; give both"),
        ("--input . ", "is a folder, whose files are translated in parts; add --output FOLDER"),
        ("--output .", "is a folder; name a file with --output"),
        ("--ray auto", "give both --input and --output"),
        ("--input x --output y --part-size 0", "--part-size must be more than 0"),
        ("--input x --output y --ray 127.0.0.1:1 --threads 2", "leave out --threads"),
        ("--input . --output y --threads 2", "leave out --threads"),
    ],
)
def test_options_that_exclude_each_other(
    bundle: Path,
    words: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["trmt", "translate", str(bundle), *words.split()])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    found = capsys.readouterr().err
    assert caught.value.code == 1 and message in found and found.count("\n") == 1
