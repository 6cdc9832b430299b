"""`trmt export`: a bundle as another program's model, compared with trmt before it appears."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trmt
from trmt import console
from trmt.bundles import bundles, checkpoints
from trmt.bundles.bundles import Bundle
from trmt.config import Options
from trmt.errors import BundleError
from trmt.interop.base import Format, import_package
from trmt.interop.checking import check_sentences, compare, reference
from trmt.registry import FORMATS, resolve
from trmt.storage.files import atomic_folder, write_json
from trmt.training.models import find_model

PROVENANCE = "trmt.json"  # in an exported folder: what it was made from


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """What `trmt export` takes."""

    model: Path | None = None  # None: the default one
    to: str
    out: Path | None = None  # None: beside the model
    check: bool = True


def export(options: ExportOptions) -> Path:
    """Write a bundle as another program's model and return the folder.

    With `check`, that program first loads it and scores and translates some sentences. The folder appears
    only if the results are those of trmt.
    """
    folder = find_model(options.model)
    model = checkpoints.find_folder(options.model) if options.model else folder
    target: Format = resolve(FORMATS, options.to)()
    for package in target.packages:
        import_package(package)
    bundle = bundles.load_bundle(folder)
    out = options.out or model.with_name(f"{model.resolve().name}-{options.to}")
    _refuse_foreign(out)
    with atomic_folder(out) as partial:
        target.write(bundle, partial)
        write_json(partial / PROVENANCE, _provenance(bundle, options.to))
        outcome = _check(target, bundle, partial) if options.check else "not compared"
    console.say(f"{folder} for {target.name}, {outcome} -> {out}")
    return out


def _check(target: Format, bundle: Bundle, folder: Path) -> str:
    """Compare the exported model with the bundle; returns the result in words."""
    max_length = bundle.manifest.longest.get("source", 0) or 1
    ours = reference(bundle.net, bundle.tokenizer, check_sentences(bundle), max_source_length=max_length)
    difference = compare(ours, target.run(folder, bundle.tokenizer, ours.inputs), name=target.name)
    return (
        f"which translates {len(ours.inputs.sources)} sentences the same, log probabilities differing by "
        f"{difference:.1g} at most"
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
        raise BundleError(f"{out} exists and is not an exported model; choose another folder with --output")
