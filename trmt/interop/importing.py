"""`trmt import`: another program's model as a bundle, compared with that program."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from trmt import console
from trmt.bundles import bundles
from trmt.bundles.bundles import Bundle, Manifest
from trmt.bundles.checkpoints import MODELS
from trmt.config import Options
from trmt.errors import BundleError
from trmt.interop import from_marian
from trmt.interop.checking import check_sentences, compare, reference
from trmt.interop.from_marian import MarianModel
from trmt.interop.huggingface_folder import refuse_bundle
from trmt.interop.to_huggingface import HuggingFace
from trmt.storage.files import atomic_folder
from trmt.text.tokenizer import Tokenizer
from trmt.verifying import record

CARD = 1 << 20  # characters of a model card that are read


@dataclass(frozen=True, kw_only=True)
class ImportOptions(Options):
    """What `trmt import` takes."""

    folder: Path
    out: Path | None = None  # None: in models/, with the name of the folder
    languages: tuple[str, str] = ("", "")  # empty: those that the model names
    check: bool = True


def import_model(options: ImportOptions) -> Path:
    """Make a bundle of a Marian model in a Hugging Face folder and return the bundle's folder.

    With `check`, and where transformers is installed, it appears only if both score and translate some
    sentences alike.
    """
    refuse_bundle(options.folder)
    out = options.out or MODELS / options.folder.resolve().name
    if out.exists() and not bundles.is_bundle(out):
        raise BundleError(f"{out} exists and is not a bundle; choose another folder with --output")
    model = _with_languages(from_marian.read_marian(options.folder), options.languages)
    manifest = _manifest(model, options.folder)
    with atomic_folder(out) as partial:
        manifest = bundles.write_bundle(partial, manifest, model.net.state_dict(), model.tokenizer)
        bundle = Bundle(partial, manifest, model.net, model.tokenizer)
        texts = check_sentences(bundle)
        outcome = _check(bundle, options.folder, texts) if options.check else "not compared"
        record(partial, [{"source": text} for text in texts])
    console.say(f"{options.folder}, {outcome} -> {out}")
    return out


def _with_languages(model: MarianModel, languages: tuple[str, str]) -> MarianModel:
    """The model with the languages that the user gave."""
    if not any(languages):
        return model
    old = model.tokenizer
    source, target = (given or known for given, known in zip(languages, old.languages, strict=True))
    settings = replace(old.settings, languages=(source, target))
    return replace(model, tokenizer=Tokenizer(settings, old.models, old.vocabularies))


def _manifest(model: MarianModel, folder: Path) -> Manifest:
    return bundles.make_manifest(
        model.net,
        "transformer",
        model.tokenizer,
        longest={"source": model.max_length, "target": model.max_length},
        training={"imported": folder.resolve().name},
        created=time.time(),
        licences=_licences(folder / "README.md"),
    )


def _licences(card: Path) -> tuple[str, ...]:
    """The licence that a model card names."""
    if not card.is_file():
        return ()
    with card.open(encoding="utf-8", errors="replace") as stream:
        text = stream.read(CARD)
    match = re.search(r"^license: *(\S+) *$", text.partition("\n---\n")[0], re.MULTILINE)
    return (match[1],) if match else ()


def _check(bundle: Bundle, folder: Path, texts: list[str]) -> str:
    """Compare the bundle with the original model; returns the result in words."""
    if find_spec("transformers") is None:
        return "not compared, as transformers is not installed"
    ours = reference(bundle.net, bundle.tokenizer, texts, max_source_length=bundle.manifest.longest["source"])
    original = HuggingFace()
    difference = compare(ours, original.run(folder, bundle.tokenizer, ours.inputs), name=original.name)
    return (
        f"which Hugging Face translates the same in {len(ours.inputs.sources)} sentences, log probabilities "
        f"differing by {difference:.1g} at most"
    )
