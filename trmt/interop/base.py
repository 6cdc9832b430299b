"""What a format of another program promises: to write a bundle, and to show what that program makes of it."""

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

NEVER = -1e4  # a logit that no other could lose to; small enough for fp16


@dataclass(frozen=True)
class Probe:
    """What programs are compared on; ids are without beginning and end of sentence."""

    texts: tuple[str, ...]
    sources: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, ...], ...]  # what is to be scored as the translation of each
    limit: int  # tokens that a program's own translation has at most


@dataclass(frozen=True)
class Outcome:
    """What a program makes of a probe."""

    translations: tuple[tuple[int, ...], ...]  # found greedily, without the end of sentence
    scores: tuple[tuple[float, ...], ...]  # log probabilities of each token of the targets, and of the end
    sources: tuple[tuple[int, ...], ...] | None = None  # the texts as it cuts them, where it does so itself


class Format(ABC):
    """A folder that another program translates with."""

    name: ClassVar[str]  # as its users call it
    packages: ClassVar[tuple[str, ...]]  # that are needed to write and try it

    @abstractmethod
    def write(self, bundle: Bundle, folder: Path) -> None:
        """Write the bundle's model into an existing folder; what the format cannot express is refused."""

    @abstractmethod
    def outcome(self, folder: Path, tokenizer: Tokenizer, probe: Probe) -> Outcome:
        """What the other program makes of a probe with the model that `write` wrote."""


def transformer_of(bundle: Bundle, name: str) -> Transformer:
    """The network of a bundle, which has to be a Transformer."""
    if not isinstance(bundle.net, Transformer):
        raise ConfigError(
            f"{name} has no networks like {bundle.manifest.architecture!r} of {bundle.folder}; "
            "only a transformer can be exported"
        )
    for option, usual in (
        ("embedding_norm", False),
        ("embedding_scale", True),
        ("segments", 1),
        ("epsilon", 0.0),
        ("residual", True),
        ("score_scale", True),
        ("position_join", "add"),
        ("cross_source", "last"),
        ("cross_focus", "soft"),
    ):
        if (value := getattr(bundle.net.config, option)) != usual:
            raise ConfigError(
                f"{name} has no Transformer with {option} = {value!r}; train one with {usual!r}"
            )
    refuse(name, bundle.net.config, norm=("layer", "rms"), positions=("sinusoidal", "learned", "rotary"))
    return bundle.net


def refuse(name: str, config: TransformerConfig, **known: Sequence[str]) -> None:
    """Refuse a Transformer with an option that the format called `name` has not."""
    for option, values in known.items():
        value = getattr(config, option)
        if value not in values:
            raise ConfigError(
                f"{name} has no Transformer with {option} = {value!r}, only with {' or '.join(values)}; "
                "export to another format, or train such a network"
            )


def rows(tensor: Tensor, side: Side) -> Tensor:
    """The rows of a matrix or bias that stand for pieces; those that only fill it up are left out."""
    return tensor.detach()[: side.vocabulary]


def package(name: str) -> Any:
    """A package that is not always installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"this needs the package {name.partition('.')[0]}; install it with pip install 'trmt[export]'"
        ) from error
