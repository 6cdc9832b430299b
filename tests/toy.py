"""A toy language, a prepared set of it, and recipes that train on it in a second."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fakes import SMALL
from trmt.config import merge, to_toml
from trmt.registry import ARCHITECTURES, resolve
from trmt.sets.preparing import PrepareOptions, prepare
from trmt.text.filters import LengthLimits
from trmt.text.tokenizer_training import TokenizerOptions, train_tokenizer
from trmt.training.planning import TrainOptions

WORDS = ("ka", "lomo", "ti", "saru", "ne", "hikado", "mi", "wa", "yone", "tokuri", "bu", "remi")


def pairs(count: int, *, seed: int) -> list[tuple[str, str]]:
    """Sentences of 1 to 9 words, and the same words backwards with a letter in front of each."""
    chooser = random.Random(seed)
    sentences = [chooser.choices(WORDS, k=min(1 + int(chooser.expovariate(0.3)), 9)) for _ in range(count)]
    return [(" ".join(words), " ".join(f"o{word}" for word in reversed(words))) for words in sentences]


def write_tsv(path: Path, some: Sequence[tuple[str, str]]) -> str:
    path.write_bytes("".join(f"{source}\t{target}\n" for source, target in some).encode())
    return str(path)


def make_set(
    folder: Path,
    *,
    joint: bool = True,
    weight: str = "",
    kind: Any = "bpe",
    seed: int = 1,
    dev: bool = True,
) -> Path:
    """A prepared set in `folder`; with `weight`, half of its pairs come from a corpus of that weight."""
    folder.mkdir(parents=True, exist_ok=True)
    half = write_tsv(folder / "half.tsv", pairs(150, seed=seed))
    rest = write_tsv(folder / "rest.tsv", pairs(150, seed=seed + 1))
    held_out = write_tsv(folder / "dev.tsv", pairs(30, seed=seed + 2))
    train_tokenizer(
        TokenizerOptions(
            corpora=(half, rest), languages=("x", "y"), size=60, joint=joint, byte_fallback=False, kind=kind
        ),
        out=folder / "tokenizer",
    )
    prepare(
        PrepareOptions(
            train=(half + weight, rest),
            dev=held_out if dev else None,
            dev_size=None if dev else 0,
            out=folder / "set",
            tokenizer=folder / "tokenizer",
            limits=LengthLimits(max_ratio=0),
            keep_duplicates=True,
            workers=1,
        )
    )
    return folder / "set"


BASE: dict[str, Any] = {
    "batches": {"tokens": 300},
    "optim": {"name": "adamw", "schedule": "constant", "lr": 0.003, "warmup": 2},
    "training": {"steps": 6, "patience": 0, "log_every": 2, "device": "cpu"},
    "validation": {"every": 3, "metric": "loss", "sentences": 0},
}


def recipe(folder: Path, changes: dict[str, Any] | None = None, *, architecture: str = "transformer") -> str:
    """A recipe file with a tiny network; `changes` are laid over it."""
    known = {field.name for field in dataclasses.fields(resolve(ARCHITECTURES, architecture).config_class)}
    sizes = {**SMALL, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.2}
    network = {
        name: value for name, value in sizes.items() if name in known and not name.endswith("vocabulary")
    }
    tree = merge({"architecture": architecture, "network": network, **BASE}, changes or {})
    path = folder / f"{architecture}.toml"
    path.write_text(to_toml(tree), encoding="utf-8")
    return str(path)


def options(run: Path, data: Path, recipe_file: str, *settings: str, **more: Any) -> TrainOptions:
    """What `train` takes, in short."""
    return TrainOptions(run=run, data=data, recipe=recipe_file, settings=list(settings), **more)


def write_documents(path: Path, *, count: int, seed: int) -> str:
    """Documents of one to nine sentences, each with a word of its own in all sentences."""
    chooser = random.Random(seed)
    parts = []
    for _ in range(count):
        topic = chooser.choice(WORDS)
        sentences = [
            " ".join([topic, *chooser.choices(WORDS, k=chooser.randint(1, 6))])
            for _ in range(chooser.randint(1, 9))
        ]
        parts.append("\n".join(sentences))
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return str(path)
