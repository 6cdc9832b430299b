"""`trmt translate` with files: what is a file, what a folder of parts, and that no line or file is lost."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path

import pytest

from tests.commands import Command
from tests.scripted import random_bundle, small_tokenizer
from trmt.storage import files

TEXT = b"It rains.\n\nThe soup is hot.\r\nbad \xff\nlast"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    random_bundle(folder / "random", small_tokenizer(folder / "tokenizer"))
    return folder / "random"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.en").write_bytes(TEXT)
    return tmp_path


def translated(
    trmt: Command, bundle: Path, *options: str | Path, stdin: bytes = b""
) -> tuple[int, bytes, str]:
    return trmt("translate", bundle, "--beam", "1", "--max-length", "5", *options, stdin=stdin)


@pytest.mark.parametrize("short", [True, False])
def test_files_and_streams_give_the_same_translation(
    trmt: Command, bundle: Path, work: Path, short: bool
) -> None:
    given, written = ("-i", "-o") if short else ("--input", "--output")
    code, expected, err = translated(trmt, bundle, stdin=TEXT)
    assert code == 0 and expected.count(b"\n") == 5
    assert translated(trmt, bundle, given, "text.en") == (0, expected, err)
    assert translated(trmt, bundle, given, "text.en", written, "-") == (0, expected, err)
    assert translated(trmt, bundle, given, "-", written, "one.de", stdin=TEXT) == (0, b"", err)
    assert translated(trmt, bundle, given, "text.en", written, "two.de") == (0, b"", err)
    assert (work / "one.de").read_bytes() == (work / "two.de").read_bytes() == expected
    assert sorted(path.name for path in work.iterdir()) == ["one.de", "text.en", "two.de"]


def test_the_name_of_the_output_says_how_it_is_compressed(trmt: Command, bundle: Path, work: Path) -> None:
    expected = translated(trmt, bundle, stdin=TEXT)[1]
    (work / "packed").write_bytes(bz2.compress(TEXT))
    assert translated(trmt, bundle, "-i", "packed", "-o", "out.de.gz")[0] == 0
    assert gzip.decompress((work / "out.de.gz").read_bytes()) == expected
    assert (work / "out.de.gz").read_bytes()[4:8] == bytes(4), "a time stamp"


def test_files_behind_urls(trmt: Command, bundle: Path, work: Path) -> None:
    expected = translated(trmt, bundle, stdin=TEXT)[1]
    url = f"file://{work}"
    assert translated(trmt, bundle, "-i", f"{url}/text.en", "-o", f"{url}/new/text.de")[0] == 0
    with files.open_file(f"{url}/new/text.de") as stream:
        assert stream.read() == expected


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("-i", "text.en", "-o", "folder"), "folder/part-00000"),
        (("-i", "text.en", "-o", "made/"), "made/part-00000"),
        (("-i", "text.en", "-o", "made", "--part-size", "1"), "made/part-00000"),
        (("-i", "texts", "-o", "made"), "made/text.en/part-00000"),
    ],
    ids=str,
)
def test_a_folder_is_written_in_parts(
    trmt: Command, bundle: Path, work: Path, options: tuple[str, ...], parts: str
) -> None:
    expected = translated(trmt, bundle, stdin=TEXT)[1]
    (work / "folder").mkdir()
    (work / "texts").mkdir()
    (work / "texts" / "text.en").write_bytes(TEXT)
    code, out, err = translated(trmt, bundle, *options, "--device", "cpu", "--workers", "1")
    assert (code, out) == (0, b""), err
    assert (work / parts).read_bytes() == expected
    assert (work / parts.partition("/")[0] / "manifest.json").is_file()


def test_damaged_input_leaves_no_output_file(trmt: Command, bundle: Path, work: Path) -> None:
    (work / "out.de").write_bytes(b"of an earlier command\n")
    (work / "damaged").write_bytes(gzip.compress(TEXT)[:-3])
    code, out, err = translated(trmt, bundle, "-i", "damaged", "-o", "out.de")
    assert (code, out) == (1, b"") and err.splitlines()[-1].startswith(
        "error: damaged is damaged (it ends too early"
    )
    assert (work / "out.de").read_bytes() == b"of an earlier command\n"
    assert sorted(path.name for path in work.iterdir()) == ["damaged", "out.de", "text.en"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-i", "nowhere"), "there is no file nowhere"),
        (("-i", "."), ". is a folder, whose files are translated in parts; add --output FOLDER"),
        (("-o", "."), ". is a folder; name a file with --output"),
        (("-i", "text.en", "-o", "text.en"), "text.en is the input; choose another file"),
        (("-i", "text.en", "-o", "./text.en"), "is the input; choose another file"),
        (("-i", "text.en", "-o", "link.en"), "is the input; choose another file"),
        (("-i", "text.en", "-o", "text.en/x"), "cannot write text.en/x"),
        (("--ray", "auto", "-o", "x"), "--ray is for files translated in parts"),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence_and_touch_no_file(
    trmt: Command, bundle: Path, work: Path, options: tuple[str, ...], words: str
) -> None:
    (work / "link.en").symlink_to("text.en")
    before = {path: path.read_bytes() for path in work.iterdir()}
    code, out, err = translated(trmt, bundle, *options)
    assert (code, out) == (1, b"") and words in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert {path: path.read_bytes() for path in work.iterdir()} == before
