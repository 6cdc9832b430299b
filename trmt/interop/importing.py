"""Importing: another program's model as a bundle, compared with what that program makes of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from trmt import console
from trmt.bundles import bundles
from trmt.bundles.bundles import Bundle, Manifest
from trmt.bundles.checkpoints import MODELS
from trmt.errors import BundleError
from trmt.interop import from_marian
from trmt.interop.from_marian import Imported
from trmt.interop.probes import compare, expected, sentences
from trmt.interop.to_huggingface import HuggingFace
from trmt.storage.files import atomic_folder
from trmt.text.tokenizer import Tokenizer
from trmt.verifying import record


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What `trmt import` takes."""

    folder: Path
    out: Path | None = None  # None: in models/, with the name of the folder
    languages: tuple[str, str] = ("", "")  # empty: those that the model tells
    check: bool = True


def import_model(options: ImportOptions) -> Path:
    """Make a bundle of a Marian model in a Hugging Face folder and return the bundle's folder.

    With `check`, and where transformers is installed, it appears only if both score and translate some
    sentences alike.
    """
    out = options.out or MODELS / options.folder.resolve().name
    if out.exists() and not bundles.is_bundle(out):
        raise BundleError(f"{out} is there and is no bundle; choose another place with --out")
    found = _named(from_marian.read(options.folder), options.languages)
    manifest = _manifest(found, options.folder)
    with atomic_folder(out) as partial:
        manifest = bundles.write_bundle(partial, manifest, found.net.state_dict(), found.tokenizer)
        bundle = Bundle(partial, manifest, found.net, found.tokenizer)
        texts = sentences(bundle)
        said = _compared(bundle, options.folder, texts) if options.check else "not compared"
        record(partial, [{"source": text} for text in texts])
    console.say(f"{options.folder}, {said} -> {out}")
    return out


def _named(found: Imported, languages: tuple[str, str]) -> Imported:
    """The model with the languages that the user told."""
    if not any(languages):
        return found
    old = found.tokenizer
    source, target = (told or known for told, known in zip(languages, old.languages, strict=True))
    settings = replace(old.settings, languages=(source, target))
    return replace(found, tokenizer=Tokenizer(settings, old.models, old.listed))


def _manifest(found: Imported, folder: Path) -> Manifest:
    return bundles.make_manifest(
        found.net,
        "transformer",
        found.tokenizer,
        longest={"source": found.longest, "target": found.longest},
        training={"imported": folder.resolve().name},
        licences=_licences(folder / "README.md"),
    )


def _licences(card: Path) -> tuple[str, ...]:
    """The licence that a model card names."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    named = re.search(r"^license: *(\S+) *$", text.partition("\n---\n")[0], re.MULTILINE)
    return (named[1],) if named else ()


def _compared(bundle: Bundle, folder: Path, texts: list[str]) -> str:
    if find_spec("transformers") is None:
        return "not compared, as transformers is not installed"
    ours = expected(bundle.net, bundle.tokenizer, texts, longest=bundle.manifest.longest["source"])
    marian = HuggingFace()
    worst = compare(ours, marian.outcome(folder, bundle.tokenizer, ours.probe), name=marian.name)
    return (
        f"which Hugging Face translates the same in {len(ours.probe.sources)} sentences, log probabilities "
        f"differing by {worst:.1g} at most"
    )
