"""What a training run is to be: its data, its recipe, and whether that is the run it was before."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from trmt import console
from trmt.bundles import bundles, checkpoints, init_from
from trmt.bundles.checkpoints import CONFIG
from trmt.config import build
from trmt.errors import BundleError, ConfigError, DataError
from trmt.registry import NETWORKS, OBJECTIVES, resolve
from trmt.sets.shards import DOCUMENTS, PAIRS, PreparedSet
from trmt.sets.unchanged import difference
from trmt.text.tokenizer import Tokenizer
from trmt.training.recipe import MAY_CHANGE, Recipe, differences, fitting, load_recipe, read_recipe

DATA = Path("data")
FOLLOWS_THE_END = ("linear", "cosine")  # schedules
ORIGIN = "origin.json"  # in a run folder: what the run was begun with


@dataclass(frozen=True)
class Origin:
    """What a run was begun with, so that it can go on from its folder alone."""

    data: str
    fingerprint: str  # of the data
    init_from: str | None = None
    init_weights: str | None = None  # their checksum


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What `trmt train` takes; None means the sensible choice, which is said."""

    run: Path | None = None
    data: Path | None = None
    recipe: str | None = None
    settings: list[str] = field(default_factory=list)
    init_from: Path | None = None
    dry_run: bool = False
    trust_code: bool = False
    pretrain: bool = False  # on documents in one language


def remembered(options: TrainOptions) -> TrainOptions:
    """The options with what the named run folder remembers of its beginning filled in."""
    origin = read_origin(options.run) if options.run else None
    if not origin or not options.run:
        return options
    init_from = options.init_from
    if init_from is None and origin.init_from and not checkpoints.steps(options.run):
        init_from = Path(origin.init_from)
    return replace(options, data=options.data or Path(origin.data), init_from=init_from)


def read_origin(folder: Path) -> Origin | None:
    """What the run in `folder` was begun with; None where there is none yet."""
    path = folder / ORIGIN
    try:
        return build(Origin, json.loads(path.read_bytes()), where=str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {path}: {error}; name another run folder") from error


def origin_of(options: TrainOptions, data: PreparedSet) -> Origin:
    """What a run with these options begins with."""
    if not options.init_from:
        return Origin(str(data.folder), data.fingerprint)
    place = checkpoints.find_bundle(init_from.split(options.init_from)[0])
    weights = bundles.read_manifest(place).weights.get("sha256")
    return Origin(str(data.folder), data.fingerprint, str(options.init_from), weights)


def default_data(*, kind: str = PAIRS) -> Path:
    """The only or newest prepared set in data/, of pairs or of documents."""
    found = [index.parent for index in DATA.glob("*/index.json") if _kind(index) == kind]
    if not found:
        how = "trmt prepare --documents" if kind == DOCUMENTS else "trmt prepare"
        raise DataError(f"there is no prepared set of {kind} in {DATA}/; run {how} first, or pass --data")
    newest = max(found, key=lambda folder: (folder / "index.json").stat().st_mtime)
    console.say(f"data: {newest}" + (" (the newest)" if len(found) > 1 else ""))
    return newest


def _kind(index: Path) -> str:
    try:
        return str(json.loads(index.read_bytes()).get("kind", PAIRS))
    except (OSError, ValueError, AttributeError):
        return PAIRS  # opening it will say what is wrong


def _usual_recipe(options: TrainOptions, pairs: int) -> str:
    """The recipe that the run was begun with, else one that fits the size of the data."""
    if options.run and (options.run / CONFIG).is_file():
        console.say(f"recipe: that of {options.run}")
        return str(options.run / CONFIG)
    if options.pretrain:
        name = "bert-base" if torch.cuda.is_available() and pairs >= 1_000_000 else "bert-tiny"
        console.say(f"recipe: {name} (fits {pairs:,} sentences)")
        return name
    name = fitting(pairs, gpu=torch.cuda.is_available())
    console.say(f"recipe: {name} (fits {pairs:,} pairs)")
    return name


def resolved_recipe(
    options: TrainOptions, data: PreparedSet, tokenizer: Tokenizer, *, translates: bool
) -> tuple[Recipe, str]:
    """The recipe with the data's sizes and, for fine-tuning, the old network's sizes filled in; its name."""
    name = options.recipe or _usual_recipe(options, len(data.split("train")))
    settings = list(options.settings)
    if not translates:
        settings += ["validation.sentences=0", 'validation.metric="loss"']
    encoder: init_from.EncoderOptions | None = None
    if options.init_from:
        named, encoder_only = init_from.split(options.init_from)
        place = checkpoints.find_bundle(named)
        manifest = bundles.read_manifest(place)
        if manifest.tokenizer != tokenizer.fingerprint:
            raise BundleError(
                f"{place} was trained with another tokenizer than {data.folder}; prepare the "
                f"data with --tokenizer {place / bundles.TOKENIZER}"
            )
        if encoder_only:
            encoder = init_from.encoder_options(manifest, where=place)
            recipe = load_recipe(name, settings, network=encoder.network, variants=encoder.variants)
        else:
            recipe = load_recipe(name, settings, network=manifest.network, architecture=manifest.architecture)
    else:
        recipe = load_recipe(name, settings)
    # What the user wrote may name code; a bundle or a run folder may come from anywhere.
    trusted = options.trust_code or not (options.init_from or Path(name).name == CONFIG)
    network = resolve(NETWORKS, recipe.architecture, trust_code=trusted)
    resolve(OBJECTIVES, recipe.objective, trust_code=trusted)
    if encoder:
        if not network.takes_encoder:
            raise ConfigError(
                f"architecture = {recipe.architecture!r} has no encoder that --init-from {options.init_from} "
                "could be; choose the recipe of a transformer"
            )
        init_from.check_options(recipe.architecture, recipe.network, encoder, where=place)
    recipe = _with_sizes(recipe, network.config_class, tokenizer)
    _check_purpose(options, recipe, data)
    if not tokenizer.joint and recipe.network.get("tied", getattr(network.config_class, "tied", "")) == "all":
        recipe = replace(recipe, network={**recipe.network, "tied": "target"})
    return recipe, Path(name).stem


def _with_sizes(recipe: Recipe, config_class: type, tokenizer: Tokenizer) -> Recipe:
    """The recipe with the tokenizer's vocabularies, as far as the network wants to know them."""
    sizes = {
        "source_vocabulary": tokenizer.source.vocabulary,
        "target_vocabulary": tokenizer.target.vocabulary,
    }
    known = {each.name for each in fields(config_class)}
    wanted = {name: size for name, size in sizes.items() if name in known}
    return replace(recipe, network={**wanted, **recipe.network})


def _check_purpose(options: TrainOptions, recipe: Recipe, data: PreparedSet) -> None:
    """Refuse to train on documents what translates pairs, and the other way round."""
    if options.pretrain != (data.kind == DOCUMENTS):
        command, other = ("pretrain", "train") if options.pretrain else ("train", "pretrain")
        raise ConfigError(
            f"{data.folder} holds {data.kind}, which trmt {command} does not learn from; use trmt {other}, "
            "or name another set with --data"
        )


def check_same_run(folder: Path, recipe: Recipe, origin: Origin) -> None:
    """Refuse by name what would make a run that has checkpoints another one."""
    if not checkpoints.steps(folder):
        return
    began = read_origin(folder)
    if began and began.fingerprint != origin.fingerprint:
        raise DataError(
            f"{origin.data} is not the data that {folder} was trained on"
            f"{difference(folder, Path(origin.data))}; prepare it as before, or name another run folder to "
            "start a new run"
        )
    if began and origin.init_from and began.init_weights != origin.init_weights:
        raise ConfigError(
            f"{folder} was begun with --init-from {began.init_from} and cannot go on from the weights of "
            f"{origin.init_from}; name another run folder"
        )
    before = read_recipe(folder / CONFIG)
    changed = differences(before, recipe)
    for key, (old, new) in changed.items():
        if key not in MAY_CHANGE:
            raise ConfigError(
                f"{folder} was begun with {key} = {old!r} and cannot go on with {new!r}; "
                "set it back, or name another run folder"
            )
    for key, (old, new) in changed.items():
        console.say(f"{key}: {old!r} -> {new!r}")
    if {"training.steps", "training.epochs"} & changed.keys() and recipe.optim.schedule in FOLLOWS_THE_END:
        console.warn(
            f'optim.schedule = "{recipe.optim.schedule}" follows the new end: the learning rate is not what '
            "it would have been had the end been known from the start"
        )
