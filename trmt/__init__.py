"""trmt: train your own translator. Importing it loads no torch; names are fetched when first used."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("trmt")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0.0.0"

_PUBLIC = {
    "TrmtError": "trmt.errors",
    "Tokenizer": "trmt.text.tokenizer",
    "train_tokenizer": "trmt.text.tokenizer_training",
    "prepare": "trmt.sets.preparing",
    "train": "trmt.training.run",
    "average": "trmt.averaging",
    "Translator": "trmt.translating",
    "score": "trmt.scoring",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'trmt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
