"""A prepared set that has changed since the run was started is refused, and the changes are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import toy
from tests.toy import options
from trmt.bundles import checkpoints
from trmt.errors import DataError
from trmt.sets.record import RECORD
from trmt.storage.files import checksum
from trmt.training.run import train

SHARD = "train-00000.source.ids"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / "index.json").read_bytes())
    change(index)
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def change_a_file(folder: Path) -> None:
    flip(folder / SHARD)


def change_the_index(folder: Path) -> None:
    rewrite(folder, lambda index: index["files"][SHARD].update(sha256="0" * 64))


def change_both(folder: Path) -> None:
    flip(folder / SHARD)
    rewrite(folder, lambda index: index["files"][SHARD].update(sha256=checksum(folder / SHARD)))


def truncate_a_file(folder: Path) -> None:
    path = folder / SHARD
    path.write_bytes(path.read_bytes()[:-2])


def remove_a_file(folder: Path) -> None:
    (folder / SHARD).unlink()


def change_a_weight(folder: Path) -> None:
    rewrite(folder, lambda index: index["corpora"][0].update(weight=0.25))


CHANGES = [
    (change_a_file, rf"{SHARD} was altered or damaged: it is not what index\.json says"),
    (change_the_index, rf"is not the data that .* was trained on: .*{SHARD} differs; prepare it as before"),
    (change_both, rf"is not the data that .* was trained on: .*{SHARD} differs; prepare it as before"),
    (truncate_a_file, rf"{SHARD} has .* bytes, not"),
    (remove_a_file, rf"{SHARD} is missing"),
    (change_a_weight, r"was trained on: .*index\.json differs in 'corpora'; prepare it as before"),
]


@pytest.fixture(scope="module")
def started(toy_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a prepared set, a recipe, and a run of a few steps."""
    folder = tmp_path_factory.mktemp("started")
    data = Path(shutil.copytree(toy_set, folder / "data"))
    train(options(folder / "run", data, toy.recipe(folder), "training.steps=3"))
    return folder


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_changed_data_is_refused_by_name(
    started: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(started, tmp_path, dirs_exist_ok=True)
    run, data = tmp_path / "run", tmp_path / "data"
    change(data)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(DataError, match=message):
        train(options(run, data, str(tmp_path / "transformer.toml")))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_several_changed_files_are_counted(started: Path, tmp_path: Path) -> None:
    shutil.copytree(started, tmp_path, dirs_exist_ok=True)
    for _ in range(2):
        rewrite(
            tmp_path / "data", lambda index: [entry.update(sha256="0") for entry in index["files"].values()]
        )
    with pytest.raises(DataError, match=r"and \d+ other files differ"):
        train(options(tmp_path / "run", tmp_path / "data", str(tmp_path / "transformer.toml")))


def test_a_copy_of_the_data_is_not_refused(started: Path, tmp_path: Path) -> None:
    shutil.copytree(started, tmp_path, dirs_exist_ok=True)
    train(options(tmp_path / "run", tmp_path / "data", str(tmp_path / "transformer.toml")))
    assert checkpoints.list_checkpoints(tmp_path / "run")[-1].step == 6


def test_without_a_record_changed_data_is_refused_without_names(started: Path, tmp_path: Path) -> None:
    shutil.copytree(started, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run" / RECORD).unlink()
    change_both(tmp_path / "data")
    with pytest.raises(DataError, match=r"was trained on; prepare it as before"):
        train(options(tmp_path / "run", tmp_path / "data", str(tmp_path / "transformer.toml")))


def test_damaged_data_is_refused_before_the_first_step(started: Path, tmp_path: Path) -> None:
    shutil.copytree(started / "data", tmp_path / "data")
    flip(tmp_path / "data/dev-00000.target.ids")
    with pytest.raises(DataError, match=r"dev-00000\.target\.ids was altered"):
        train(options(tmp_path / "new", tmp_path / "data", str(started / "transformer.toml")))
    assert not checkpoints.list_checkpoints(tmp_path / "new")
