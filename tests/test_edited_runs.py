"""What resuming reads is what the run wrote: an edited or altered file is refused, by the name of the key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import toy
from tests.contracts.test_training import final
from tests.toy import options
from trmt.bundles import checkpoints
from trmt.bundles.checkpoints import DamagedState
from trmt.config import to_toml
from trmt.errors import BundleError, ConfigError
from trmt.training.planning import TrainOptions, read_origin
from trmt.training.recipe import flat
from trmt.training.run import train
from trmt.trees import parse_toml


@pytest.fixture(scope="module")
def started(toy_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("started")
    train(options(folder / "run", toy_set, toy.recipe(folder)))
    return folder / "run"


@pytest.fixture
def run(started: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(started, tmp_path / "run"))


def edit_config(run: Path, key: str, value: object) -> None:
    tree = parse_toml((run / "config.toml").read_text("utf-8"))
    table, _, leaf = key.rpartition(".")
    (tree.setdefault(table, {}) if table else tree)[leaf] = value
    (run / "config.toml").write_text(to_toml(tree), encoding="utf-8")


EDITS = [
    ("training.seed", 2),
    ("optim.lr", 0.0031),
    ("optim.beta2", 0.97),
    ("optim.weight_decay", 0.5),
    ("batches.accumulate", 3),
    ("network.d_model", 32),
    ("network.encoder_layers", 2),
    ("architecture", "ssru"),
]


@pytest.mark.parametrize(("key", "value"), EDITS)
def test_an_edited_setting_is_refused_by_name(run: Path, key: str, value: object) -> None:
    edit_config(run, key, value)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=rf"was started with {key} = .* set it back in .*config\.toml"):
        train(TrainOptions(run=run))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_setting_that_may_change_is_taken_and_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(run, "training.steps", 7)
    train(TrainOptions(run=run))
    assert "training.steps: 6 -> 7" in capsys.readouterr().err
    assert checkpoints.list_checkpoints(run)[-1].step == 7


def test_a_checkpoint_has_the_whole_recipe(run: Path) -> None:
    values = checkpoints.newest_values(run)
    assert values is not None
    written = flat(parse_toml((run / "config.toml").read_text("utf-8")))
    assert flat(values["recipe"]) == written


@pytest.mark.parametrize("number", ["step", "epoch", "epoch_step"])
def test_an_altered_position_is_noticed(
    toy_set: Path, run: Path, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = final(run, 6)
    path = run / "step-00000006/training/state.json"
    state = json.loads(path.read_bytes())
    state["progress"][number] += 1
    path.write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(DamagedState, match=r"state\.json is not as it was written: its checksum differs"):
        checkpoints.list_checkpoints(run)[-1].load_state()
    train(TrainOptions(run=run))
    assert "training resumes from" in capsys.readouterr().err
    assert final(run, 6) == whole


@pytest.mark.parametrize("missing", ["checksum", "tensors", "sha256"])
def test_a_state_without_a_checksum_is_damaged(run: Path, missing: str) -> None:
    path = run / "step-00000006/training/state.json"
    state = json.loads(path.read_bytes())
    del state[missing]
    path.write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(DamagedState):
        checkpoints.list_checkpoints(run)[-1].load_values()


def test_an_altered_origin_is_refused(run: Path) -> None:
    path = run / "origin.json"
    path.write_bytes(path.read_bytes().replace(b'"fingerprint": "', b'"fingerprint": "0'))
    with pytest.raises(BundleError, match=r"origin\.json is not as it was written"):
        train(TrainOptions(run=run))


def test_an_origin_of_an_older_version_has_no_checksum(run: Path) -> None:
    found = read_origin(run)
    tree = json.loads((run / "origin.json").read_bytes())
    del tree["checksum"]
    (run / "origin.json").write_text(json.dumps(tree), encoding="utf-8")
    assert read_origin(run) == found


@pytest.mark.parametrize(
    "content", [b"3", b"[1]", b'{"halvings": 9999}', b'{"halvings": 1, "checksum": "0"}']
)
def test_altered_halvings_are_refused(run: Path, content: bytes) -> None:
    (run / "halvings.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"halvings\.json.*; remove it"):
        train(TrainOptions(run=run, settings=["training.steps=7"]))
