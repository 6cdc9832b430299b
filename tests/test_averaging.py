from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import toy
from tests.toy import options
from trmt.averaging import AverageOptions, average
from trmt.bundles import bundles, checkpoints
from trmt.bundles.bundles import load_bundle
from trmt.errors import BundleError, ConfigError, TrmtError
from trmt.training.run import train


@pytest.fixture(scope="module")
def trained(toy_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    changes = {"training": {"keep_last": 9}, "validation": {"every": 1}, "optim": {"lr": 0.02}}
    return train(options(folder / "run", toy_set, toy.recipe(folder, changes)))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def folders_of(run: Path, *numbers: int) -> tuple[Path, ...]:
    return tuple(run / f"step-{number:08d}" for number in numbers)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def mean(folders: tuple[Path, ...]) -> dict[str, np.ndarray]:
    many = [weights(folder) for folder in folders]
    return {
        name: np.mean([one[name].double().numpy() for one in many], axis=0).astype(np.float32)
        for name in many[0]
    }


def has_weights(folder: Path, expected: dict[str, np.ndarray]) -> bool:
    found = weights(folder)
    return found.keys() == expected.keys() and all(
        np.array_equal(found[name].numpy(), expected[name]) for name in found
    )


def test_the_mean_is_numpys_in_double_precision(run: Path, tmp_path: Path) -> None:
    folders = folders_of(run, 1, 2, 5)
    out = average(AverageOptions(paths=folders, out=tmp_path / "out"))
    assert out == tmp_path / "out"
    assert has_weights(out, mean(folders))
    loaded = load_bundle(out)
    assert loaded.manifest.training["averaged"] == [folder.name for folder in folders]
    assert loaded.manifest.scores != bundles.read_manifest(folders[0]).scores


def test_the_average_of_one_is_that_one(run: Path, tmp_path: Path) -> None:
    (folder,) = folders_of(run, 3)
    out = average(AverageOptions(paths=(folder,), out=tmp_path / "out"))
    assert (out / "weights.safetensors").read_bytes() == (folder / "weights.safetensors").read_bytes()


def test_tied_weights_stay_tied(run: Path) -> None:
    out = average(AverageOptions(paths=(run,)))
    net = load_bundle(out).net
    state = net.state_dict()
    tied = load_bundle(out).manifest.tied
    assert tied
    for alias, name in tied.items():
        assert torch.equal(state[alias], state[name])
        assert alias not in weights(out)


def test_best_and_last_select_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = [checkpoint.folder for checkpoint in checkpoints.ranked(checkpoints.list_checkpoints(run))]
    out = run.parent / "as-told"
    assert has_weights(average(AverageOptions(paths=(run,), best=2)), mean(tuple(best[:2])))
    assert has_weights(average(AverageOptions(paths=(run,), last=2, out=out)), mean(folders_of(run, 6, 5)))
    capsys.readouterr()
    average(AverageOptions(paths=(run,), last=50, out=out))
    assert "has 6 such checkpoints, not 50" in capsys.readouterr().err


def test_of_a_run_without_scores_only_neighbours_of_the_last_checkpoint_are_averaged(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for checkpoint in checkpoints.list_checkpoints(run):
        bundles.rewrite_manifest(checkpoint.folder, scores=())
    assert has_weights(average(AverageOptions(paths=(run,))), mean(folders_of(run, 6, 5)))
    assert "last fifth" in (err := capsys.readouterr().err) and "2 of 6" in err
    with pytest.raises(BundleError, match="use --last"):
        average(AverageOptions(paths=(run,), best=2))


def test_the_newest_run_is_the_default(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    with pytest.raises(BundleError, match="there is no run in"):
        average(AverageOptions())
    (run.parent / "models").mkdir()
    shutil.copytree(run, "models/mine")
    assert average(AverageOptions()) == Path("models/mine/average")


def test_other_architectures_and_tokenizers_are_refused(run: Path, tmp_path: Path, toy_set: Path) -> None:
    other = train(options(tmp_path / "rnn", toy_set, toy.recipe(tmp_path, architecture="rnn")))
    with pytest.raises(BundleError, match="differ in architecture"):
        average(
            AverageOptions(paths=(*folders_of(run, 1), checkpoints.find_bundle(other)), out=tmp_path / "o")
        )
    bundles.rewrite_manifest(folders_of(run, 2)[0], tokenizer="another")
    with pytest.raises(BundleError, match="differ in tokenizer"):
        average(AverageOptions(paths=folders_of(run, 1, 2), out=tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_a_damaged_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    path = folders_of(run, 2)[0] / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"step-00000002.*checksum differs"):
        average(AverageOptions(paths=folders_of(run, 1, 2), out=tmp_path / "o"))


@pytest.mark.parametrize("moment", ["weights", "exchange"])
def test_a_killed_average_leaves_the_old_one(run: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    for checkpoint in checkpoints.list_checkpoints(run):
        bundles.rewrite_manifest(checkpoint.folder, scores=())
    average(AverageOptions(paths=(run,), last=3))
    before = weights(run / "average")

    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    replace, calls = Path.replace, iter(range(100))

    def killed_between(self: Path, target: Path) -> Path:
        # The second of the two renames that replace a folder does not happen.
        if "average" in self.name and target.name == "average" and next(calls) == 0:
            raise Killed
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process removes nothing
        if moment == "weights":
            patch.setattr(bundles, "save_file", killed)
        else:
            patch.setattr(Path, "replace", killed_between)
        with pytest.raises(Killed):
            average(AverageOptions(paths=(run,), last=1))
    found = weights(checkpoints.find_bundle(run))
    assert checkpoints.find_bundle(run) == run / "average"
    assert all(torch.equal(found[name], before[name]) for name in before)
    average(AverageOptions(paths=(run,), last=1))
    assert has_weights(run / "average", mean(folders_of(run, 6)))


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"best": 1, "last": 1}, "exclude each other"),
        ({"best": 0}, "at least 1"),
        ({"last": -2}, "at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(run: Path, wrong: dict[str, int], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        average(AverageOptions(paths=(run,), **wrong))  # type: ignore[arg-type]


def test_several_checkpoints_need_out_and_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--out"):
        average(AverageOptions(paths=folders_of(run, 1, 2)))
    with pytest.raises(ConfigError, match="one run folder"):
        average(AverageOptions(paths=folders_of(run, 1, 2), last=1, out=tmp_path / "o"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("all of it")
    for out in (tmp_path / "mine", run, folders_of(run, 1)[0], folders_of(run, 3)[0]):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(TrmtError, match="choose another folder"):
            average(AverageOptions(paths=folders_of(run, 1, 2), out=out))
        assert sorted(tmp_path.rglob("*")) == before
