"""Networks of the recipes' sizes with seeded random weights, and random sentences for them to translate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthetic import MEAN, SPREAD, word_tokenizer
from translators.client import Failed

FORMATS = {"transformers": "huggingface", "ctranslate2": "ctranslate2"}  # engine: `trmt export --to`
SIDES = ("source", "target")
NAMED = ("d_model", "feed_forward", "heads", "encoder_layers", "decoder_layers", "source_vocabulary")


@dataclass(frozen=True)
class Size:
    """How much there is of everything."""

    vocabulary: int = 32_000
    sentences: int = 65_536  # to take from
    shortest: int = 8  # pieces of a source
    mean: int = MEAN  # before those are left out that are too short or too long
    longest: int = 60
    changes: Mapping[str, int] | None = None  # of the recipe's network


TOY = Size(
    vocabulary=300,
    sentences=32,
    shortest=2,
    mean=4,
    longest=6,
    changes={"d_model": 16, "feed_forward": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1},
)


@dataclass(frozen=True)
class Network:
    """A bundle, the same for other programs, and sentences as ids and as pieces."""

    name: str
    work: Path
    size: Size

    @property
    def bundle(self) -> Path:
        return self.work / f"{self.name}-trmt"

    def config(self) -> Any:
        """That of the recipe, with our vocabulary."""
        from trmt.nets.transformer import TransformerConfig
        from trmt.training.recipe import load_recipe

        options = load_recipe(f"transformer-{self.name}").network | dict(self.size.changes or {})
        pieces = self.size.vocabulary
        return TransformerConfig(source_vocabulary=pieces, target_vocabulary=pieces, **options)

    def about(self) -> dict[str, Any]:
        """What is measured, as the result says it."""
        config, size = self.config(), self.size
        return {
            "network": {name: getattr(config, name) for name in NAMED},
            "weights": "random, seed 1",
            "sources": f"{size.sentences} of {size.shortest} to {size.longest} random pieces, seed 1",
            "translations": "forced: as many pieces as the source",
        }

    def prepare(self) -> None:
        """Write what is missing in the folder."""
        import torch

        from trmt.bundles import bundles
        from trmt.nets.transformer import Transformer

        self.work.mkdir(parents=True, exist_ok=True)
        vocabulary = self.size.vocabulary
        if not self.bundle.exists():
            torch.manual_seed(1)
            net, tokenizer = Transformer(self.config()), word_tokenizer(vocabulary)
            manifest = bundles.make_manifest(net, "transformer", tokenizer, longest=dict.fromkeys(SIDES, 256))
            bundles.save_bundle(self.bundle, manifest, net.state_dict(), tokenizer)
        sources = random_sources(self.size)
        write(self.sentences("ids"), sources)
        write(self.sentences("pieces"), pieces_of(self.bundle, sources))

    def sentences(self, kind: str) -> Path:
        """Where sentences are, as ids or as pieces."""
        return self.work / f"{kind}.json"

    def model(self, engine: str) -> Path:
        """The network as this engine reads it, made if it is not there."""
        if engine not in FORMATS:
            return self.bundle
        from trmt import registry
        from trmt.bundles import bundles
        from trmt.storage.files import atomic_folder

        folder = self.work / f"{self.name}-{engine}"
        if not folder.exists():
            try:
                kind = registry.resolve(registry.FORMATS, FORMATS[engine])()
                with atomic_folder(folder) as partial:
                    kind.write(bundles.load_bundle(self.bundle), partial)
            except Exception as error:  # whatever another program comes upon must not end ours
                raise Failed(str(error)) from error
        return folder


def random_sources(size: Size) -> list[list[int]]:
    """Ids of random pieces; the lengths are lognormal, but for those that are too short or too long."""
    import numpy as np

    generator = np.random.default_rng(1)
    drawn = generator.normal(np.log(size.mean) - SPREAD**2 / 2, SPREAD, 4 * size.sentences)
    lengths = np.exp(drawn).round().astype(int)
    lengths = lengths[(lengths >= size.shortest) & (lengths <= size.longest)][: size.sentences].tolist()
    assert len(lengths) == size.sentences, "most of what is drawn is neither too short nor too long"
    return [generator.integers(4, size.vocabulary, length).tolist() for length in lengths]


def pieces_of(bundle: Path, sources: list[list[int]]) -> list[list[str]]:
    from trmt.text.tokenizer import Tokenizer

    side = Tokenizer.load(bundle / "tokenizer").source
    names = side.pieces(range(side.vocabulary))
    return [[names[number] for number in source] for source in sources]


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
