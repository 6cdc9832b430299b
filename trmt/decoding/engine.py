"""What an engine promises: it runs a network and a search over any number of requests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from trmt.decoding.base import Hypothesis


@dataclass(frozen=True)
class Request:
    """One sentence to translate."""

    source: tuple[int, ...]  # with its end-of-sentence token
    limit: int  # tokens of the translation, at most
    prefix: tuple[int, ...] = ()  # what the translation must begin with
    key: int = 0  # names the sentence for searches that draw lots
    least: int = 0  # tokens of the translation, at least

    def __post_init__(self) -> None:
        assert self.source, "an empty source has nothing to attend to"
        assert 0 <= len(self.prefix) <= self.limit, "the limit leaves no room for the prefix"
        assert 0 <= self.least <= self.limit, "a translation cannot be both shorter and longer"


@dataclass(frozen=True)
class Batching:
    """How many sentences are translated together."""

    sentences: int = 64
    tokens: int = 8192  # of padded source, at most

    @classmethod
    def on(cls, device: str, sentences: int = 0) -> Batching:
        """So many sentences on this device, or with 0 as many as keep it busy."""
        if device.startswith("cuda"):
            sentences = sentences or 512
            return cls(sentences, 128 * max(sentences, 512))
        return replace(cls(), sentences=sentences or cls.sentences)


class Engine(ABC):
    """A network and a search, ready to run."""

    @abstractmethod
    def translate(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[Hypothesis]]]:
        """(index of the request, its hypotheses), in whatever order they are ready."""

    def shrink(self) -> bool:
        """Take fewer sentences at a time from now on, since memory is short; False if that cannot be."""
        return False
