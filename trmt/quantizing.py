"""Quantising: a bundle of a quarter of the size, whose matrix products run in int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trmt import console
from trmt.bundles import bundles, checkpoints, quantised
from trmt.bundles.bundles import Bundle, Manifest
from trmt.bundles.checkpoints import TRAINING
from trmt.errors import BundleError
from trmt.translating import TranslateOptions, Translator


@dataclass(frozen=True)
class Quantised:
    """What quantising a bundle gave."""

    folder: Path
    bytes_before: int
    bytes_after: int
    golden: int  # sentences whose translations the manifest keeps
    unchanged: int  # of these, translated as before


def quantize(place: Path | None, out: Path, *, trust_code: bool = False) -> Quantised:
    """Write the bundle in `place`, by default the newest one, to `out` with its matrices in int8."""
    folder = checkpoints.find_bundle(place) if place else checkpoints.default_bundle()
    if out.exists() and not bundles.is_bundle(out):
        raise BundleError(f"{out} is there and is no bundle; choose another place with --out")
    if (out / TRAINING).exists() or out.resolve() == folder.resolve():
        raise BundleError(f"{out} is a model that would be lost; choose another place with --out")
    bundle = bundles.load_bundle(folder, trust_code=trust_code)
    if bundle.manifest.precision == "int8":
        raise BundleError(f"{folder} is quantised already; use it as it is")
    weights = bundles.read_weights(folder, bundle.manifest, verify=False)
    golden = bundle.manifest.golden
    before = _translations(bundle, golden, "fp32")
    quantised.round_weights(bundle.net)
    after = _translations(bundle, golden, "int8")
    manifest = replace(
        bundle.manifest,
        precision="int8",
        scores=(),  # nobody has measured these weights yet
        golden=tuple(
            {**entry, "translation": text, "beam": TranslateOptions().beam}
            for entry, text in zip(golden, after, strict=True)
        ),
    )
    bundles.save_bundle(out, manifest, weights, bundle.tokenizer)
    unchanged = sum(one == other for one, other in zip(before, after, strict=True))
    found = Quantised(out, _bytes(folder), _bytes(out), len(golden), unchanged)
    console.say(f"{folder} ({_mebibytes(found.bytes_before)}) -> {out} ({_mebibytes(found.bytes_after)})")
    if golden:
        console.say(f"{unchanged} of {len(golden)} golden sentences are translated as before")
    return found


def _translations(bundle: Bundle, golden: Sequence[dict[str, Any]], precision: Any) -> list[str]:
    if not golden:
        return []
    translator = Translator(
        bundle.net,
        bundle.tokenizer,
        longest=_longest(bundle.manifest, bundle.folder),
        options=TranslateOptions(precision=precision, device="cpu"),
    )
    return [found.text for found in translator.translate([str(entry["source"]) for entry in golden])]


def _longest(manifest: Manifest, folder: Path) -> int:
    if not manifest.longest.get("source"):
        raise BundleError(f"the manifest of {folder} does not say longest.source; copy the bundle again")
    return manifest.longest["source"]


def _bytes(folder: Path) -> int:
    return (folder / bundles.WEIGHTS).stat().st_size


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
