"""Planning a run: which data and which recipe, and whether a run folder can be resumed with them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

from trmt import console
from trmt.bundles import bundles, checkpoints, init_from
from trmt.bundles.checkpoints import CONFIG, MODELS
from trmt.config import Options, Tree, build_stored, select, to_tree
from trmt.devices.choice import named_device
from trmt.errors import BundleError, ConfigError, DataError
from trmt.registry import NETWORKS, OBJECTIVES, resolve
from trmt.sets.index import INDEX
from trmt.sets.record import describe_changes
from trmt.sets.shards import DOCUMENTS, PAIRS, PreparedSet
from trmt.storage.locks import LOCK
from trmt.text.corpus import DATASET_PREFIX, is_table
from trmt.text.tokenizer import Tokenizer
from trmt.training import fine_tuning
from trmt.training.history import LOG, NEW
from trmt.training.recipe import (
    MAY_CHANGE,
    SELECTED,
    Recipe,
    differences,
    fitting_recipe,
    flat,
    is_file,
    load_recipe,
    read_recipe,
    recipe_from,
    safe_name,
    with_defaults,
)
from trmt.training.spikes import ROLLBACKS
from trmt.trees import TreeError, read_json, shown, verified

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
class TrainOptions(Options):
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
    _check_run_name(options.run)
    run = checkpoints.find_folder(options.run)
    options = replace(options, run=run)
    checkpoints.check_format(run)
    origin = read_origin(run)
    if not origin:
        return options
    init_from = options.init_from
    if init_from is None and origin.init_from and not checkpoints.list_checkpoints(run):
        init_from = Path(origin.init_from)
    return replace(options, data=options.data or Path(origin.data), init_from=init_from)


def read_origin(folder: Path) -> Origin | None:
    """What the run in `folder` was started with; None where there is no run yet."""
    path = folder / ORIGIN
    advice = "restore the file, or name another run folder"
    try:
        tree = read_json(path)
        found = build_stored(Origin, tree, where=str(path), advice=advice)
        verified(tree)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}; {advice}") from error
    except TreeError as error:
        raise BundleError(f"{path} {error}; {advice}") from error
    return found


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
        return str(read_json(index).get("kind", PAIRS))
    except (OSError, ValueError, AttributeError):
        return PAIRS  # opening the set will raise an error that explains


def _default_recipe(options: TrainOptions, data: PreparedSet) -> str:
    """The recipe of the run folder, else one that fits the size of the data."""
    pairs = len(data.split("train"))
    if options.run and (options.run / CONFIG).is_file():
        console.say(f"recipe: {options.run / CONFIG}")
        return str(options.run / CONFIG)
    if options.pretrain:
        name = "bert-base" if named_device("auto").type == "cuda" and pairs >= 1_000_000 else "bert-tiny"
        console.say(f"recipe: {name} (fits {pairs:,} sentences)")
        return name
    name = fitting_recipe(pairs, gpu=named_device("auto").type == "cuda")
    if options.run or run_folder(options, data, name).exists():
        former = None
    else:
        former = _former_recipe(options, data)
    console.say(
        f"recipe: {former} (of a run on this data)" if former else f"recipe: {name} (fits {pairs:,} pairs)"
    )
    return former or name


def _former_recipe(options: TrainOptions, data: PreparedSet) -> str | None:
    """The recipe that another version selected for this set, if there is a run with it."""
    for name in SELECTED:
        origin = read_origin(run_folder(options, data, name))
        if origin and origin.fingerprint == data.fingerprint:
            return name
    return None


def resolved_recipe(
    options: TrainOptions, data: PreparedSet, tokenizer: Tokenizer, *, translates: bool
) -> tuple[Recipe, str]:
    """The recipe and its name; vocabulary sizes and, for --init-from, the network's sizes are filled in."""
    name = options.recipe or _default_recipe(options, data)
    settings = list(options.settings)
    if not translates:
        settings += ["validation.sentences=0", 'validation.metric="loss"']
    encoder: init_from.EncoderOptions | None = None
    folder = run_folder(options, data, name)
    load = partial(load_recipe, name, settings, defaults=_kept_settings(folder))
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
            recipe = load(network=encoder.network, variants=encoder.variants)
        else:
            load = partial(load, network=manifest.network, architecture=manifest.architecture)
            recipe = load(overrides=_fine_tuning(options, folder, load(), data, bundle=bundle, name=name))
    else:
        recipe = load()
    # A recipe of the user's own may name code; a bundle or a run folder may come from anywhere.
    trusted = options.trust_code or not (options.init_from or Path(name).name == CONFIG)
    network_class = resolve(NETWORKS, recipe.architecture, trust_code=trusted)
    resolve(OBJECTIVES, recipe.objective, trust_code=trusted)
    if encoder:
        if not network_class.takes_encoder:
            raise ConfigError(
                f"architecture = {recipe.architecture!r} cannot take over the encoder of --init-from "
                f"{options.init_from}; choose the recipe of a transformer"
            )
        init_from.check_options(recipe.architecture, recipe.network, encoder, where=bundle)
    config_class = network_class.config_class
    recipe = _with_vocabularies(recipe, config_class, tokenizer)
    _check_purpose(options, recipe, data)
    if not tokenizer.joint and recipe.network.get("tied", getattr(config_class, "tied", "")) == "all":
        recipe = replace(recipe, network={**recipe.network, "tied": "target"})
    if options.init_from:
        init_from.check_network(recipe.architecture, recipe.network, bundle, manifest, encoder)
    return recipe, Path(name).stem


def run_folder(options: TrainOptions, data: PreparedSet, recipe: str) -> Path:
    """The folder of the run with this recipe."""
    return options.run or MODELS / safe_name(f"{data.folder.resolve().name}-{Path(recipe).stem}")


def _kept_settings(folder: Path) -> Tree:
    """What a run that is resumed keeps where neither its recipe nor --set names it: its patience."""
    before = _resumed_recipe(folder)
    return {"training": {"patience": before.training.patience}} if before else {}


def _resumed_recipe(folder: Path) -> Recipe | None:
    """The recipe of a run that has a checkpoint to resume from."""
    if not (folder / CONFIG).is_file() or not checkpoints.list_checkpoints(folder):
        return None
    return read_recipe(folder / CONFIG)


def _fine_tuning(
    options: TrainOptions, folder: Path, recipe: Recipe, data: PreparedSet, *, bundle: Path, name: str
) -> Tree:
    """The schedule of fine-tuning the model in `bundle` with a recipe that comes with trmt.

    A run that is resumed keeps its own.
    """
    if options.pretrain or is_file(name) or fine_tuning.is_pretrained(bundle):
        return {}
    if before := _resumed_recipe(folder):
        return select(to_tree(before), fine_tuning.KEYS)
    changes = fine_tuning.schedule(recipe, data)
    given = {setting.partition("=")[0].strip() for setting in options.settings}
    if "optim.schedule" in given:
        del changes["optim"]  # a rate is for one schedule
    chosen = select(changes, [key for key in fine_tuning.KEYS if key not in given])
    if chosen:
        console.say(fine_tuning.describe(chosen))
    return chosen


def _with_vocabularies(recipe: Recipe, config_class: type, tokenizer: Tokenizer) -> Recipe:
    """The recipe with the sizes of the tokenizer's vocabularies, where the network has fields for them."""
    sizes = {
        "source_vocabulary": tokenizer.source.vocabulary,
        "target_vocabulary": tokenizer.target.vocabulary,
    }
    known = {each.name for each in fields(config_class)}
    wanted = {name: size for name, size in sizes.items() if name in known}
    for name, size in wanted.items():
        given = recipe.network.get(name, size)
        if isinstance(given, int) and given < size:
            raise ConfigError(
                f"network.{name} = {given:,} is less than the {size:,} pieces of the tokenizer; leave it "
                "out: it is set from the tokenizer"
            )
    return replace(recipe, network={**wanted, **recipe.network})


def _check_purpose(options: TrainOptions, recipe: Recipe, data: PreparedSet) -> None:
    """Refuse to pretrain on pairs, and to train a translator on documents."""
    if options.pretrain != (data.kind == DOCUMENTS):
        command, other = ("pretrain", "train") if options.pretrain else ("train", "pretrain")
        raise ConfigError(
            f"{data.folder} holds {data.kind}, on which trmt {command} does not train; use trmt {other}, "
            "or name another set with --data"
        )


def _check_run_name(run: Path) -> None:
    """Refuse text in place of a run folder."""
    if run.is_dir():
        return
    is_corpus = "," in str(run) or str(run).startswith(DATASET_PREFIX)
    if is_corpus or run.is_file():
        corpus = run if is_corpus or is_table(str(run)) else "SOURCE,TARGET"
        raise ConfigError(
            f"{run} is {'text' if is_corpus else 'a file'} and not a run folder; train on text with trmt new "
            f"DIR --train {corpus}, or name a run folder"
        )


def check_run_folder(folder: Path) -> None:
    """Refuse a folder with other files than those of a run, which training would mix with it."""
    _check_run_name(folder)
    if not folder.is_dir() or (folder / CONFIG).is_file() or checkpoints.list_checkpoints(folder):
        return
    if (folder / INDEX).is_file():
        raise ConfigError(
            f"{folder} is a prepared set and not a run folder; train on it with trmt train --data {folder}"
        )
    if bundles.is_bundle(folder):
        raise ConfigError(
            f"{folder} is a bundle and not a run folder; start a new run from its weights with trmt train "
            f"--init-from {folder}"
        )
    if (folder / NEW).is_file():
        return
    ours = {LOG, LOCK, ORIGIN, ROLLBACKS, "tokenizer", "data"}  # the last two as in trmt new
    names = sorted(each.name for each in folder.iterdir() if each.name[0] != ".")
    if foreign := next((name for name in names if name not in ours), None):
        raise ConfigError(
            f"{folder} holds {foreign}, which is not of a run; name a folder of its own for the run, and "
            "what to train on with --data"
        )


def check_same_run(folder: Path, recipe: Recipe, origin: Origin) -> None:
    """Refuse to resume a run with data, initial weights or settings that would make it another run."""
    check_run_folder(folder)
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
    before = _recipe_so_far(folder)
    if (before.architecture, before.objective) == (recipe.architecture, recipe.objective):
        # Older versions wrote no defaults. `resolved_recipe` has checked that both classes may be loaded.
        before, recipe = (with_defaults(each, trust_code=True) for each in (before, recipe))
    changed = differences(before, recipe)
    for key, (old, new) in changed.items():
        if key not in MAY_CHANGE:
            raise ConfigError(
                f"{folder} was started with {key} = {shown(old)} and cannot go on with {shown(new)}; "
                f"set it back{_where_set(folder, key, new)}, or name another run folder"
            )
    for key, (old, new) in changed.items():
        console.say(f"{key}: {shown(old)} -> {shown(new)}")
    if {"training.steps", "training.epochs"} & changed.keys() and recipe.optim.schedule in SCHEDULES_WITH_END:
        console.warn(
            f'optim.schedule = "{recipe.optim.schedule}" depends on the last step, which has changed: the '
            "learning rate of the steps so far was another than in a run with this last step"
        )


def _recipe_so_far(folder: Path) -> Recipe:
    """The recipe of the run up to its newest checkpoint, whatever was done to its config.toml since."""
    values = checkpoints.newest_values(folder)
    if values is None:  # there is a checkpoint, but none to resume from, of which restoring tells
        return read_recipe(folder / CONFIG)
    return recipe_from(values.get("recipe"), where=str(folder))


def _where_set(folder: Path, key: str, value: object) -> str:
    """Where a value is set, if that is in the config.toml of the run."""
    try:
        edited = flat(to_tree(read_recipe(folder / CONFIG))).get(key) == value
    except ConfigError:
        return ""
    return f" in {folder / CONFIG}" if edited else ""
