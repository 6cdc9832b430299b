from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.fakes import small_network
from trmt.averaging import average_bundles
from trmt.bundles import bundles, checkpoints
from trmt.bundles.bundles import AverageRecord, DevScore, is_worse
from trmt.bundles.checkpoints import (
    DamagedState,
    check_format,
    find_bundle,
    list_checkpoints,
    prune,
    ranked,
)
from trmt.errors import BundleError
from trmt.text.tokenizer import Tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "models" / "run"


@pytest.fixture
def tokenizer(toy_set: Path) -> Tokenizer:
    return Tokenizer.load(toy_set / "tokenizer")


def add(
    run: Path, tokenizer: Tokenizer, step: int, value: float | None = None, metric: str = "chrf"
) -> checkpoints.Checkpoint:
    net = small_network("rnn", source_vocabulary=60, target_vocabulary=60)
    scores = () if value is None else ({"metric": metric, "value": value, "signature": "s"},)
    manifest = bundles.make_manifest(net, "rnn", tokenizer, longest={"source": 9, "target": 9}, scores=scores)
    state = ({"step": step}, {"weights:x": torch.full((3,), float(step))})
    return checkpoints.save_checkpoint(run, manifest, net.state_dict(), tokenizer, step=step, state=state)


def steps(found: list[checkpoints.Checkpoint]) -> list[int]:
    return [checkpoint.step for checkpoint in found]


def test_a_checkpoint_is_loaded_as_it_was_saved(run: Path, tokenizer: Tokenizer) -> None:
    checkpoint = add(run, tokenizer, 7, 3.5)
    values, tensors = checkpoint.load_state()
    assert values["step"] == 7
    assert torch.equal(tensors["weights:x"], torch.full((3,), 7.0))
    assert checkpoint.score() == ("chrf", 3.5)
    assert steps(list_checkpoints(run)) == [7]
    assert bundles.load_bundle(checkpoint.folder)


def test_checkpoints_are_listed_in_order_without_incomplete_ones(run: Path, tokenizer: Tokenizer) -> None:
    for step in (10, 2, 100_000_000_000):
        add(run, tokenizer, step)
    (run / "step-00000005").mkdir()
    (run / "step-x").mkdir()
    add(run, tokenizer, 3).folder.replace(run / ".partial-step-00000003")
    assert steps(list_checkpoints(run)) == [2, 10, 100_000_000_000]
    assert list_checkpoints(run / "nowhere") == []


@pytest.mark.parametrize(("metric", "expected"), [("chrf", [2, 4, 1]), ("loss", [1, 2, 4])])
def test_ranking_depends_on_the_metric(
    run: Path, tokenizer: Tokenizer, metric: str, expected: list[int]
) -> None:
    for step, value in ((1, 1.0), (2, 5.0), (3, None), (4, 5.0)):
        add(run, tokenizer, step, value, metric)
    assert steps(ranked(list_checkpoints(run))) == expected


def test_pruning_keeps_the_best_and_the_last_checkpoints(run: Path, tokenizer: Tokenizer) -> None:
    for step, value in ((1, 9.0), (2, 1.0), (3, 8.0), (4, 2.0), (5, None), (6, 3.0)):
        add(run, tokenizer, step, value)
    prune(run, best=2, last=2)
    assert steps(list_checkpoints(run)) == [1, 3, 5, 6]
    assert [checkpoint.resumable() for checkpoint in list_checkpoints(run)] == [False, False, True, True]
    assert not list(run.glob(".partial*"))
    prune(run, best=0, last=0)
    assert steps(list_checkpoints(run)) == [6], "the newest is never removed"


def test_a_killed_pruning_leaves_nothing_that_looks_like_a_checkpoint(
    run: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        add(run, tokenizer, step)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    prune(run, best=0, last=1)
    assert steps(list_checkpoints(run)) == [2]


def test_the_newest_undamaged_state_is_found(
    run: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoints.newest_state(run) is None
    for step in (1, 2, 3):
        add(run, tokenizer, step)
    (run / "step-00000003/training/state.safetensors").write_bytes(b"junk")
    (run / "step-00000002/training/state.json").write_bytes(b"{}")
    with pytest.raises(DamagedState, match="checksum"):
        list_checkpoints(run)[-1].load_state()
    state = checkpoints.newest_state(run)
    assert state is not None
    assert state[0]["step"] == 1
    assert steps(list_checkpoints(run)) == [1]
    said = capsys.readouterr().err
    for step in (2, 3):
        assert f"damaged-step-0000000{step}" in said
        assert (run / f"damaged-step-0000000{step}").is_dir()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (1, "begun by an older version of trmt .* finish it with the version that .* --init-from {run}"),
        (9, "begun by a newer version of trmt; upgrade trmt"),
    ],
)
def test_a_state_of_another_version_is_refused_and_not_taken_for_damaged(
    run: Path, tokenizer: Tokenizer, number: int, message: str
) -> None:
    check_format(run)
    path = add(run, tokenizer, 1).folder / "training/state.json"
    check_format(run)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"format": number}))
    for refused in (checkpoints.newest_state, check_format):
        with pytest.raises(BundleError, match=message.format(run=run)) as caught:
            refused(run)
        assert str(caught.value).startswith(str(run)) and "\n" not in str(caught.value)
    assert steps(list_checkpoints(run)) == [1]
    assert bundles.load_bundle(find_bundle(run))


def test_a_run_folder_stands_for_its_average_else_its_best_else_its_last(
    run: Path, tokenizer: Tokenizer
) -> None:
    with pytest.raises(BundleError, match="there is no model in"):
        find_bundle(run)
    add(run, tokenizer, 1)
    add(run, tokenizer, 2)
    assert find_bundle(run).name == "step-00000002"
    add(run, tokenizer, 3, 5.0)
    add(run, tokenizer, 4, 4.0)
    assert find_bundle(run).name == "step-00000003"
    shutil.copytree(run / "step-00000001", run / "average")
    assert find_bundle(run) == run / "average"
    assert find_bundle(run / "step-00000002") == run / "step-00000002"
    # A process killed between its two renames leaves the old average like this.
    (run / "average").replace(run / ".partial-old-average")
    assert find_bundle(run) == run / "average"


def test_an_average_older_than_its_run_is_warned_of(
    run: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [add(run, tokenizer, step, 1.0) for step in (1, 2)]
    average_bundles([checkpoint.folder for checkpoint in found[::-1]], run / "average")
    assert find_bundle(run) == run / "average"
    assert "was not scored on the dev set" in capsys.readouterr().err
    bundles.rewrite_manifest(run / "average", scores=({"metric": "chrf", "value": 9.0},))
    assert find_bundle(run) == run / "average"
    assert not capsys.readouterr().err
    add(run, tokenizer, 3, 9.0)
    assert find_bundle(run) == run / "average"
    assert "run trmt average" in capsys.readouterr().err


def test_a_run_folder_stands_for_its_best_checkpoint_if_the_average_is_worse(
    run: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    best, _ = (add(run, tokenizer, step, value).folder for step, value in ((1, 5.0), (2, 4.0)))
    average_bundles([best], run / "average")
    for value, expected in ((5.0, run / "average"), (4.9, best), (float("nan"), best)):
        scores = ({"metric": "chrf", "value": value, "signature": "s"},)
        record = AverageRecord(newest="step-00000002", best=best.name, best_scores=best_scores(5.0))
        bundles.rewrite_manifest(run / "average", scores=scores, average=record)
        assert find_bundle(run) == expected
        said = capsys.readouterr().err
        assert ("is worse on the dev set than" in said) == (expected == best) and said.count("\n") <= 1


def best_scores(value: float) -> tuple[dict[str, str | float], ...]:
    return ({"metric": "chrf", "value": value, "signature": "s"},)


def test_scores_found_in_one_session_count_and_not_those_of_training_on_another_device(
    run: Path, tokenizer: Tokenizer
) -> None:
    best = add(run, tokenizer, 1, 5.0).folder
    average_bundles([best], run / "average")
    record = AverageRecord(newest=best.name, best=best.name, best_scores=best_scores(4.98))
    bundles.rewrite_manifest(run / "average", scores=best_scores(4.99), average=record)
    assert find_bundle(run) == run / "average"
    newer = add(run, tokenizer, 2, 5.1).folder
    assert find_bundle(run) == newer


def test_the_loss_of_broken_weights_is_worse_than_any_score() -> None:
    broken, good = DevScore("loss", float("nan")), DevScore("chrf", 1.0)
    assert is_worse(broken, good) and not is_worse(good, broken) and not is_worse(broken, broken)
    assert is_worse(DevScore("loss", 2.0), DevScore("loss", 1.0)) and is_worse(good, DevScore("chrf", 2.0))
    assert not is_worse(good, DevScore("bleu", 2.0)), "other metrics cannot be compared"
