"""What is to be decoded, and how much of it at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Request:
    """One sentence to translate."""

    source: tuple[int, ...]  # with its end-of-sentence token
    max_tokens: int  # of the translation
    prefix: tuple[int, ...] = ()  # tokens that the translation must begin with
    key: int = 0  # tells requests apart; sampling draws its random numbers from it
    min_tokens: int = 0  # of the translation

    def __post_init__(self) -> None:
        assert self.source, "an empty source has nothing to attend to"
        assert 0 <= len(self.prefix) <= self.max_tokens, "max_tokens leaves no space for the prefix"
        assert 0 <= self.min_tokens <= self.max_tokens, "a translation cannot be both shorter and longer"


@dataclass(frozen=True)
class Batching:
    """How many sentences are decoded together."""

    sentences: int = 64
    tokens: int = 8192  # of padded source, at most

    @classmethod
    def on(cls, device: str, sentences: int = 0) -> Batching:
        """So many sentences on this device, or with 0 as many as keep it busy."""
        if device.startswith("cuda"):
            sentences = sentences or 512
            return cls(sentences, 128 * max(sentences, 512))
        return replace(cls(), sentences=sentences or cls.sentences)
