"""A scripted network, a small real tokenizer, bundles with random weights, and hostile lines."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests import texts
from tests.fakes import LogitStepper, small_network
from trmt.bundles import bundles
from trmt.nets.base import (
    NO_WEIGHTS,
    Decoding,
    EncoderMemory,
    HiddenVectors,
    Output,
    Products,
    Seq2Seq,
    Stepper,
    WantedWeights,
)
from trmt.nets.ragged import Ragged, Source
from trmt.text.tokenizer import Tokenizer
from trmt.text.tokenizer_training import TokenizerOptions, train_tokenizer

Script = Callable[[list[int]], list[int]]  # source ids without eos -> target ids without eos

ENDLESS = -1  # behind the ids of a script: the last one again and again
LIKELY, UNLIKELY = 0.0, -30.0


@dataclass(frozen=True)
class ScriptedConfig:
    """What a translator asks a network's config for."""

    max_positions: int = 1024


class Scripted(Seq2Seq):
    """A network that translates each source as a function says, whatever the search is."""

    config_class = ScriptedConfig

    def __init__(self, script: Script, *, vocabulary: int, eos: int, max_positions: int = 1024) -> None:
        super().__init__()
        self.config = ScriptedConfig(max_positions)
        self.script, self.vocabulary, self.eos = script, vocabulary, eos
        self.output = nn.Embedding(1, 1, _weight=torch.zeros(1, 1))  # which is not used

    def forward(self, source: Source, target: Ragged, *, want: WantedWeights = NO_WEIGHTS) -> Output:
        raise AssertionError("a script is only for decoding")

    def start(self, source: Source, decoding: Decoding) -> tuple[EncoderMemory, HiddenVectors]:
        limit = self.max_positions
        assert source.longest <= limit, "the translator passed a source with more tokens than positions"
        assert decoding.max_tokens <= limit, "the translator asked for more tokens than positions"
        rows = [self._row(ids, decoding.max_tokens) for ids in source.ids_N.split(source.lengths_S.tolist())]
        return EncoderMemory({"wanted": torch.tensor(rows)}, {}), HiddenVectors(())

    def _row(self, source: Tensor, max_tokens: int) -> list[int]:
        *ids, end = source.tolist()
        assert end == self.eos
        wanted = self.script(ids)
        filler = self.eos
        if wanted[-1:] == [ENDLESS]:
            *wanted, filler = wanted[:-1]
        return (wanted + [filler] * max_tokens)[:max_tokens]

    def step(
        self, tokens_SKT: Tensor, memory: EncoderMemory, decoder: HiddenVectors, position_S: Tensor
    ) -> tuple[Tensor, HiddenVectors]:
        wanted_S1 = memory["wanted"].gather(1, position_S[:, None])
        logits_SV = torch.full((len(position_S), self.vocabulary), UNLIKELY).scatter_(1, wanted_S1, LIKELY)
        return logits_SV[:, None, None].expand(-1, tokens_SKT.shape[1], -1, -1), decoder

    def frozen(self, products: Products) -> Stepper:
        return LogitStepper(self, products)


def small_tokenizer(
    folder: Path, *, languages: tuple[str, str] = ("en", "de"), size: int = 1000, **options: Any
) -> Tokenizer:
    """A tokenizer learnt from the test sentences of six languages, with bytes for all the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    sentences = [sentence for language in texts.ALL.values() for sentence in language]
    paths = [folder / "text.one", folder / "text.two"]
    for path in paths:
        path.write_text("\n".join(sentences) + "\n", encoding="utf-8")
    corpus = ",".join(map(str, paths))
    return train_tokenizer(TokenizerOptions(corpora=(corpus,), languages=languages, size=size, **options))[0]


def random_bundle(
    folder: Path, tokenizer: Tokenizer, *, longest: int = 40, eagerness: float = 2.0, **options: Any
) -> Seq2Seq:
    """Write a bundle of a Transformer with random weights, sharp enough that translations differ.

    The greater its `eagerness`, the more often it ends a translation before the limit does.
    """
    sizes = {
        "source_vocabulary": tokenizer.source.vocabulary,
        "target_vocabulary": tokenizer.target.vocabulary,
        "max_positions": 128,
        **options,
    }
    net = small_network("transformer", **sizes)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.6)
        net.output.weight[tokenizer.target.eos] *= eagerness
    manifest = bundles.make_manifest(
        net, "transformer", tokenizer, longest={"source": longest, "target": longest}
    )
    bundles.save_bundle(folder, manifest, net.state_dict(), tokenizer)
    return net


# Hostile lines

SCRIPTS = [
    "Hello wörld ",
    "Привет мир ",
    "你好，世界。",
    "مرحبا بالعالم ",
    "नमस्ते दुनिया ",
    "こんにちは",
    "สวัสดีชาวโลก",
    "שלום ",
]
CLUSTERS = [
    "👩🏽\u200d🚀",
    "👨\u200d👩\u200d👧\u200d👦",
    "🇩🇪🇫🇷",
    "🏴\U000e0067\U000e0062\U000e007f",
    "e\u0301\u0302\u0303",
    "각",
    "क्षि",
    "\ufeff",
]
SPELLED = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<0x0A>",
    "<2de>",
    "▁",
    "\u2581\u2581",
    "\\n",
    "&amp;",
    "{}",
    "%s",
    "[b]",
]
BREAKING = [
    "\u2028",
    "\u2029",
    "\x85",
    "\x0b",
    "\x0c",
    "\r",
    "\x1c",
    "\x1d",
    "\x1e",
    "\0",
    "\t",
    "\x7f",
    "\u00a0",
    "\u3000",
]
INVALID = [
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xed\xa0\xbd\xed\xb2\xa9",
    b"\xf4\x90\x80\x80",
    b"\xe2\x80",
    b"\xfe\xff",
]


def hostile_line(chooser: random.Random) -> bytes:
    """A line of bytes without a newline: any of the ways in which real and invented text goes wrong."""
    kind = chooser.randrange(14)
    if kind == 0:
        return chooser.randbytes(chooser.randrange(60)).replace(b"\n", b"")
    if kind == 1:
        return b"".join(
            chooser.choice([*INVALID, b"word ", "ß".encode()]) for _ in range(chooser.randrange(1, 9))
        )
    if kind == 2:
        return chooser.choice(
            ["", " ", "\t", "\r", "\u3000", " \u2028 ", "\x1c", "\u00a0\u00a0", "\r\r"]
        ).encode()
    if kind == 3:
        return b"\xef\xbb\xbf" + chooser.choice(SCRIPTS).encode()
    return _hostile_text(kind, chooser).encode()


def _hostile_text(kind: int, chooser: random.Random) -> str:
    pools: dict[int, Sequence[str]] = {
        4: [chr(code) for code in range(32) if code != 10],
        5: CLUSTERS,
        6: SPELLED,
        7: [*BREAKING, "word", " "],
        8: ["\u0301", "\u0308", "\u064b", "\u094d", "\u200d", "\ufe0f", "\u20e3"],
        9: list("!?.,;:…—–-()[]{}\"'«»。、！？"),
        10: [chr(code) for code in (0x10FFFF, 0xFFFE, 0xFFFF, 0xE000, 0xFDD0, 0x1F4A9, 0x202E, 0x200F, 0xAD)],
    }
    if kind in pools:
        return "".join(chooser.choice(pools[kind]) for _ in range(chooser.randrange(1, 12)))
    if kind == 11:
        return chooser.choice("aä你") * chooser.randrange(1, 400)
    sentences = [sentence for language in texts.ALL.values() for sentence in language]
    if kind == 12:
        return " ".join(chooser.choice(sentences) for _ in range(chooser.randrange(1, 6)))
    return "".join(
        chooser.choice([*SCRIPTS, *CLUSTERS, *SPELLED, *BREAKING]) for _ in range(chooser.randrange(9))
    )


def hostile_lines(count: int, *, seed: int) -> Iterator[bytes]:
    """`count` of them, always the same for a seed."""
    chooser = random.Random(seed)
    for _ in range(count):
        yield hostile_line(chooser)
