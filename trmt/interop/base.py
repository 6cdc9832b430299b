"""The contract of an export format, and the inputs and results of comparing another program with trmt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from trmt.bundles.bundles import Bundle
from trmt.errors import ConfigError
from trmt.nets.transformer import Transformer, TransformerConfig
from trmt.text.tokenizer import Side, Tokenizer

BANNED_BIAS = -1e4  # the output bias of a token that is never to be generated; fits into fp16


@dataclass(frozen=True)
class CheckInputs:
    """The inputs on which programs are compared; ids are without beginning and end of sentence."""

    texts: tuple[str, ...]
    sources: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, ...], ...]  # the translation of each source that is to be scored
    max_tokens: int  # of a translation


@dataclass(frozen=True)
class CheckResults:
    """What a program computes from them."""

    translations: tuple[tuple[int, ...], ...]  # by greedy search, without the end of sentence
    scores: tuple[tuple[float, ...], ...]  # log probabilities of each token of the targets, and of the end
    sources: tuple[tuple[int, ...], ...] | None = None  # ids of the texts, if the program tokenizes by itself


class Format(ABC):
    """A folder that another program translates with."""

    name: ClassVar[str]  # as its users call it
    packages: ClassVar[tuple[str, ...]]  # that are needed to write and check it

    @abstractmethod
    def write(self, bundle: Bundle, folder: Path) -> None:
        """Write the bundle's model into an existing folder; a ConfigError if the format cannot express it."""

    @abstractmethod
    def run(self, folder: Path, tokenizer: Tokenizer, inputs: CheckInputs) -> CheckResults:
        """Run the other program on the inputs, with the model that `write` wrote."""


def transformer_of(bundle: Bundle, program: str) -> Transformer:
    """The network of a bundle; a ConfigError if it is not a Transformer as other programs have it."""
    net = bundle.net
    if type(net) is not Transformer:  # subclasses compute something else
        raise ConfigError(
            f"{program} has no networks like {bundle.manifest.architecture!r} of {bundle.folder}; "
            "only a transformer can be exported"
        )
    check_options(program, net.config, embedding_norm=(False,), embedding_scale=(True,), norm_epsilon=(0.0,))
    return net


def check_options(program: str, config: TransformerConfig, **supported: Sequence[Any]) -> None:
    """Raise a ConfigError if a Transformer has an option that a program does not support."""
    for option, values in supported.items():
        value = getattr(config, option)
        if value not in values:
            raise ConfigError(
                f"{program} has no Transformer with {option} = {value!r}, only with "
                f"{' or '.join(map(repr, values))}; export to another format, or train such a network"
            )


def token_rows(tensor: Tensor, side: Side) -> Tensor:
    """The rows of a matrix or bias that belong to tokens, without those that only pad the vocabulary."""
    return tensor.detach()[: side.vocabulary]


def import_package(name: str) -> Any:
    """Import an optional package."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"this needs the package {name.partition('.')[0]}; install it with pip install 'trmt[export]'"
        ) from error
