"""The tables of what can be chosen by name, and of what optional packages add; both are imported when used.

A copy of trmt works without the packages native, lab, interop, insight and scale: the core reaches them only
through the paths in these tables and through `optional`.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from trmt.errors import ConfigError

ARCHITECTURES: Mapping[str, str] = {
    "transformer": "trmt.nets.transformer:Transformer",
    "ssru": "trmt.nets.ssru:SSRUDecoder",
    "rnn": "trmt.nets.rnn:RNN",
    "conv": "trmt.nets.conv:ConvS2S",
}

# Networks that only encode: they are trained to be the encoder of another.
ENCODERS: Mapping[str, str] = {
    "masked-encoder": "trmt.lab.masked_encoder:MaskedEncoder",
}

NETWORKS: Mapping[str, str] = {**ARCHITECTURES, **ENCODERS}

OBJECTIVES: Mapping[str, str] = {
    "translation": "trmt.objectives.translation:Translation",
    "divergence": "trmt.lab.distances:Divergence",
    "squared": "trmt.lab.distances:SquaredDistance",
    "masked": "trmt.lab.masked:Masked",
    "denoising": "trmt.lab.denoising:Denoising",
}

SEARCHES: Mapping[str, str] = {
    "greedy": "trmt.decoding.greedy:Greedy",
    "beam": "trmt.decoding.beam:Beam",
    "sampling": "trmt.decoding.sampling:Sampling",
}

RANKERS: Mapping[str, str] = {
    "best": "trmt.decoding.best:Best",
}

# What trmt/acceleration.py finds faster versions of: the plain ones are in trmt/nets and trmt/decoding.
NATIVE: Mapping[str, str] = {
    "linear": "trmt.native.training:linear",
    "dropout": "trmt.native.training:dropout",
    "add_norm": "trmt.native.training:add_norm",
    "self_attention": "trmt.native.training:self_attention",
    "cross_attention": "trmt.native.training:cross_attention",
    "cross_entropy": "trmt.native.training:cross_entropy",
    "stepper": "trmt.native.stepper:stepper",
    "multi_step": "trmt.native.multi_step:multi_step",
    "advance": "trmt.native.search:advance",
    "top": "trmt.native.search:top",
    "cached_attention": "trmt.native.gpu:cached_attention",
    "serves_cached_attention": "trmt.native.gpu:serves_cached_attention",
    "backend": "trmt.native.products:backend",
}

# What `trmt export` writes.
FORMATS: Mapping[str, str] = {
    "ctranslate2": "trmt.interop.to_ctranslate2:CTranslate2",
    "huggingface": "trmt.interop.to_huggingface:HuggingFace",
    "onnx": "trmt.interop.to_onnx:ONNX",
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
    if path in table.values() and not is_installed(package := _package_of(module)):
        raise ConfigError(f"{name!r} needs {package}, which this copy of trmt does not have; choose another")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot load {path!r}: {error}; check the module and class name") from error


def is_installed(package: str) -> bool:
    """Whether this copy of trmt has a package, named in full, such as "trmt.scale"."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None  # a folder without __init__.py has no origin


@cache
def optional(path: str) -> Any | None:
    """The module "trmt.package.module", or the object "trmt.package.module:name"; None without its package.

    Only a missing `trmt.package` gives None. Errors inside a package that is there are raised, so a broken
    module or dependency is not taken for a missing package.
    """
    module, _, attribute = path.partition(":")
    if not is_installed(_package_of(module)):
        return None
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def require(package: str, what: str) -> None:
    """Raise a ConfigError if this copy of trmt lacks the package that `what`, such as an option, needs."""
    if not is_installed(package):
        raise ConfigError(f"{what} needs {package}, which this copy of trmt does not have; leave {what} out")


def _package_of(module: str) -> str:
    return ".".join(module.split(".")[:2])
