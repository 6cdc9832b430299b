"""Quantising: a bundle of a quarter of the size, with which matrix products run in int8."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trmt import console
from trmt.bundles import bundles, quantised
from trmt.bundles.bundles import Bundle, Manifest
from trmt.bundles.checkpoints import TRAINING
from trmt.errors import BundleError
from trmt.training.models import find_model
from trmt.translating import TranslateOptions, Translator


@dataclass(frozen=True)
class QuantizeResult:
    """The bundle that was written, and how it compares to the original."""

    folder: Path  # of the quantised bundle
    bytes_before: int  # size of the weights of the original
    bytes_after: int  # size of the quantised weights
    golden: int  # number of golden sentences in the manifest
    unchanged: int  # number of these with the same translation as before


def quantize(model: Path | str | None, out: Path | str, *, trust_code: bool = False) -> QuantizeResult:
    """Write a bundle or what a run folder stands for to `out` with matrices in int8."""
    out = Path(out)
    folder = find_model(model)
    if out.exists() and not bundles.is_bundle(out):
        raise BundleError(f"{out} exists and is not a bundle; choose another folder with --output")
    if (out / TRAINING).exists() or out.resolve() == folder.resolve():
        raise BundleError(f"{out} is a model, which would be lost; choose another folder with --output")
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
        scores=(),  # those of the original do not hold for the rounded weights
        created=time.time(),
        shipped=False,
        golden=tuple(
            {**entry, "translation": text, "beam": TranslateOptions().beam}
            for entry, text in zip(golden, after, strict=True)
        ),
    )
    bundles.save_bundle(out, manifest, weights, bundle.tokenizer)
    unchanged = sum(one == other for one, other in zip(before, after, strict=True))
    result = QuantizeResult(out, _weight_bytes(folder), _weight_bytes(out), len(golden), unchanged)
    console.say(f"{folder} ({_mebibytes(result.bytes_before)}) -> {out} ({_mebibytes(result.bytes_after)})")
    if golden:
        console.say(f"{unchanged} of {len(golden)} golden sentences are translated as before")
    return result


def _translations(bundle: Bundle, golden: Sequence[Mapping[str, Any]], precision: Any) -> list[str]:
    if not golden:
        return []
    translator = Translator(
        bundle.net,
        bundle.tokenizer,
        longest=_longest_source(bundle.manifest, bundle.folder),
        options=TranslateOptions(precision=precision, device="cpu"),
    )
    return [
        translation.text for translation in translator.translate([str(entry["source"]) for entry in golden])
    ]


def _longest_source(manifest: Manifest, folder: Path) -> int:
    if not manifest.longest.get("source"):
        raise BundleError(f"the manifest of {folder} has no longest.source; copy the bundle again")
    return manifest.longest["source"]


def _weight_bytes(folder: Path) -> int:
    return (folder / bundles.WEIGHTS).stat().st_size


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
