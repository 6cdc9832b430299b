"""Compressed text is known by its first bytes, read like plain text, and refused if it is damaged."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Command
from tests.scripted import random_bundle, small_tokenizer
from trmt.errors import ConfigError
from trmt.storage.compression import (
    DamagedText,
    Decompressed,
    compressing,
    compression_of,
    is_compressed,
    without_suffix,
)
from trmt.streaming import LineReader
from trmt.text.corpus import parse_corpus
from trmt.text.lines import read_lines
from trmt.text.pairs import count_pairs, read_corpus

try:
    from backports import zstd
except ImportError:
    zstd = None  # type: ignore[assignment]


def zstandard(data: bytes) -> bytes:
    if zstd is None:
        pytest.skip("needs backports.zstd")
    # With a checksum, as the program of the same name writes it.
    return bytes(zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1}))


Compress = Callable[[bytes], bytes]
FORMATS: dict[str, Compress] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
}
TEXT = "".join(f"line {number} ä\u2028 {random.Random(number).random()}\n" for number in range(9000)).encode()


@pytest.fixture(params=FORMATS)
def suffix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def text_of(data: bytes, name: str = "x") -> bytes:
    return io.BufferedReader(Decompressed(io.BytesIO(data), name)).read()


def test_the_first_bytes_decide_and_not_the_name(suffix: str) -> None:
    packed = FORMATS[suffix](TEXT)
    for name in ("text", "text.de", f"text{suffix}", "text.gz"):
        assert text_of(packed, name) == TEXT
    assert text_of(FORMATS[suffix](b"")) == b""


@pytest.mark.parametrize(
    "text",
    [
        b"", b"B", b"BZ", b"BZh", b"BZh9", b"BZh9 is not bzip2\n", b"(", b"P", b"P*\n", b"\x1f",
        b"\x1f\x8b\n", b"\xfd7zXY\n", b"7zXZ\n", b"plain\n" * 50_000,
    ],
    ids=lambda text: repr(text[:16]),
)  # fmt: skip
def test_other_bytes_are_handed_on_unchanged(text: bytes) -> None:
    assert text_of(text) == text
    assert compression_of(text) is None


def test_compressed_files_may_be_concatenated_and_padded(suffix: str) -> None:
    packed = FORMATS[suffix]
    assert text_of(packed(b"a\n") + packed(b"") + packed(TEXT) + packed(b"b")) == b"a\n" + TEXT + b"b"
    assert text_of(packed(b"a\n") + b"\0" * 8) == b"a\n"
    assert text_of(packed(b"a\n") + b"\0" * 8 + packed(b"b\n")) == b"a\nb\n"


class Trickle(io.RawIOBase):
    """Hands out one byte at a time, and between two of them nothing."""

    def __init__(self, data: bytes) -> None:
        self.data, self.turn = data, 0

    def read(self, size: int = -1) -> Any:
        self.turn += 1
        if self.turn % 2:
            return None
        first, self.data = self.data[:1], self.data[1:]
        return first


def test_a_stream_that_does_not_block_gives_the_same_text(suffix: str) -> None:
    for data, expected in (
        (FORMATS[suffix](TEXT[:300]) * 2, TEXT[:300] * 2),
        (TEXT[:300], TEXT[:300]),
    ):
        reader = Decompressed(Trickle(data), "x")  # type: ignore[arg-type]
        found = b""
        while (piece := reader.read(1000)) != b"":
            found += piece or b""
        assert found == expected


def test_a_line_is_there_as_soon_as_it_has_arrived() -> None:
    receiver, sender = os.pipe()
    with os.fdopen(receiver, "rb", buffering=0) as stream:
        lines = LineReader(Decompressed(stream, "x")).windows()  # type: ignore[arg-type]
        os.write(sender, b"Brot\n")
        assert next(lines) == [b"Brot"]
        os.write(sender, b"P\n")
        assert next(lines) == [b"P"]
        os.close(sender)
        assert list(lines) == []


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_an_error_wherever_it_ends(suffix: str, share: float) -> None:
    packed = FORMATS[suffix](TEXT)
    with pytest.raises(DamagedText, match=r"^x is damaged \(it ends too early\); download or compress"):
        text_of(packed[: max(int(share * len(packed)), 12)])


def test_a_changed_byte_is_an_error_or_changes_nothing(suffix: str) -> None:
    packed = FORMATS[suffix](TEXT)
    chooser = random.Random(1)
    for _ in range(60):
        at = chooser.randrange(len(packed))
        changed = packed[:at] + bytes([packed[at] ^ (1 << chooser.randrange(8))]) + packed[at + 1 :]
        try:
            # Without its first bytes it is another text, but not under a name that ends in .gz.
            assert text_of(changed, f"x{suffix}") == TEXT
        except DamagedText as error:
            assert str(error).count("\n") == 0


def test_what_follows_compressed_text_is_not_dropped(suffix: str) -> None:
    with pytest.raises(DamagedText, match="something else follows"):
        text_of(FORMATS[suffix](TEXT) + b"one more line\n")


def test_a_name_is_a_promise(suffix: str) -> None:
    for text in (b"plain\n", b""):
        with pytest.raises(DamagedText, match=rf"not compressed, although its name ends in \{suffix}"):
            text_of(text, f"x{suffix}")


def test_a_small_file_that_expands_to_much_is_read_in_small_pieces(suffix: str) -> None:
    packed = FORMATS[suffix](b"\0" * 50_000_000)
    reader = Decompressed(io.BytesIO(packed), "x")
    total = 0
    while piece := reader.read(1 << 16):
        total += len(piece)
        assert len(reader._text) <= 1 << 20
    assert total == 50_000_000


def test_without_its_package_zstandard_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"x\.zst is compressed with zstandard.*pip install 'trmt\[zstd\]'"):
        text_of(b"\x28\xb5\x2f\xfd....", "x.zst")


def test_what_is_written_under_such_a_name_is_compressed(suffix: str, tmp_path: Path) -> None:
    FORMATS[suffix](b"")  # skips where the package is missing
    with (tmp_path / f"t{suffix}").open("wb") as stream, compressing(stream, f"t{suffix}") as packed:
        packed.write(TEXT)
    assert is_compressed(str(tmp_path / f"t{suffix}"))
    assert text_of((tmp_path / f"t{suffix}").read_bytes()) == TEXT
    assert without_suffix(f"t.tsv{suffix}") == "t.tsv"


# Corpora


def test_corpora_are_read_from_compressed_files(suffix: str, tmp_path: Path) -> None:
    pairs = [(f"a{number}", f"b{number}") for number in range(300)]
    packed = FORMATS[suffix]
    tsv = "".join(f"{one}\t{other}\n" for one, other in pairs).encode()
    (tmp_path / f"pairs.tsv{suffix}").write_bytes(packed(tsv))
    (tmp_path / "unnamed.tsv").write_bytes(packed(tsv))
    for side, language in enumerate(("en", "de")):
        text = "".join(f"{pair[side]}\n" for pair in pairs).encode()
        (tmp_path / f"train.{language}{suffix}").write_bytes(packed(text))
    for name in (f"pairs.tsv{suffix}", "unnamed.tsv", "train"):
        corpus = parse_corpus(str(tmp_path / name), "en", "de")
        assert list(read_corpus(corpus)) == pairs
        assert count_pairs(corpus) == len(pairs)


def test_damage_is_named_with_its_line(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix}"
    packed = FORMATS[suffix](TEXT)
    path.write_bytes(packed[: len(packed) * 9 // 10])
    with pytest.raises(DamagedText, match=r"is damaged after line \d+ \(it ends too early\)"):
        list(read_lines(path))


# Translation


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    random_bundle(folder / "random", small_tokenizer(folder / "tokenizer"))
    return folder / "random"


def test_compressed_input_is_translated_like_plain_input(trmt: Command, bundle: Path, suffix: str) -> None:
    text = b"It rains.\n\nThe soup is hot.\n"
    plain = trmt("translate", bundle, "--max-length", "5", stdin=text)
    assert plain[0] == 0
    assert trmt("translate", bundle, "--max-length", "5", stdin=FORMATS[suffix](text)) == plain


def test_of_damaged_input_the_whole_lines_are_translated(trmt: Command, bundle: Path) -> None:
    packed = gzip.compress(b"It rains.\n" * 3)
    code, out, err = trmt("translate", bundle, "--max-length", "5", stdin=packed[:-4])
    assert code == 1 and out.count(b"\n") == 3
    assert err.startswith("error: standard input is damaged (it ends too early); ")
    assert err.endswith("the lines before this are translated\n") and err.count("\n") == 1
