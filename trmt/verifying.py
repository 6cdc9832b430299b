"""Verifying that a bundle still translates as it did when it was written.

A manifest contains golden sentences: sources, and their translations with the weights of the bundle.
Translating them again after a copy, an upgrade or on another machine shows whether anything has changed.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import trmt
from trmt import console
from trmt.bundles import bundles
from trmt.config import Options
from trmt.devices.choice import choose_device
from trmt.errors import BundleError, TrmtError
from trmt.training.models import find_model
from trmt.translating import TranslateOptions, Translator

GoldenSentences = Sequence[Mapping[str, Any]]  # source, translation and beam, maybe reference


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """What `trmt verify` takes."""

    model: Path | None = None  # bundle or run folder; None: the default one
    device: str = "auto"  # on which to translate
    trust_code: bool = False  # allow the bundle to name code outside trmt


@dataclass(frozen=True)
class ChangedTranslation:
    """A golden sentence that is no longer translated as it was."""

    source: str
    before: str
    now: str


@dataclass(frozen=True)
class VerifyResult:
    """What verifying found; damaged files raise an error instead."""

    folder: Path
    sentences: int  # number of golden sentences
    differences: tuple[ChangedTranslation, ...]
    versions: tuple[str, ...]  # versions that have changed since the bundle was written

    def problem(self) -> str | None:
        """The error message for changed translations; None if there are none."""
        if not self.differences:
            return None
        why = f", with other versions ({', '.join(self.versions)})" if self.versions else ""
        return (
            f"{len(self.differences)} of {self.sentences} golden sentences of {self.folder} are not "
            f"translated as when it was written{why}; compare the translations before you use it"
        )


def verify(options: VerifyOptions) -> VerifyResult:
    """Check a bundle's files and weights, and translate its golden sentences again."""
    folder = find_model(options.model)
    manifest = bundles.read_manifest(folder)
    weights = bundles.read_weights(folder, manifest)  # checks the checksum
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BundleError(f"the weights {name!r} of {folder} are not finite; use another checkpoint")
    now = translate_golden(folder, manifest.golden, device=options.device, trust_code=options.trust_code)
    differences = tuple(
        ChangedTranslation(str(golden["source"]), str(golden["translation"]), text)
        for golden, text in zip(manifest.golden, now, strict=True)
        if golden["translation"] != text
    )
    return VerifyResult(folder, len(now), differences, _changed(manifest.versions))


def translate_golden(
    folder: Path, golden: GoldenSentences, *, device: str = "auto", trust_code: bool = False
) -> list[str]:
    """Translations of golden sentences with the bundle, each with the beam size that it was made with."""
    beams = sorted({int(each.get("beam", 1)) for each in golden}) or [1]
    texts: dict[int, str] = {}
    for beam in beams:
        options = TranslateOptions(
            search="greedy" if beam == 1 else "beam",
            beam=beam,
            device=device,
            # The precision that golden sentences are made with: that of the bundle on a CPU.
            precision="auto" if choose_device(device).type == "cpu" else "fp32",
        )
        translator = Translator.load(folder, options=options, trust_code=trust_code)
        indices = [index for index, each in enumerate(golden) if int(each.get("beam", 1)) == beam]
        found = translator.translate([str(golden[index]["source"]) for index in indices])
        texts.update(zip(indices, (each.text for each in found), strict=True))
    return [texts[index] for index in range(len(golden))]


def record(folder: Path, sentences: GoldenSentences) -> None:
    """Translate sentences, which have a source and maybe a reference, and store them as golden ones.

    If the bundle cannot translate them, there is a warning and no golden sentences.
    """
    if not sentences:
        return
    plain = [{key: each[key] for key in ("source", "reference") if key in each} for each in sentences]
    try:
        texts = translate_golden(folder, plain, device="cpu")
    except TrmtError as error:
        console.warn(f"{folder} has no golden sentences: {error}")
        return
    golden = [{**each, "translation": text, "beam": 1} for each, text in zip(plain, texts, strict=True)]
    bundles.rewrite_manifest(folder, golden=tuple(golden))


def _changed(versions: Mapping[str, str]) -> tuple[str, ...]:
    current = {"trmt": trmt.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return tuple(
        f"{name} {versions[name]} -> {version}"
        for name, version in current.items()
        if name in versions and versions[name] != version
    )
