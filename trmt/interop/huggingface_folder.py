"""Reads the files of a Hugging Face folder: JSON, and weights in any of their formats.

Such folders come from anywhere. No file outside the folder is read, no code is run, and nothing is allocated
that is larger than the files themselves.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trmt.bundles import bundles, checkpoints
from trmt.errors import BundleError, first_line
from trmt.trees import TreeError, read_json, shown

Json = dict[str, Any]
SHARDS, WEIGHTS, PICKLED = "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"
MAX_FILES = 10_000  # of weights


def refuse_bundle(folder: Path) -> None:
    """Raise an error for a model of trmt, which needs no import."""
    if not folder.exists():  # a folder to import has no name in models/
        folder = checkpoints.find_folder(folder)
    if bundles.is_bundle(folder) or checkpoints.list_checkpoints(folder):
        raise BundleError(f"{folder} is a model of trmt already, which needs no import; use it as it is")


def read_object(path: Path, *, model: str) -> Json:
    """The object in a JSON file of such a folder; `model` names what the folder should contain."""
    try:
        tree = read_json(path)
    except OSError as error:
        raise BundleError(
            f"cannot read {path}: {error.strerror}; name a Hugging Face folder with a {model} model"
        ) from error
    except TreeError as error:
        raise BundleError(f"{path} {error}; copy the model again") from error
    if not isinstance(tree, dict):
        raise BundleError(f"{path} does not hold a JSON object; copy the model again")
    return tree


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by name; pickled files cannot run code."""
    try:
        if (folder / SHARDS).is_file():
            names = _shard_names(folder / SHARDS)
            return {name: tensor for file in names for name, tensor in load_file(folder / file).items()}
        if (folder / WEIGHTS).is_file():
            return load_file(folder / WEIGHTS)
        return _read_pickled(folder / PICKLED)
    except FileNotFoundError as error:
        raise BundleError(f"there are no weights in {folder}; it needs {WEIGHTS} or {PICKLED}") from error
    except BundleError:
        raise
    except Exception as error:  # torch.load fails in as many ways as a file can be damaged
        raise BundleError(
            f"cannot read the weights in {folder}: {first_line(error)}; copy the model again"
        ) from error


def _shard_names(path: Path) -> list[str]:
    """The files that an index names."""
    files = read_object(path, model="sharded").get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise BundleError(f"{path} has no map from weights to files; copy the model again")
    names = sorted(set(files.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BundleError(
                f"{path} names {shown(name)}, which is no file of weights in its folder; copy the model again"
            )
    if len(names) > MAX_FILES:
        raise BundleError(f"{path} names more than {MAX_FILES:,} files, which is the limit")
    return names


def _read_pickled(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    if zipfile.is_zipfile(path):  # older versions of PyTorch wrote no archives
        with zipfile.ZipFile(path) as archive:
            declared = sum(entry.file_size for entry in archive.infolist())
        if declared > size:
            raise BundleError(
                f"{path} would expand to {declared:,} bytes, but its own size of {size:,} is the limit, "
                "because PyTorch does not compress weights; copy the model again"
            )
    loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise BundleError(f"{path} does not hold tensors by name; copy the model again")
    for name, tensor in loaded.items():
        if tensor.numel() * tensor.element_size() > size:  # a view that repeats what is stored
            raise BundleError(
                f"{path} has {shown(str(name))} of shape {list(tensor.shape)}, but the size of the file is "
                "the limit; copy the model again"
            )
    return {str(name): tensor for name, tensor in loaded.items()}
