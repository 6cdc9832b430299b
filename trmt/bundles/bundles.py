"""Bundles: a folder that holds a trained network and everything needed to translate with it.

    manifest.json         architecture, origin, scores, the checksum of the weights, and one of all this
    weights.safetensors   each tensor once; the manifest lists the names that share one, and whether matrices
                          are int8 with scales (trmt/bundles/quantised.py)
    tokenizer/            text to ids and back

A bundle is data: nothing in it is unpickled, and its manifest may name registered architectures only, so
that a copied model cannot run code. To use a bundle elsewhere, copy its folder.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import trmt
from trmt.bundles import consistency, quantised, upgrade
from trmt.bundles.schema import MAX_LENGTH, GoldenSentence, StoredScore, TrainingFacts, WeightsFile
from trmt.config import Within, build, build_stored, to_tree
from trmt.errors import BundleError, ConfigError, TrmtError, first_line
from trmt.nets.base import Network, Seq2Seq
from trmt.registry import NETWORKS, resolve
from trmt.storage.files import atomic_folder, checksum, write_verified_json
from trmt.text.tokenizer import Tokenizer
from trmt.trees import TreeError, read_json, verified

# By precision, so that a trmt which knows only fp32 refuses int8. Formats 1 and 2 are the same in the words
# of before (trmt/bundles/upgrade.py).
FORMATS = {"fp32": 3, "int8": 4}
MANIFEST, WEIGHTS, TOKENIZER = "manifest.json", "weights.safetensors", "tokenizer"


class DevScore(NamedTuple):
    """A metric of the dev set and its value."""

    metric: str
    value: float

    @property
    def cost(self) -> float:
        """A sort key: the lower, the better."""
        if math.isnan(self.value):  # it would leave the order undefined
            return math.inf
        return self.value if self.metric == "loss" else -self.value


def first_score(scores: Sequence[Mapping[str, Any]]) -> DevScore | None:
    """The first of the scores in a manifest, which is the one that checkpoints are selected by."""
    for each in scores[:1]:
        metric, value = each.get("metric"), each.get("value")
        if isinstance(metric, str) and isinstance(value, int | float):
            return DevScore(metric, float(value))
    return None


def is_worse(score: DevScore | None, other: DevScore | None) -> bool:
    """Whether a score is worse than another; False if they cannot be compared."""
    if not (score and other):
        return False
    if math.isnan(score.value):  # the loss of broken weights, which are not translated with
        return not math.isnan(other.value)
    return score.metric == other.metric and score.cost > other.cost


@dataclass(frozen=True)
class AverageRecord:
    """What the checkpoints of an average were chosen from, and how good the best single one is."""

    newest: str = ""  # name of the newest checkpoint that there was
    best: str = ""  # name of the best single checkpoint; empty if nothing was scored
    best_scores: tuple[
        StoredScore, ...
    ] = ()  # of the best one, on the dev set that the average was scored on


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds."""

    architecture: str  # its name in the registry
    network: dict[str, Any]  # the fields of the architecture's config
    languages: tuple[str, str]  # source and target
    tokenizer: str  # fingerprint of the tokenizer
    longest: dict[
        str, Annotated[int, Within(0, MAX_LENGTH)]
    ]  # length in pieces of the longest source and target in training
    tied: dict[str, str] = field(default_factory=dict)  # name of a tensor -> the name it is stored under
    special: dict[str, Annotated[int, Within(0, MAX_LENGTH)]] = field(
        default_factory=dict
    )  # ids of pad, unk, bos and eos
    normalisation: dict[str, str] = field(default_factory=dict)  # Unicode normalisation of each side
    data: dict[str, Any] = field(default_factory=dict)  # the prepared set it was trained on
    training: TrainingFacts = field(default_factory=TrainingFacts)  # whatever describes the run
    scores: tuple[StoredScore, ...] = ()  # the first is what the run selects checkpoints by
    golden: tuple[GoldenSentence, ...] = ()  # sentences and their translations with these weights
    licences: tuple[str, ...] = ()  # of the training data
    versions: dict[str, str] = field(default_factory=dict)  # of trmt, torch and Python, when it was written
    weights: WeightsFile = field(default_factory=WeightsFile)  # size and checksum of the weights' file
    precision: Literal["fp32", "int8"] = "fp32"  # of the stored matrices
    average: AverageRecord | None = None  # of an average of checkpoints
    created: float = 0.0  # when it was written, in seconds since 1970; 0 for checkpoints, and if unknown
    shipped: bool = False  # whether it comes with trmt

    def score(self) -> DevScore | None:
        """The metric that the run selects checkpoints by, and its value; None without scores."""
        return first_score(self.scores)

    def worse_than_best(self) -> bool:
        """Whether this is an average that is worse on the dev set than the best single checkpoint."""
        return self.average is not None and is_worse(self.score(), first_score(self.average.best_scores))


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle."""

    folder: Path
    manifest: Manifest
    net: Seq2Seq
    tokenizer: Tokenizer


def build_network(architecture: str, options: Mapping[str, Any], *, trust_code: bool = False) -> Network:
    """A network with fresh weights."""
    network: type[Any] = resolve(NETWORKS, architecture, trust_code=trust_code)
    config = build(network.config_class, dict(options), where="network")
    try:
        built: Network = network(config)
        return built
    except (MemoryError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        # For sizes that no machine could hold, torch's messages are many lines long.
        raise ConfigError(
            f"cannot build a network of architecture {architecture!r} with these sizes "
            f"({first_line(error)}); choose smaller ones"
        ) from error


def make_manifest(
    net: Network,
    architecture: str,
    tokenizer: Tokenizer,
    *,
    languages: tuple[str, str] = ("", ""),
    **rest: Any,
) -> Manifest:
    """The manifest of a network and its tokenizer; `rest` are further fields.

    `languages` are those of the data, for a tokenizer without languages.
    """
    return Manifest(
        architecture=architecture,
        network=to_tree(net.config),
        languages=tokenizer.languages if all(tokenizer.languages) else languages,
        tokenizer=tokenizer.fingerprint,
        special={name: getattr(tokenizer.target, name) for name in ("pad", "unk", "bos", "eos")},
        normalisation={
            "source": tokenizer.settings.normalise_source,
            "target": tokenizer.settings.normalise_target,
        },
        tied=_tied(net.state_dict(keep_vars=True)),
        versions={"trmt": trmt.__version__, "torch": torch.__version__, "python": platform.python_version()},
        **rest,
    )


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of shared tensors but the first of each, with that first name."""
    first: dict[int, str] = {}
    return {
        name: first[id(tensor)]
        for name, tensor in state.items()
        if first.setdefault(id(tensor), name) != name
    }


def write_bundle(
    folder: Path, manifest: Manifest, weights: Mapping[str, Tensor], tokenizer: Tokenizer
) -> Manifest:
    """Write a bundle into an existing folder; making it appear atomically is up to the caller."""
    stored = {name: tensor for name, tensor in weights.items() if name not in manifest.tied}
    write_tensors(
        folder / WEIGHTS, quantised.quantise_weights(stored) if manifest.precision == "int8" else stored
    )
    return finish_bundle(folder, manifest, tokenizer)


def finish_bundle(folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> Manifest:
    """Add tokenizer and manifest to a folder that holds the weights."""
    tokenizer.save(folder / TOKENIZER)
    size = (folder / WEIGHTS).stat().st_size
    manifest = replace(manifest, weights={"bytes": size, "sha256": checksum(folder / WEIGHTS)})
    _write_manifest(folder, manifest)
    return manifest


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    write_verified_json(folder / MANIFEST, {"format": FORMATS[manifest.precision], **to_tree(manifest)})


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors; a full disk raises an OSError."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(stored, path, metadata={"format": "pt"})
    except SafetensorError as error:  # raised even where the operating system refused to write
        raise OSError(str(error)) from error


def save_bundle(
    folder: Path, manifest: Manifest, weights: Mapping[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Write a bundle, atomically."""
    with atomic_folder(folder) as partial:
        write_bundle(partial, manifest, weights, tokenizer)


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """Change fields of a bundle's manifest, atomically."""
    manifest = replace(read_manifest(folder), **changes)
    _write_manifest(folder, manifest)


def is_bundle(folder: Path) -> bool:
    """Whether the folder has a manifest."""
    try:
        return (folder / MANIFEST).is_file()
    except OSError:  # the name is too long, or the folder may not be read
        return False


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the bundle in `folder`."""
    path = folder / MANIFEST
    try:
        tree = read_json(path)
        if not isinstance(tree, dict) or not isinstance(tree.get("format"), int):
            raise BundleError(f"{path} is not a trmt manifest; name a folder that trmt train wrote")
        if tree["format"] > max(FORMATS.values()):
            raise BundleError(f"{folder} was written by a newer trmt; upgrade trmt to use it")
        manifest = build_stored(Manifest, tree, where=str(path), advice="copy the bundle again")
        verified(tree)
    except OSError as error:
        raise BundleError(
            f"{folder} is not a bundle: cannot read {path} ({error.strerror}); "
            "name a folder that trmt train or trmt average wrote"
        ) from error
    except TreeError as error:
        raise BundleError(f"{path} {error}; copy the bundle again") from error
    try:
        architecture, network = upgrade.upgrade_network(manifest.architecture, manifest.network)
    except TrmtError as error:
        raise BundleError(f"cannot use {folder}: {error}") from error
    tied = upgrade.upgrade_tied(manifest.tied, architecture, network)
    return replace(manifest, architecture=architecture, network=network, tied=tied)


def read_weights(folder: Path, manifest: Manifest, *, verify: bool = True) -> dict[str, Tensor]:
    """The weights of a bundle by name, in floating point and with tied names; altered ones are an error."""
    path = folder / WEIGHTS
    try:
        if verify and checksum(path) != manifest.weights.get("sha256"):
            raise BundleError(
                f"{path} is not as it was written: its checksum differs; copy it again, or remove {folder}"
            )
        stored = consistency.readable(load_file(path), where=str(path))
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}; copy the bundle again") from error
    except SafetensorError as error:
        raise BundleError(f"{path} is damaged: {error}; copy the bundle again") from error
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        # A header may be right and name types that PyTorch lacks, or put numbers where it cannot read them.
        raise BundleError(
            f"{path} holds what PyTorch cannot read ({first_line(error)}); copy the bundle again"
        ) from error
    if manifest.precision == "int8":
        stored = quantised.dequantise_weights(stored, where=str(path))
    try:
        stored = upgrade.upgrade_weights(stored, manifest.architecture, manifest.network)
    except (RuntimeError, LookupError, TypeError) as error:
        raise BundleError(
            f"{path} has weights of other shapes than those of {manifest.architecture!r}; copy it again"
        ) from error
    for alias, name in manifest.tied.items():
        if name in stored:
            stored[alias] = stored[name]
    return stored


def load_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """The tokenizer of a bundle, which is the one that its manifest describes."""
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    consistency.check_tokenizer(manifest, tokenizer, where=str(folder))
    return tokenizer


def load_bundle(folder: Path, *, device: torch.device | str = "cpu", trust_code: bool = False) -> Bundle:
    """A bundle ready to use: its network in eval mode on `device`."""
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(folder, manifest)
    weights = read_weights(folder, manifest)
    consistency.check_options(manifest, weights, where=str(folder))
    try:
        with consistency.Building(None if ":" in manifest.architecture else weights):
            net = build_network(manifest.architecture, manifest.network, trust_code=trust_code)
    except TrmtError as error:
        raise BundleError(f"cannot build the network of {folder}: {error}") from error
    if not isinstance(net, Seq2Seq):
        raise BundleError(
            f"{folder} holds an encoder only, which cannot translate; train a translator that starts from it "
            f"with trmt train --init-from {folder}:encoder"
        )
    check_weights(net, weights, where=str(folder))
    # Assigned, not copied: the tensors are the memory-mapped file, which processes share.
    net.load_state_dict(consistency.of_type(weights, net), assign=True)
    consistency.check_network(net, tokenizer, where=str(folder))
    return Bundle(folder, manifest, net.to(device).eval(), tokenizer)


def load_weights(net: Network, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Load weights into a network; an error names the first difference in names or shapes."""
    check_weights(net, weights, where=where)
    net.load_state_dict(dict(weights))


def check_weights(net: Network, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Raise an error if weights differ from a network's in names or shapes."""
    expected = net.state_dict()
    for name, tensor in expected.items():
        if name not in weights:
            raise BundleError(f"{where} has no weights {name!r}; it belongs to another architecture")
        if weights[name].is_floating_point() != tensor.is_floating_point():
            raise BundleError(
                f"{where} has {name!r} of type {str(weights[name].dtype).removeprefix('torch.')}, but the "
                f"network needs {str(tensor.dtype).removeprefix('torch.')}; it belongs to another network"
            )
        if weights[name].shape != tensor.shape:
            raise BundleError(
                f"{where} has {name!r} of shape {list(weights[name].shape)}, "
                f"but the network needs {list(tensor.shape)}; it belongs to a network of another size"
            )
    extra = sorted(set(weights) - set(expected))
    if extra:
        raise BundleError(
            f"{where} has weights {extra[0]!r}, which the network does not have; it belongs to another "
            "architecture"
        )
