"""The tables of what can be chosen by name; an entry is imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from trmt.errors import ConfigError

ARCHITECTURES: Mapping[str, str] = {
    "transformer": "trmt.arch.transformer:Transformer",
    "rnn": "trmt.arch.rnn:RNN",
    "hierarchical": "trmt.arch.hierarchical:Hierarchical",
    "conv": "trmt.arch.conv:ConvS2S",
    "universal": "trmt.arch.universal:Universal",
}

# Networks that read only: they are trained to be the encoder of another.
ENCODERS: Mapping[str, str] = {
    "masked-encoder": "trmt.arch.masked_encoder:MaskedEncoder",
}

NETWORKS: Mapping[str, str] = {**ARCHITECTURES, **ENCODERS}

OBJECTIVES: Mapping[str, str] = {
    "translation": "trmt.objectives.translation:Translation",
    "divergence": "trmt.objectives.distances:Divergence",
    "squared": "trmt.objectives.distances:SquaredDistance",
    "masked": "trmt.objectives.masked:Masked",
    "denoising": "trmt.objectives.denoising:Denoising",
}

SEARCHES: Mapping[str, str] = {
    "greedy": "trmt.decode.greedy:Greedy",
    "beam": "trmt.decode.beam:Beam",
    "sampling": "trmt.decode.sampling:Sampling",
}

RANKERS: Mapping[str, str] = {
    "best": "trmt.decode.best:Best",
}

ENGINES: Mapping[str, str] = {
    "eager": "trmt.engines.eager:Eager",
    "captured": "trmt.engines.captured:Captured",
}

# What `trmt export` writes.
FORMATS: Mapping[str, str] = {
    "ctranslate2": "trmt.moving.to_ctranslate2:CTranslate2",
    "huggingface": "trmt.moving.to_huggingface:HuggingFace",
    "onnx": "trmt.moving.to_onnx:ONNX",
}


def suggestion(name: str, known: list[str]) -> str:
    """The tail of an error message: the nearest known name, or all of them."""
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"


def resolve(table: Mapping[str, str], name: str, *, trust_code: bool = False) -> Any:
    """The class that `name` stands for in `table`.

    A full `module:Class` is imported only with `trust_code`: recipes are the user's own and pass it,
    bundles come from elsewhere and must not be able to run code.
    """
    if name in table:
        path = table[name]
    elif ":" in name and trust_code:
        path = name
    elif ":" in name:
        raise ConfigError(
            f"{name!r} names code outside trmt; pass --trust-code if you trust where it came from"
        )
    else:
        raise ConfigError(f"there is nothing called {name!r} here; {suggestion(name, list(table))}")
    module, _, attribute = path.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot load {path!r}: {error}; check the module and class name") from error
