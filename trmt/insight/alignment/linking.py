"""Which word of a translation comes from which word of its source: found by networks, or by counting.

A network that translates looks at the source piece it is about to write, so the place that its attention
weighs most is the link of the piece written. Chen et al. (arXiv 2004.14837) found networks that know better
one step later, when the piece is what goes in: that is the shift. Counting is Model 1 with a preference for
the diagonal. Either sees one direction; two are made one by `symmetrising`.

Axes: A layers, H heads, T target position, L source position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from trmt.bundles import bundles
from trmt.bundles.bundles import Manifest
from trmt.devices.choice import choose_device
from trmt.errors import ConfigError
from trmt.insight.alignment.counting import Counts
from trmt.insight.alignment.symmetrising import METHODS
from trmt.insight.heatmaps import attending
from trmt.nets.base import Seq2Seq, layer_index
from trmt.text.links import NO_LINKS, Links, reverse_links
from trmt.text.tokenizer import Side, Tokenizer
from trmt.text.words import NO_WORD, word_indices
from trmt.translating import find_model

MOST_PIECES = 1024  # of a side: what is behind them gets no links
GUIDED = "alignment"  # in a manifest's training: where to look in a network that was guided

Pair = tuple[str, str]


@dataclass(frozen=True)
class Look:
    """Whose attention links are taken from; layers and heads count from 0."""

    layer: int
    head: int | None = None  # None: the mean of all
    shift: int = 0  # 1: when the piece goes in, one step after it was written


@dataclass(frozen=True, kw_only=True)
class LookOptions:
    """The same as far as the user says it, counted from 1 as people do; the rest is left to the network."""

    layer: int | None = None
    head: int | None = None
    shift: bool | None = None


class Aligner(Protocol):
    """What finds links in pairs of texts."""

    @property
    def languages(self) -> Pair:
        """Those of a pair."""

    @property
    def cut(self) -> int:
        """How many pairs so far were longer than what is looked at."""

    def links(self, pairs: Sequence[Pair]) -> list[Links]:
        """The links of each pair, in words of the texts as given."""


@dataclass(frozen=True)
class Pieces:
    """A pair of texts in pieces, and the word of each; `cut` says whether there were more."""

    source: list[int]
    target: list[int]
    source_words: list[int]
    target_words: list[int]
    cut: bool

    @classmethod
    def of(cls, sides: tuple[Side, Side], pair: Pair, *, most: int) -> Pieces:
        """Those of a pair, so many of each side at most."""
        source, target = (side.encode([text])[0] for side, text in zip(sides, pair, strict=True))
        return cls(
            source[:most],
            target[:most],
            word_indices(sides[0], pair[0], source)[:most],
            word_indices(sides[1], pair[1], target)[:most],
            cut=max(len(source), len(target)) > most,
        )

    def linked(self, chosen: Sequence[int]) -> Links:
        """The links of words, from the place in the source chosen for each target piece, or -1."""
        places = zip(chosen, self.target_words, strict=True)
        words = [(self.source_words[place], word) for place, word in places if place >= 0]
        return frozenset(link for link in words if NO_WORD not in link)


class AttentionAligner:
    """Links from where a network looks while it writes the translation that is given."""

    def __init__(
        self, net: Seq2Seq, tokenizer: Tokenizer, manifest: Manifest, options: LookOptions = LookOptions()
    ) -> None:
        self.net, self.tokenizer = net, tokenizer
        self.cut = 0
        self._guided: Mapping[str, Any] = manifest.training.get(GUIDED) or {}
        self._options = options
        self._look: Look | None = None

    @classmethod
    def load(
        cls,
        place: Path | None,
        options: LookOptions = LookOptions(),
        *,
        device: str = "auto",
        trust_code: bool = False,
    ) -> AttentionAligner:
        """The aligner in a bundle or run folder; without a name, the default one."""
        folder = find_model(place)
        bundle = bundles.load_bundle(folder, device=choose_device(device), trust_code=trust_code)
        return cls(bundle.net, bundle.tokenizer, bundle.manifest, options)

    @property
    def languages(self) -> Pair:
        return self.tokenizer.languages

    def links(self, pairs: Sequence[Pair]) -> list[Links]:
        found = [NO_LINKS] * len(pairs)
        for number, pieces, weights_AHTL in self.looked(pairs):
            look = self._look = self._look or self._chosen(*weights_AHTL.shape[:2])
            found[number] = linked(pieces, weights_AHTL, look)
        return found

    def looked(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Pieces, Tensor]]:
        """(number of the pair, its pieces, all weights), pairs of like length together; blank ones never."""
        most = min(attending.positions(self.net) - 1, MOST_PIECES)
        sides = self.tokenizer.source, self.tokenizer.target
        found = [Pieces.of(sides, pair, most=most) for pair in pairs]
        self.cut += sum(pieces.cut for pieces in found)
        order = [number for number, pieces in enumerate(found) if pieces.source and pieces.target]
        order.sort(key=lambda number: max(len(found[number].source), len(found[number].target)))
        ids = ((found[number].source, found[number].target) for number in order)
        for number, seen in zip(order, attending.attend(self.net, self.tokenizer, ids), strict=True):
            yield number, found[number], seen.weights["cross"]

    def _chosen(self, layers: int, heads: int) -> Look:
        options = self._options
        # The last but one, which was nearer to gold than the last in both directions (docs/aligning.md).
        look = Look(layer_index(-2, layers))
        if self._guided:
            look = _guided_look(self._guided, layers)
        for name, asked, count in (("layer", options.layer, layers), ("head", options.head, heads)):
            if asked is not None and not 1 <= asked <= count:
                raise ConfigError(
                    f"--{name} {asked} is not there: the network has {count}; choose from 1 to {count}"
                )
        if options.layer is not None:
            look = replace(look, layer=options.layer - 1, head=None)
        if options.head is not None:
            look = replace(look, head=options.head - 1)
        return look if options.shift is None else replace(look, shift=int(options.shift))


def _guided_look(known: Mapping[str, Any], layers: int) -> Look:
    """Where a network was taught to look; its layer may be counted from the last one, as -1."""
    layer, head = int(known["layer"]), known["head"]
    return Look(layer_index(layer, layers), head, int(known["shift"]))


def all_looks(layers: int, heads: int) -> list[Look]:
    """Every layer, each head and their mean, with and without the shift."""
    each = [None, *range(heads)] if heads > 1 else [None]
    return [Look(layer, head, shift) for layer in range(layers) for head in each for shift in (0, 1)]


def linked(pieces: Pieces, weights_AHTL: Tensor, look: Look) -> Links:
    """The links of words where a look weighs most; the end of the source is nothing to be linked to."""
    layer_HTL = weights_AHTL[look.layer]
    matrix_TL = layer_HTL.mean(0) if look.head is None else layer_HTL[look.head]
    count = len(pieces.target)
    rows_TL = matrix_TL[look.shift : look.shift + count, : len(pieces.source)]
    return pieces.linked(rows_TL.argmax(1).tolist())


class CountingAligner:
    """Links from how often pieces stood beside each other in the pairs of a prepared set."""

    def __init__(self, sides: tuple[Side, Side], languages: Pair, counts: Counts) -> None:
        self.sides, self.languages, self.counts = sides, languages, counts
        self.cut = 0

    def links(self, pairs: Sequence[Pair]) -> list[Links]:
        found = [Pieces.of(self.sides, pair, most=MOST_PIECES) for pair in pairs]
        self.cut += sum(pieces.cut for pieces in found)
        return [self._linked(pieces) for pieces in found]

    def _linked(self, pieces: Pieces) -> Links:
        if not pieces.source or not pieces.target:
            return NO_LINKS
        return pieces.linked(self.counts.chosen(pieces.source, pieces.target))


@dataclass(frozen=True)
class BothWays:
    """Two directions made one; `backward` reads pairs the other way round."""

    forward: Aligner
    backward: Aligner
    method: str

    @property
    def languages(self) -> Pair:
        return self.forward.languages

    @property
    def cut(self) -> int:
        return max(self.forward.cut, self.backward.cut)

    def links(self, pairs: Sequence[Pair]) -> list[Links]:
        join = METHODS[self.method]
        there = self.forward.links(pairs)
        back = self.backward.links([(target, source) for source, target in pairs])
        return [join(one, reverse_links(other)) for one, other in zip(there, back, strict=True)]
