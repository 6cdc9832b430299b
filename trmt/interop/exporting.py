"""Exporting: a bundle as another program's model, compared with ours before anybody sees it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trmt
from trmt import console
from trmt.bundles import bundles, checkpoints
from trmt.bundles.bundles import Bundle
from trmt.errors import BundleError
from trmt.interop.base import Format, package
from trmt.interop.probes import compare, expected, sentences
from trmt.registry import FORMATS, resolve
from trmt.storage.files import atomic_folder, write_json

PROVENANCE = "trmt.json"  # in an exported folder: what it was made from


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What `trmt export` takes."""

    model: Path | None = None  # None: the default one
    to: str
    out: Path | None = None  # None: beside the model
    check: bool = True


def export(options: ExportOptions) -> Path:
    """Write a bundle as another program's model and return the folder.

    With `check`, that program loads it first and has to score and translate some sentences as ours does;
    the folder appears only if it does.
    """
    place = options.model or checkpoints.default_bundle()
    folder = checkpoints.find_bundle(place)
    kind: Format = resolve(FORMATS, options.to)()
    for name in kind.packages:
        package(name)
    bundle = bundles.load_bundle(folder)
    out = options.out or place.with_name(f"{place.resolve().name}-{options.to}")
    _refuse_foreign(out)
    with atomic_folder(out) as partial:
        kind.write(bundle, partial)
        write_json(partial / PROVENANCE, _provenance(bundle, options.to))
        said = _compared(kind, bundle, partial) if options.check else "not compared"
    console.say(f"{folder} for {kind.name}, {said} -> {out}")
    return out


def _compared(kind: Format, bundle: Bundle, folder: Path) -> str:
    longest = bundle.manifest.longest.get("source", 0) or 1
    ours = expected(bundle.net, bundle.tokenizer, sentences(bundle), longest=longest)
    worst = compare(ours, kind.outcome(folder, bundle.tokenizer, ours.probe), name=kind.name)
    return (
        f"which translates {len(ours.probe.sources)} sentences the same, log probabilities differing by "
        f"{worst:.1g} at most"
    )


def _provenance(bundle: Bundle, to: str) -> dict[str, object]:
    manifest = bundle.manifest
    return {
        "format": to,
        "trmt": trmt.__version__,
        "weights": manifest.weights.get("sha256"),
        "languages": manifest.languages,
        "normalisation": manifest.normalisation,
        "longest": manifest.longest,
        "licences": manifest.licences,
    }


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not (out / PROVENANCE).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise BundleError(f"{out} is there and is no export; choose another place with --out")
