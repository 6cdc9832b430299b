"""Verifying: whether a bundle still does what it did when it was written.

A manifest keeps golden sentences: sources, and what these very weights made of them. Replaying them after a
copy, an upgrade or on another machine shows at once whether anything has changed that matters.
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
from trmt.bundles import bundles, checkpoints
from trmt.devices.choice import choose_device
from trmt.errors import BundleError, TrmtError
from trmt.translating import TranslateOptions, Translator

Sentences = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What `trmt verify` takes."""

    model: Path | None = None  # None: the default one
    device: str = "auto"
    trust_code: bool = False


@dataclass(frozen=True)
class Difference:
    """A golden sentence that is translated otherwise than it was."""

    source: str
    before: str
    now: str


@dataclass(frozen=True)
class Verified:
    """What verifying found; damaged files are errors and do not come this far."""

    folder: Path
    sentences: int
    differences: tuple[Difference, ...]
    versions: tuple[str, ...]  # what is not the version that the bundle was written with

    def problem(self) -> str | None:
        """What is wrong, as a sentence; None if nothing is."""
        if not self.differences:
            return None
        why = f", by other versions ({', '.join(self.versions)})" if self.versions else ""
        return (
            f"{len(self.differences)} of {self.sentences} golden sentences of {self.folder} are translated "
            f"otherwise than when it was written{why}; compare the translations before you rely on it"
        )


def verify(options: VerifyOptions) -> Verified:
    """Check a bundle's files and weights, and replay its golden sentences."""
    folder = checkpoints.find_bundle(options.model) if options.model else checkpoints.default_bundle()
    manifest = bundles.read_manifest(folder)
    weights = bundles.read_weights(folder, manifest)  # as they were written, or this fails
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise BundleError(f"the weights {name!r} of {folder} are not all numbers; use another checkpoint")
    now = replayed(folder, manifest.golden, device=options.device, trust_code=options.trust_code)
    differences = tuple(
        Difference(str(golden["source"]), str(golden["translation"]), text)
        for golden, text in zip(manifest.golden, now, strict=True)
        if golden["translation"] != text
    )
    return Verified(folder, len(now), differences, _changed(manifest.versions))


def replayed(folder: Path, golden: Sentences, *, device: str = "auto", trust_code: bool = False) -> list[str]:
    """What the bundle makes of golden sentences today, each searched for as it was then."""
    beams = sorted({int(each.get("beam", 1)) for each in golden}) or [1]
    texts: dict[int, str] = {}
    for beam in beams:
        options = TranslateOptions(
            search="greedy" if beam == 1 else "beam",
            beam=beam,
            device=device,
            # They were made in the precision of the bundle.
            precision="auto" if choose_device(device).type == "cpu" else "fp32",
        )
        translator = Translator.load(folder, options=options, trust_code=trust_code)
        places = [place for place, each in enumerate(golden) if int(each.get("beam", 1)) == beam]
        found = translator.translate([str(golden[place]["source"]) for place in places])
        texts.update(zip(places, (each.text for each in found), strict=True))
    return [texts[place] for place in range(len(golden))]


def record(folder: Path, sentences: Sentences) -> None:
    """Make golden sentences of these: each has a source, and may have a reference.

    A bundle that cannot translate them is still a bundle; that it has none is said.
    """
    if not sentences:
        return
    plain = [{key: each[key] for key in ("source", "reference") if key in each} for each in sentences]
    try:
        texts = replayed(folder, plain, device="cpu")
    except TrmtError as error:
        console.warn(f"{folder} has no golden sentences: {error}")
        return
    golden = [{**each, "translation": text, "beam": 1} for each, text in zip(plain, texts, strict=True)]
    bundles.rewrite_manifest(folder, golden=tuple(golden))


def _changed(versions: Mapping[str, str]) -> tuple[str, ...]:
    today = {"trmt": trmt.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return tuple(
        f"{name} {versions[name]} -> {version}"
        for name, version in today.items()
        if name in versions and versions[name] != version
    )
