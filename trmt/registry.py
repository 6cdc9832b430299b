"""The tables of what can be chosen by name, and of what optional packages add; both are imported when used.

A copy of trmt works without the packages native, lab, interop, insight and scale: the core reaches them only
through the paths in these tables and through `optional`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from trmt.errors import ConfigError

# Variants of the Transformer's encoder for study, and of the whole network: "transformer-alibi" is one,
# "transformer-alibi+batch-norm" two at once, "masked-encoder-alibi" BERT with one.
ENCODER_VARIANTS: Mapping[str, str] = {
    "no-positions": "trmt.lab.no_positions:NoPositions",
    "complex": "trmt.lab.complex_positions:ComplexPositions",
    "concatenated": "trmt.lab.concatenated_positions:ConcatenatedPositions",
    "relative": "trmt.lab.relative_positions:RelativePositions",
    "t5": "trmt.lab.t5_positions:T5Positions",
    "alibi": "trmt.lab.alibi:ALiBi",
    "batch-norm": "trmt.lab.batch_norm:BatchNormalised",
    "no-residual": "trmt.lab.no_residual:NoResidual",
    "unscaled": "trmt.lab.unscaled:UnscaledScores",
}
VARIANTS: Mapping[str, str] = {
    **ENCODER_VARIANTS,
    "hard": "trmt.lab.hard_cross_attention:HardCrossAttention",
    "same-layer": "trmt.lab.same_layer:SameLayer",
}

ARCHITECTURES: Mapping[str, str] = {
    "transformer": "trmt.nets.transformer:Transformer",
    "ssru": "trmt.nets.ssru:SSRUDecoder",
    "rnn": "trmt.nets.rnn:RNN",
    "conv": "trmt.nets.conv:ConvS2S",
    "universal": "trmt.lab.universal:Universal",
    "rnn-attention": "trmt.lab.rnn_attention:RNNAttention",
    "hierarchical": "trmt.lab.hierarchical:Hierarchical",
    "conv-encoder-attention": "trmt.lab.conv_encoder_attention:ConvEncoderAttention",
    **{f"transformer-{name}": path for name, path in VARIANTS.items()},
}

COMBINED = "trmt.lab.combining:combined"  # makes one class of a network and its variants

# Encoders without a decoder: they are pretrained to initialise the encoder of another network.
ENCODERS: Mapping[str, str] = {
    "masked-encoder": "trmt.lab.masked_encoder:MaskedEncoder",
    **{f"masked-encoder-{name}": path for name, path in ENCODER_VARIANTS.items()},
}

NETWORKS: Mapping[str, str] = {**ARCHITECTURES, **ENCODERS}

OBJECTIVES: Mapping[str, str] = {
    "translation": "trmt.objectives.translation:TranslationObjective",
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
    "probe_triton": "trmt.native.gpu:probe",
    "backend": "trmt.native.products:backend",
    "keep_freed_memory": "trmt.native.malloc:keep_freed_memory",
}

# The formats of `trmt export`.
FORMATS: Mapping[str, str] = {
    "ctranslate2": "trmt.interop.to_ctranslate2:CTranslate2",
    "huggingface": "trmt.interop.to_huggingface:HuggingFace",
    "onnx": "trmt.interop.to_onnx:ONNX",
}


MAX_NAME = 80  # characters of a name in a message


def suggestion(name: str, known: list[str], *, prefix: str = "") -> str:
    """The end of an error message about an unknown name: the closest known name, or all of them.

    `prefix` is what comes before each of them where they are written.
    """
    close = get_close_matches(name, known, n=1)
    if close:
        return f"did you mean {prefix + close[0]!r}?"
    return f"known{f' after {prefix!r}' if prefix else ''} are {', '.join(sorted(known))}"


def resolve(table: Mapping[str, str], name: str, *, trust_code: bool = False) -> Any:
    """The class that `table` has under `name`.

    A full `module:Class` is imported only with `trust_code`: recipes are the user's own and may name code,
    bundles come from elsewhere and must not run any.
    """
    if paths := _paths(table, name):
        classes = [_load(path, name) for path in paths]
        return classes[0] if len(classes) == 1 else _load(COMBINED, name)(*classes)
    if ":" not in name:
        raise ConfigError(f"unknown name {name[:MAX_NAME]!r}; {suggestion(name, list(table))}")
    if not trust_code:
        raise ConfigError(
            f"{name[:MAX_NAME]!r} names code outside trmt; pass --trust-code if you trust where it came from"
        )
    return _load(name, name)


def split_variants(name: str) -> tuple[str, list[str]]:
    """The network that a name stands for, and its variants: "transformer-alibi+hard" has two."""
    first, *more = name.split("+")
    for base in ("transformer", "masked-encoder"):
        if first.startswith(f"{base}-"):
            return base, [first.removeprefix(f"{base}-"), *more]
    return name, []


def join_variants(base: str, variants: Sequence[str]) -> str:
    """The name of a network with these variants."""
    return f"{base}-{'+'.join(variants)}" if variants else base


def _paths(table: Mapping[str, str], name: str) -> list[str]:
    """The paths of the classes that a name stands for; none if the table has not all of them."""
    base, variants = split_variants(name)
    names = [*dict.fromkeys(f"{base}-{variant}" for variant in variants), base]
    return [table[each] for each in names] if all(each in table for each in names) else []


def _load(path: str, name: str) -> Any:
    """The class at a path, which is what `name` needs."""
    module, _, attribute = path.partition(":")
    if path != name and not is_installed(package := _package_of(module)):
        raise ConfigError(f"{name!r} needs {package}, which this copy of trmt does not have; choose another")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot load {path!r}: {error}; check the module and class name") from error


def is_installed(package: str) -> bool:
    """Whether this copy of trmt has a package, named in full, such as "trmt.scale"."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None  # a folder without __init__.py has no origin


def installed(table: Mapping[str, str]) -> list[str]:
    """The names in a table whose packages this copy of trmt has."""
    return [name for name, path in table.items() if is_installed(_package_of(path.partition(":")[0]))]


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
