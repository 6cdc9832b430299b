"""Planning a run: which data and which recipe, and whether a run folder can be resumed with them."""

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
from trmt.sets.record import describe_changes
from trmt.sets.shards import DOCUMENTS, PAIRS, PreparedSet
from trmt.text.tokenizer import Tokenizer
from trmt.training.recipe import (
    MAY_CHANGE,
    Recipe,
    differences,
    fitting_recipe,
    load_recipe,
    read_recipe,
    with_defaults,
)

DATA = Path("data")
SCHEDULES_WITH_END = ("linear", "cosine")  # whose learning rate depends on the last step
ORIGIN = "origin.json"  # in a run folder


@dataclass(frozen=True)
class Origin:
    """What a run was started with, so that naming its folder is enough to resume it."""

    data: str  # folder of the prepared set
    fingerprint: str  # of the prepared set
    init_from: str | None = None  # what --init-from named
    init_weights: str | None = None  # checksum of those weights


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What `trmt train` takes; None means a default, which is printed."""

    run: Path | None = None  # the run folder; None: models/<data>-<recipe>
    data: Path | None = None  # the prepared set; None: that of the run, else the newest in data/
    recipe: str | None = None  # name or path; None: that of the run, else one that fits the size of the data
    settings: list[str] = field(default_factory=list)  # changes of the recipe as key=value
    init_from: Path | None = None  # bundle or run folder whose weights to start from
    dry_run: bool = False  # only report what training would need
    trust_code: bool = False  # allow bundles and run folders to name code outside trmt
    pretrain: bool = False  # train on documents in one language


def with_origin(options: TrainOptions) -> TrainOptions:
    """The options, completed with what the named run folder was started with."""
    if not options.run:
        return options
    checkpoints.check_format(options.run)
    origin = read_origin(options.run)
    if not origin:
        return options
    init_from = options.init_from
    if init_from is None and origin.init_from and not checkpoints.list_checkpoints(options.run):
        init_from = Path(origin.init_from)
    return replace(options, data=options.data or Path(origin.data), init_from=init_from)


def read_origin(folder: Path) -> Origin | None:
    """What the run in `folder` was started with; None where there is no run yet."""
    path = folder / ORIGIN
    try:
        return build(Origin, json.loads(path.read_bytes()), where=str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise BundleError(f"cannot read {path}: {error}; name another run folder") from error


def origin_of(options: TrainOptions, data: PreparedSet) -> Origin:
    """What a run with these options starts with."""
    if not options.init_from:
        return Origin(str(data.folder), data.fingerprint)
    bundle = checkpoints.find_bundle(init_from.split_encoder_suffix(options.init_from)[0])
    weights = bundles.read_manifest(bundle).weights.get("sha256")
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
        return PAIRS  # opening the set will raise an error that explains


def _default_recipe(options: TrainOptions, pairs: int) -> str:
    """The recipe of the run folder, else one that fits the size of the data."""
    if options.run and (options.run / CONFIG).is_file():
        console.say(f"recipe: {options.run / CONFIG}")
        return str(options.run / CONFIG)
    if options.pretrain:
        name = "bert-base" if torch.cuda.is_available() and pairs >= 1_000_000 else "bert-tiny"
        console.say(f"recipe: {name} (fits {pairs:,} sentences)")
        return name
    name = fitting_recipe(pairs, gpu=torch.cuda.is_available())
    console.say(f"recipe: {name} (fits {pairs:,} pairs)")
    return name


def resolved_recipe(
    options: TrainOptions, data: PreparedSet, tokenizer: Tokenizer, *, translates: bool
) -> tuple[Recipe, str]:
    """The recipe and its name; vocabulary sizes and, for --init-from, the network's sizes are filled in."""
    name = options.recipe or _default_recipe(options, len(data.split("train")))
    settings = list(options.settings)
    if not translates:
        settings += ["validation.sentences=0", 'validation.metric="loss"']
    encoder: init_from.EncoderOptions | None = None
    if options.init_from:
        path, encoder_only = init_from.split_encoder_suffix(options.init_from)
        bundle = checkpoints.find_bundle(path)
        manifest = bundles.read_manifest(bundle)
        if manifest.tokenizer != tokenizer.fingerprint:
            raise BundleError(
                f"{bundle} was trained with another tokenizer than {data.folder}; prepare the "
                f"data with --tokenizer {bundle / bundles.TOKENIZER}"
            )
        if encoder_only:
            encoder = init_from.encoder_options(manifest, where=bundle)
            recipe = load_recipe(name, settings, network=encoder.network, variants=encoder.variants)
        else:
            recipe = load_recipe(name, settings, network=manifest.network, architecture=manifest.architecture)
    else:
        recipe = load_recipe(name, settings)
    # A recipe of the user's own may name code; a bundle or a run folder may come from anywhere.
    trusted = options.trust_code or not (options.init_from or Path(name).name == CONFIG)
    network = resolve(NETWORKS, recipe.architecture, trust_code=trusted)
    resolve(OBJECTIVES, recipe.objective, trust_code=trusted)
    if encoder:
        if not network.takes_encoder:
            raise ConfigError(
                f"architecture = {recipe.architecture!r} cannot take over the encoder of --init-from "
                f"{options.init_from}; choose the recipe of a transformer"
            )
        init_from.check_options(recipe.architecture, recipe.network, encoder, where=bundle)
    recipe = _with_vocabularies(recipe, network.config_class, tokenizer)
    _check_purpose(options, recipe, data)
    if not tokenizer.joint and recipe.network.get("tied", getattr(network.config_class, "tied", "")) == "all":
        recipe = replace(recipe, network={**recipe.network, "tied": "target"})
    return recipe, Path(name).stem


def _with_vocabularies(recipe: Recipe, config_class: type, tokenizer: Tokenizer) -> Recipe:
    """The recipe with the sizes of the tokenizer's vocabularies, where the network has fields for them."""
    sizes = {
        "source_vocabulary": tokenizer.source.vocabulary,
        "target_vocabulary": tokenizer.target.vocabulary,
    }
    known = {each.name for each in fields(config_class)}
    wanted = {name: size for name, size in sizes.items() if name in known}
    return replace(recipe, network={**wanted, **recipe.network})


def _check_purpose(options: TrainOptions, recipe: Recipe, data: PreparedSet) -> None:
    """Refuse to pretrain on pairs, and to train a translator on documents."""
    if options.pretrain != (data.kind == DOCUMENTS):
        command, other = ("pretrain", "train") if options.pretrain else ("train", "pretrain")
        raise ConfigError(
            f"{data.folder} holds {data.kind}, on which trmt {command} does not train; use trmt {other}, "
            "or name another set with --data"
        )


def check_same_run(folder: Path, recipe: Recipe, origin: Origin) -> None:
    """Refuse to resume a run with data, initial weights or settings that would make it another run."""
    checkpoints.check_format(folder)
    if not checkpoints.list_checkpoints(folder):
        return
    started = read_origin(folder)
    if started and started.fingerprint != origin.fingerprint:
        raise DataError(
            f"{origin.data} is not the data that {folder} was trained on"
            f"{describe_changes(folder, Path(origin.data))}; prepare it as before, or name another run "
            "folder to start a new run"
        )
    if started and origin.init_from and started.init_weights != origin.init_weights:
        raise ConfigError(
            f"{folder} was started with --init-from {started.init_from} and cannot go on from the weights of "
            f"{origin.init_from}; name another run folder"
        )
    before = read_recipe(folder / CONFIG)
    if (before.architecture, before.objective) == (recipe.architecture, recipe.objective):
        # Older versions wrote no defaults. `resolved_recipe` has checked that both classes may be loaded.
        before, recipe = (with_defaults(each, trust_code=True) for each in (before, recipe))
    changed = differences(before, recipe)
    for key, (old, new) in changed.items():
        if key not in MAY_CHANGE:
            raise ConfigError(
                f"{folder} was started with {key} = {old!r} and cannot go on with {new!r}; "
                "set it back, or name another run folder"
            )
    for key, (old, new) in changed.items():
        console.say(f"{key}: {old!r} -> {new!r}")
    if {"training.steps", "training.epochs"} & changed.keys() and recipe.optim.schedule in SCHEDULES_WITH_END:
        console.warn(
            f'optim.schedule = "{recipe.optim.schedule}" depends on the last step, which has changed: the '
            "learning rate of the steps so far was another than in a run with this last step"
        )
