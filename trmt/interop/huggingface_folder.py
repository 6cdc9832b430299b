"""Reads the files of a Hugging Face folder: JSON, and weights in any of their formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trmt.bundles import bundles, checkpoints
from trmt.errors import BundleError

Json = dict[str, Any]
SHARDS, WEIGHTS, PICKLED = "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"


def refuse_bundle(folder: Path) -> None:
    """Raise an error for a model of trmt, which needs no import."""
    if bundles.is_bundle(folder) or checkpoints.list_checkpoints(folder):
        raise BundleError(f"{folder} is a model of trmt already, which needs no import; use it as it is")


def read_json(path: Path, *, model: str) -> Json:
    """The object in a JSON file of such a folder; `model` names what the folder should contain."""
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(
            f"cannot read {path}: {error.strerror}; name a Hugging Face folder with a {model} model"
        ) from error
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON; copy the model again") from error
    if not isinstance(tree, dict):
        raise BundleError(f"{path} does not hold a JSON object; copy the model again")
    return tree


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder by name; pickled files cannot run code."""
    try:
        if (folder / SHARDS).is_file():
            files = sorted(set(json.loads((folder / SHARDS).read_bytes())["weight_map"].values()))
            return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
        if (folder / WEIGHTS).is_file():
            return load_file(folder / WEIGHTS)
        loaded: dict[str, Tensor] = torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BundleError(f"there are no weights in {folder}; it needs {WEIGHTS} or {PICKLED}") from error
    except Exception as error:  # torch.load fails in as many ways as a file can be damaged
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BundleError(f"cannot read the weights in {folder}: {reason}; copy the model again") from error
    return loaded
