"""trmt attend: lines in; text, figures and pages out."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import commands, texts
from tests.fakes import small_network
from tests.scripted import random_bundle, small_tokenizer
from trmt.bundles import bundles
from trmt.insight.heatmaps.page import compress
from trmt.insight.heatmaps.weights import attention_weights
from trmt.text.tokenizer import Tokenizer
from trmt.translating import TranslateOptions, Translator

Command = Callable[..., tuple[int, str, str]]
HOSTILE = "</script><script>alert(1)</script> <!-- & \u2028 \u202e ${x} $title"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "random <b>"
    random_bundle(folder, tokenizer)
    return folder


def other_bundle(folder: Path, tokenizer: Tokenizer, architecture: str, **options: Any) -> Path:
    size = tokenizer.source.vocabulary
    net = small_network(architecture, source_vocabulary=size, target_vocabulary=size, **options)
    manifest = bundles.make_manifest(net, architecture, tokenizer, longest={"source": 40, "target": 40})
    bundles.save_bundle(folder, manifest, net.state_dict(), tokenizer)
    return folder


@pytest.fixture
def command(trmt: commands.Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Runs trmt attend in an empty folder, on a wide terminal: (exit code, output, error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str | Path, stdin: bytes = b"") -> tuple[int, str, str]:
        code, out, err = trmt("attend", *arguments, stdin=stdin)
        return code, out.decode(), err

    return run


def test_lines_are_translated_or_come_with_a_translation(
    command: Command, bundle: Path, tokenizer: Tokenizer
) -> None:
    given = f"{texts.ENGLISH[0]}\n{texts.ENGLISH[1]}\t{texts.GERMAN[1]}\n"
    code, out, _ = command(bundle, "--words", stdin=b"\xef\xbb\xbf" + given.encode())
    assert code == 0
    translator = Translator.load(bundle, options=TranslateOptions(beam=4))
    [translated] = translator.translate([texts.ENGLISH[0]])
    first, second = out.split("2  mean of the layers, mean of the heads")
    assert first.startswith("1  mean of the layers, mean of the heads")
    rows = [line.split()[0] for line in second.splitlines() if re.match(r" *\S+ [ ░▒▓█]+$", line)]
    assert "".join(rows) == texts.GERMAN[1].replace(" ", "") + "</s>"
    for word in tokenizer.target.normalise(translated.text).split()[:3]:
        assert word[:5] in first


def test_lines_that_cannot_be_drawn_are_named(command: Command, bundle: Path) -> None:
    lines = ["", "ok", "word " * 300, "\t", "a\t" + "b " * 300, "x " * 50]
    code, out, err = command(bundle, "--beam", "1", stdin="\n".join(lines).encode() + b"\n\xff\r\n")
    assert code == 0
    assert re.findall(r"^(\d+)  mean", out, re.MULTILINE) == ["2", "6", "7"]
    for number in (1, 4):
        assert f"line {number} has no source and is skipped" in err
    for number in (3, 5):
        assert f"line {number} has more pieces than the 127 of the network and is skipped" in err
    assert "line 6 is longer than anything in training" in err
    assert "line 7 is not valid UTF-8" in err


def test_impossible_options_are_refused(
    command: Command, bundle: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    fixed = other_bundle(tmp_path / "fixed", tokenizer, "rnn", context="start")
    recurrent = other_bundle(tmp_path / "rnn", tokenizer, "rnn")
    for arguments, message in (
        ((fixed, "--source", "x"), "has no attention: its decoder uses a fixed vector of the source"),
        ((recurrent, "--source", "x", "--kind", "encoder"), "no attention of kind encoder; choose cross"),
        ((bundle, "--source", "x", "--layer", "3"), "--layer 3 is too high"),
        ((bundle, "--source", "x", "--head", "3"), "has 2; lower it"),
        ((bundle, "--source", "x", "--kind", "sideways"), "choose cross, encoder, decoder"),
        ((bundle, "--source", "x", "--kind", "cross", "--kind", "decoder"), "let --output end in .html"),
        ((bundle, "--source", "x", "--out", "a.gif"), "end it in .html, .png, .svg, .pdf"),
        ((bundle, "--target", "x"), "give both"),
        ((bundle, "--source", " ", "--out", "a.html"), "no line whose attention can be drawn"),
    ):
        code, out, err = command(*arguments)
        assert (code, out) == (1, "") and message in err, err
    assert not list(tmp_path.glob("a.*"))


def test_a_figure_for_each_line(command: Command, bundle: Path, tmp_path: Path) -> None:
    assert command(bundle, "--source", "one", "--target", "two", "--out", "one.svg")[0] == 0
    assert command(bundle, "--layer", "1", "--out", "each.svg", stdin=b"a b\n\nc\td\n")[0] == 0
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["each-1.svg", "each-3.svg", "one.svg"]
    assert "layer 1, mean of the heads" in (tmp_path / "each-3.svg").read_text()


class Page:
    """The data of a page, read independently of the code that wrote it."""

    def __init__(self, path: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        found = re.findall(r"<script([^>]*)>(.*?)</script>", self.text, re.DOTALL)
        self.about = json.loads(next(body for head, body in found if 'id="about"' in head))
        self.sentences = [json.loads(body)["axes"] for head, body in found if 'class="sentence"' in head]
        self.weights = {name[1]: body for head, body in found if (name := re.search(r'id="(\w+-\d+)"', head))}
        self.scripts = [body for head, body in found if not head]

    def read(self, kind: str, number: int) -> torch.Tensor:
        rows, columns = (len(self.sentences[number][name]["pieces"]) for name in self.about["axes"][kind])
        sizes = self.about["sizes"][kind]
        packed = bytearray(zlib.decompress(base64.b64decode(self.weights[f"{kind}-{number}"])))
        flat = torch.frombuffer(packed, dtype=torch.uint8).double() / 255
        return (flat**2).view(sizes["layers"], sizes["heads"], rows, columns)


def test_a_page_contains_the_weights_of_the_network(
    command: Command, bundle: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pairs = list(zip(texts.ENGLISH[:3], texts.ALL["ar"][:3], strict=True))
    stdin = "".join(f"{source}\t{target}\n" for source, target in pairs).encode()
    code, _, err = command(bundle, "--out", "page.html", "--head", "2", "--words", stdin=stdin)
    assert code == 0 and "3 sentences -> page.html" in err
    page = Page(tmp_path / "page.html")
    assert page.about["choice"] == {"kind": "cross", "layer": 0, "head": 2, "unit": "words"}
    assert page.about["kinds"] == ["cross", "encoder", "decoder"]
    net = bundles.load_bundle(bundle).net
    ids = [(tokenizer.source.encode([a])[0], tokenizer.target.encode([b])[0]) for a, b in pairs]
    for number, expected in enumerate(
        attention_weights(net, tokenizer, ids, kinds=("cross", "encoder", "decoder"))
    ):
        axes = page.sentences[number]
        assert (axes["target"]["rightToLeft"], axes["source"]["rightToLeft"]) == (True, False)
        assert axes["target"]["words"] == [*re.findall(r"[^\s.؟،]+|[.؟،]", pairs[number][1]), "</s>"]
        assert axes["target"]["ends"][-1] == len(axes["target"]["pieces"])
        for kind, weights in expected.weights.items():
            torch.testing.assert_close(page.read(kind, number), weights.double(), atol=0.005, rtol=0)


def test_small_weights_are_precise() -> None:
    weights = torch.linspace(0, 1, 1001).view(1, 1, 1, 1001)
    back = zlib.decompress(base64.b64decode(compress(weights)))
    error = (torch.tensor(list(back)) / 255) ** 2 - weights.flatten()
    assert error.abs().max() < 0.002 + 0.002
    assert error[weights.flatten() < 0.05].abs().max() < 0.001


def test_hostile_text_stays_text(command: Command, bundle: Path, tmp_path: Path) -> None:
    code, *_ = command(bundle, "--source", HOSTILE, "--target", HOSTILE, "--out", "page.html")
    assert code == 0
    page = Page(tmp_path / "page.html")
    assert len(page.scripts) == 1 and "alert" not in page.scripts[0]
    assert page.text.count("<script") == page.text.count("</script>") == 1 + 1 + 1 + len(page.weights)
    assert "</script><script>alert(1)</script>" in page.sentences[0]["source"]["text"]
    assert "<b>" not in page.text and "\u2028" not in page.text and "\u202e" not in page.text


def test_a_page_makes_no_requests(command: Command, bundle: Path, tmp_path: Path) -> None:
    command(bundle, "--source", "x", "--out", "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(
        r"https?:|[\"'(]//[a-z]|\bimport\b|\burl\(|\bfetch\(|XMLHttp|@import", text.replace("\n//", "\n")
    )
    assert "default-src 'none'" in text


def test_every_architecture_can_be_drawn(command: Command, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for number, (architecture, options, kinds) in enumerate(
        [
            ("rnn-attention", {"attention": "gumbel"}, ["cross"]),
            ("rnn-attention", {"attend_once": True}, ["cross"]),
            ("conv-encoder-attention", {"encoder_attention": "after"}, ["cross", "encoder"]),
            ("universal", {}, ["cross", "encoder", "decoder"]),
            ("hierarchical", {"mark": 7}, ["cross"]),
        ]
    ):
        folder = other_bundle(tmp_path / str(number), tokenizer, architecture, **options)
        code, _, err = command(folder, "--source", "a b c", "--target", "d e", "--out", f"{number}.html")
        assert code == 0, err
        page = Page(tmp_path / f"{number}.html")
        assert page.about["kinds"] == kinds
        for kind in kinds:
            assert (page.read(kind, 0).sum(-1) - 1).abs().max() < 0.1
