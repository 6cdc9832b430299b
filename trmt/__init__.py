"""trmt: train your own translator. Importing it loads no torch; names are fetched when first used.

Type checkers read __init__.pyi instead, which names the same.
"""

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
    "TokenizerOptions": "trmt.text.tokenizer_training",
    "train_tokenizer": "trmt.text.tokenizer_training",
    "PrepareOptions": "trmt.sets.preparing",
    "prepare": "trmt.sets.preparing",
    "TrainOptions": "trmt.training.planning",
    "train": "trmt.api",
    "AverageOptions": "trmt.averaging",
    "average": "trmt.api",
    "TranslateOptions": "trmt.translating",
    "Translator": "trmt.translating",
    "ScoreOptions": "trmt.scoring",
    "score": "trmt.scoring",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'trmt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
