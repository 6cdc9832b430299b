"""Files in parts are translated as a stream is, wherever they are cut and whoever dies."""

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

from tests.fleets import Accident, FakeFleet
from tests.scripted import hostile_lines, random_bundle, small_tokenizer
from trmt import cli
from trmt.errors import BundleError, ConfigError, DataError, TrmtError
from trmt.scale.corpus_translating import CorpusOptions, TextPart, translate_corpus
from trmt.scale.fleet import Job
from trmt.storage import files
from trmt.storage.locks import exclusive
from trmt.streaming import translate_stream
from trmt.translating import TranslateOptions, Translator

SHORT = TranslateOptions(search="greedy", max_length=6, device="cpu")
SMALL = 0.001  # MiB in a part: a thousand bytes


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bundle")
    random_bundle(place / "random", small_tokenizer(place / "text"))
    return place / "random"


@pytest.fixture
def run(bundle: Path) -> Callable[..., list[str]]:
    """Translates, and tells which parts were done; `accident` befalls the fake workers."""

    def run(
        source: str | Path, out: str | Path, *, accident: Accident = lambda part: None, **more: Any
    ) -> Any:
        done: list[str] = []

        class Watched(FakeFleet):
            def __exit__(self, *_: object) -> None:
                done.extend(self.done)

        options = {"part_mib": SMALL, "search": SHORT, "model": bundle, **more}
        asked = CorpusOptions(source=str(source), out=str(out), **options)
        translate_corpus(asked, lambda job: Watched(job, accident=accident))
        return sorted(done)

    return run


def streamed(bundle: Path, data: bytes, search: TranslateOptions = SHORT, **options: Any) -> bytes:
    out = io.BytesIO()
    translate_stream(Translator.load(bundle, options=search), io.BytesIO(data), out, **options)
    return out.getvalue()


def parts(folder: Path) -> list[Path]:
    """As a shell finds them: `part-*`."""
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
def test_numbers_and_samples_are_those_of_the_whole_file(
    bundle: Path, run: Callable[..., list[str]], tmp_path: Path, search: TranslateOptions
) -> None:
    data = b"It rains.\nNobody expected it.\n" * 60
    (tmp_path / "text").write_bytes(data)
    assert len(run(tmp_path / "text", tmp_path / "out", search=search, as_json=True)) > 1
    assert joined(tmp_path / "out") == streamed(bundle, data, search, as_json=True)


def test_going_on_does_what_is_missing_only(run: Callable[..., list[str]], tmp_path: Path) -> None:
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


def test_from_store_to_store(bundle: Path, run: Callable[..., list[str]], tmp_path: Path) -> None:
    place, data = f"memory://{uuid.uuid4().hex}", hostile(60, seed=5)
    with files.atomic_file(f"{place}/in/a.txt") as stream:
        stream.write(data)
    run(f"{place}/in", f"{place}/out")
    names = [name for name in files.list_files(f"{place}/out/a.txt") if name.startswith("part-")]
    assert len(names) > 1
    found = b"".join(files.open_file(f"{place}/out/a.txt/{name}").read() for name in names)
    assert found == streamed(bundle, data)
    files.remove(f"{place}/out/a.txt/{names[1]}")
    assert run(f"{place}/in", f"{place}/out") == [f"a.txt/{names[1]}"]


def dies(*names: str) -> Accident:
    def accident(part: TextPart) -> str | None:
        return "died" if part.name in names else None

    return accident


def test_a_part_that_cannot_be_done_is_named_and_the_others_are_there(
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


def test_a_damaged_archive_is_named_and_the_others_are_there(
    run: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.gz").write_bytes(gzip.compress(hostile(50, seed=1))[:-20])
    (tmp_path / "in" / "good").write_bytes(b"It rains.\n")
    with pytest.raises(TrmtError, match=r"bad.gz/part-00000 because: .*bad.gz is damaged"):
        run(tmp_path / "in", tmp_path / "out")
    assert joined(tmp_path / "out" / "good").count(b"\n") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"search": TranslateOptions(beam=3, max_length=6, device="cpu")}, "search.beam was 4 and is 3"),
        ({"as_json": True}, "json was false and is true"),
        ({"part_mib": 0.002}, "part size was 0.001 and is 0.002"),
        ({"search": TranslateOptions(search="greedy", max_length=6, device="cuda")}, 'device was "cpu"'),
    ],
)
def test_a_second_start_with_other_options_is_refused(
    run: Callable[..., list[str]], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    (tmp_path / "text").write_bytes(b"It rains.\n")
    run(tmp_path / "text", tmp_path / "out")
    with pytest.raises(ConfigError, match=said):
        run(tmp_path / "text", tmp_path / "out", **change)


def test_batches_may_be_others(run: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"It rains.\n")
    run(tmp_path / "text", tmp_path / "out")
    other = TranslateOptions(search="greedy", max_length=6, device="cpu", batch=3)
    assert run(tmp_path / "text", tmp_path / "out", search=other) == []


def test_another_model_is_refused_and_so_is_one_that_changes(
    bundle: Path, run: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "text").write_bytes(b"It rains.\n")
    run(tmp_path / "text", tmp_path / "out")
    other = tmp_path / "other"
    random_bundle(other, small_tokenizer(tmp_path / "t"), eagerness=3.0)
    with pytest.raises(ConfigError, match=r"model\.weights was"):
        run(tmp_path / "text", tmp_path / "out", model=other)

    def exchanged(job: Job) -> FakeFleet:
        random_bundle(other, small_tokenizer(tmp_path / "t"), eagerness=1.5)
        return FakeFleet(job)

    text, out = str(tmp_path / "text"), str(tmp_path / "out2")
    options = CorpusOptions(source=text, out=out, model=other, search=SHORT)
    with pytest.raises(BundleError, match="other weights there than where the work was begun"):
        translate_corpus(options, exchanged)


def test_two_at_once_are_refused(run: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"It rains.\n")
    with exclusive(tmp_path / "out"), pytest.raises(TrmtError, match="is at work in"):
        run(tmp_path / "text", tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "out", "kind", "said"),
    [
        ("nothing", "out", DataError, "there is no file .*nothing, and no folder"),
        ("in", "in", ConfigError, "is in the folder that is translated"),
        ("in", "in/out", ConfigError, "is in the folder that is translated"),
    ],
)
def test_places_that_cannot_be(
    run: Callable[..., list[str]], tmp_path: Path, source: str, out: str, kind: type[TrmtError], said: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "text").write_bytes(b"It rains.\n")
    with pytest.raises(kind, match=said):
        run(tmp_path / source, tmp_path / out)


def test_a_file_called_like_ours_is_refused(run: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "manifest.json").write_bytes(b"It rains.\n")
    with pytest.raises(ConfigError, match=r"manifest.json is called like a file of ours"):
        run(tmp_path / "in", tmp_path / "out")


# The command


@pytest.mark.slow
def test_the_command_works_in_processes(bundle: Path, tmp_path: Path) -> None:
    data = hostile(80, seed=8)
    (tmp_path / "text").write_bytes(data)
    words = f"--input {tmp_path}/text --output {tmp_path}/out --part-size 0.001 --workers 2"
    words = f"translate {bundle} --beam 1 --max-length 6 {words}"
    line = [sys.executable, "-m", "trmt", *words.split()]
    done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout == b"", done.stderr
    assert len(parts(tmp_path / "out")) > 1 and joined(tmp_path / "out") == streamed(bundle, data)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--input x", "--input is for files translated in parts; give both"),
        ("--output x", "give both --input and --output"),
        ("--ray auto", "give both --input and --output"),
        ("--input x --output y --part-size 0", "--part-size is more than 0"),
        ("--input x --output y --ray 127.0.0.1:1 --threads 2", "leave out --threads"),
        ("--input x --output y --threads 2", "leave out --threads"),
    ],
)
def test_options_that_cannot_be_together(
    bundle: Path, words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trmt", "translate", str(bundle), *words.split()])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    found = capsys.readouterr().err
    assert caught.value.code == 1 and said in found and found.count("\n") == 1
