"""Word aligners: from the cross-attention of a translation model, or by IBM Model 1.

When a translation model outputs a target piece, its cross-attention is usually highest at the source piece
that it translates: that is the link. In some models the attention of the next decoding step, which has the
target piece as its input, is more accurate (Chen et al., arXiv 2004.14837): that is the shift. Both kinds of
aligner align in one direction; SymmetrisedAligner combines two directions.

Axes: A layers, H heads, T target position, L source position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from trmt.bundles import bundles
from trmt.bundles.bundles import Manifest
from trmt.devices.choice import choose_device
from trmt.errors import BundleError, ConfigError
from trmt.insight.alignment.ibm_model1 import Model1
from trmt.insight.alignment.symmetrisation import METHODS
from trmt.insight.heatmaps.weights import attention_weights, max_positions
from trmt.nets.base import Seq2Seq, layer_index
from trmt.text.links import NO_LINKS, Links, reverse_links
from trmt.text.tokenizer import Side, Tokenizer
from trmt.text.words import NO_WORD, word_indices
from trmt.training.models import find_model

MAX_PIECES = 1024  # of a side; the words of further pieces get no links

TextPair = tuple[str, str]  # source, target


@dataclass(frozen=True)
class AttentionHead:
    """The attention from which links are taken; layers and heads count from 0."""

    layer: int
    head: int | None = None  # None: the mean of all heads
    shift: int = 0  # 1: of the next decoding step, which has the target piece as its input


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """The user's choice of layer and head, counted from 1; None is left to the model."""

    layer: int | None = None
    head: int | None = None
    shift: bool | None = None


class Aligner(Protocol):
    """Finds the links between the words of pairs."""

    @property
    def languages(self) -> TextPair:
        """Source and target language."""

    @property
    def truncated(self) -> int:
        """The number of pairs so far that were longer than the aligner can process."""

    def links(self, pairs: Sequence[TextPair]) -> list[Links]:
        """The links of each pair; words are separated by white space in the text as given."""


@dataclass(frozen=True)
class TokenizedPair:
    """The pieces of a pair and the word of each piece."""

    source: list[int]
    target: list[int]
    source_words: list[int]
    target_words: list[int]
    truncated: bool

    @classmethod
    def encode(cls, sides: tuple[Side, Side], pair: TextPair, *, max_pieces: int) -> TokenizedPair:
        """Tokenize a pair, truncating each side to `max_pieces`."""
        source, target = (side.encode([text])[0] for side, text in zip(sides, pair, strict=True))
        return cls(
            source[:max_pieces],
            target[:max_pieces],
            word_indices(sides[0], pair[0], source)[:max_pieces],
            word_indices(sides[1], pair[1], target)[:max_pieces],
            truncated=max(len(source), len(target)) > max_pieces,
        )

    def word_links(self, aligned: Sequence[int]) -> Links:
        """The links of words, from the source position aligned to each target piece, -1 for none."""
        positions = zip(aligned, self.target_words, strict=True)
        words = [(self.source_words[position], word) for position, word in positions if position >= 0]
        return frozenset(link for link in words if NO_WORD not in link)


class AttentionAligner:
    """Links from the cross-attention of a translation model that is forced to decode the given target."""

    def __init__(
        self, net: Seq2Seq, tokenizer: Tokenizer, manifest: Manifest, options: HeadOptions = HeadOptions()
    ) -> None:
        self.net, self.tokenizer = net, tokenizer
        self._languages = manifest.languages
        self.truncated = 0
        self._guided = manifest.training.get("alignment")
        self._options = options
        self._head: AttentionHead | None = None

    @classmethod
    def load(
        cls,
        path: Path | None,
        options: HeadOptions = HeadOptions(),
        *,
        device: str = "auto",
        trust_code: bool = False,
    ) -> AttentionAligner:
        """The aligner of a bundle or run folder; None is the default model."""
        folder = find_model(path)
        bundle = bundles.load_bundle(folder, device=choose_device(device), trust_code=trust_code)
        return cls(bundle.net, bundle.tokenizer, bundle.manifest, options)

    @property
    def languages(self) -> TextPair:
        return self._languages

    def links(self, pairs: Sequence[TextPair]) -> list[Links]:
        found = [NO_LINKS] * len(pairs)
        for index, pieces, weights_AHTL in self.attention(pairs):
            head = self._head = self._head or self._choose_head(*weights_AHTL.shape[:2])
            found[index] = attention_links(pieces, weights_AHTL, head)
        return found

    def attention(self, pairs: Sequence[TextPair]) -> Iterator[tuple[int, TokenizedPair, Tensor]]:
        """(index of the pair, its pieces, all weights), sorted by length, without blank pairs."""
        max_pieces = min(max_positions(self.net) - 1, MAX_PIECES)
        sides = self.tokenizer.source, self.tokenizer.target
        found = [TokenizedPair.encode(sides, pair, max_pieces=max_pieces) for pair in pairs]
        self.truncated += sum(pieces.truncated for pieces in found)
        order = [index for index, pieces in enumerate(found) if pieces.source and pieces.target]
        order.sort(key=lambda index: max(len(found[index].source), len(found[index].target)))
        ids = ((found[index].source, found[index].target) for index in order)
        for index, attention in zip(order, attention_weights(self.net, self.tokenizer, ids), strict=True):
            yield index, found[index], attention.weights["cross"]

    def _choose_head(self, layers: int, heads: int) -> AttentionHead:
        options = self._options
        # The penultimate layer had a lower error rate than the last in both directions (docs/aligning.md).
        chosen = AttentionHead(layer_index(-2, layers))
        if self._guided:
            layer, head = self._guided["layer"], self._guided["head"]
            if layer >= layers or head >= heads:
                raise BundleError(
                    f"the manifest names head {head + 1} of layer {layer + 1} for alignment, which the "
                    "network does not have; copy the bundle again"
                )
            chosen = AttentionHead(layer_index(layer, layers), head, self._guided["shift"])
        for name, number, count in (("layer", options.layer, layers), ("head", options.head, heads)):
            if number is not None and not 1 <= number <= count:
                raise ConfigError(
                    f"there is no --{name} {number}: the network has {count}; choose from 1 to {count}"
                )
        if options.layer is not None:
            chosen = replace(chosen, layer=options.layer - 1, head=None)
        if options.head is not None:
            chosen = replace(chosen, head=options.head - 1)
        return chosen if options.shift is None else replace(chosen, shift=int(options.shift))


def all_heads(layers: int, heads: int) -> list[AttentionHead]:
    """Each head of each layer and the mean of its heads, with and without the shift."""
    each = [None, *range(heads)] if heads > 1 else [None]
    return [AttentionHead(layer, head, shift) for layer in range(layers) for head in each for shift in (0, 1)]


def attention_links(pieces: TokenizedPair, weights_AHTL: Tensor, head: AttentionHead) -> Links:
    """The links of words where the attention is highest; the end of the source is never linked."""
    layer_HTL = weights_AHTL[head.layer]
    matrix_TL = layer_HTL.mean(0) if head.head is None else layer_HTL[head.head]
    length = len(pieces.target)
    rows_TL = matrix_TL[head.shift : head.shift + length, : len(pieces.source)]
    return pieces.word_links(rows_TL.argmax(1).tolist())


class Model1Aligner:
    """Links from IBM Model 1."""

    def __init__(self, sides: tuple[Side, Side], languages: TextPair, model: Model1) -> None:
        self.sides, self.languages, self.model = sides, languages, model
        self.truncated = 0

    def links(self, pairs: Sequence[TextPair]) -> list[Links]:
        found = [TokenizedPair.encode(self.sides, pair, max_pieces=MAX_PIECES) for pair in pairs]
        self.truncated += sum(pieces.truncated for pieces in found)
        return [self._links(pieces) for pieces in found]

    def _links(self, pieces: TokenizedPair) -> Links:
        if not pieces.source or not pieces.target:
            return NO_LINKS
        return pieces.word_links(self.model.align(pieces.source, pieces.target))


@dataclass(frozen=True)
class SymmetrisedAligner:
    """The symmetrised links of two aligners; `backward` aligns (target, source) pairs."""

    forward: Aligner
    backward: Aligner
    method: str

    @property
    def languages(self) -> TextPair:
        return self.forward.languages

    @property
    def truncated(self) -> int:
        return max(self.forward.truncated, self.backward.truncated)

    def links(self, pairs: Sequence[TextPair]) -> list[Links]:
        symmetrise = METHODS[self.method]
        forward = self.forward.links(pairs)
        backward = self.backward.links([(target, source) for source, target in pairs])
        return [symmetrise(one, reverse_links(other)) for one, other in zip(forward, backward, strict=True)]
