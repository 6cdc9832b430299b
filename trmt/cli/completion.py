"""What shells complete: models, runs, recipes, metrics and devices. Nothing here loads torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path

from trmt.storage.files import PARTIAL

MODELS = Path("models")  # as in trmt.bundles.checkpoints, which loads torch


def recipes(incomplete: str) -> list[str]:
    """Recipes by name, and TOML files."""
    known = (Path(each.name) for each in (files("trmt") / "recipes").iterdir())
    names = sorted(each.stem for each in known if each.suffix == ".toml")
    return [*_matching(names, incomplete), *_paths(incomplete, lambda path: path.suffix == ".toml")]


def metrics(incomplete: str) -> list[str]:
    """The metrics of `trmt score`."""
    from trmt.scoring import METRICS

    return _matching(METRICS, incomplete)


def models(incomplete: str) -> list[str]:
    """Runs and bundles in models/ by name, and all folders."""
    found = MODELS.iterdir() if MODELS.is_dir() else ()
    names = sorted(each.name for each in found if each.is_dir() and not each.name.startswith(PARTIAL))
    return [*_matching(names, incomplete), *folders(incomplete)]


def folders(incomplete: str) -> list[str]:
    """Folders by their paths."""
    return _paths(incomplete, lambda path: False)


def recipes_and_runs(incomplete: str) -> list[str]:
    """Recipes, and runs in models/ by path."""
    runs = (str(each.parent) for each in sorted(MODELS.glob("*/config.toml")))
    return list(dict.fromkeys([*recipes(incomplete), *_matching(runs, incomplete)]))


def formats(incomplete: str) -> list[str]:
    """The formats of `trmt export`."""
    from trmt.registry import FORMATS

    return _matching(FORMATS, incomplete)


def among(*names: str) -> Callable[[str], list[str]]:
    """What completes one of these names."""

    def matching(incomplete: str) -> list[str]:
        return _matching(names, incomplete)

    return matching


def devices(incomplete: str) -> list[str]:
    """Names of devices."""
    gpus = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
    names = ["auto", "cpu", "cuda", *(f"cuda:{number}" for number in range(len(gpus)))]
    return _matching([*names, *(["mps"] if sys.platform == "darwin" else [])], incomplete)


def devices_and_all(incomplete: str) -> list[str]:
    """Names of devices, and the word for all GPUs."""
    return [*devices(incomplete), *_matching(["all"], incomplete)]


def _matching(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _paths(incomplete: str, is_wanted: Callable[[Path], bool]) -> list[str]:
    """Folders that begin like what is typed, and the wanted files among them."""
    typed, _, _ = incomplete.rpartition("/")
    folder = Path(f"{typed}/" if incomplete.startswith("/") else typed or ".")
    if not folder.is_dir():
        return []
    head = incomplete[: incomplete.rfind("/") + 1]
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    names = (head + each.name for each in entries if each.is_dir() or is_wanted(each))
    hidden = incomplete.rpartition("/")[2].startswith(".")
    return [name for name in names if name.startswith(incomplete) and (hidden or name[len(head)] != ".")]
