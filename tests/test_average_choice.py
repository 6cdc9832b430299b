"""Which checkpoints `trmt average` takes: the average is never worse on the dev set than the best one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import toy
from tests.edited import edit
from tests.toy import options
from trmt import averaging
from trmt.averaging import AverageOptions, average, neighbours
from trmt.bundles import bundles, checkpoints
from trmt.bundles.checkpoints import Checkpoint, find_bundle, list_checkpoints, ranked
from trmt.errors import BundleError, ConfigError, DataError
from trmt.sets.documents import DocumentOptions, prepare_documents
from trmt.sets.preparing import PrepareOptions, prepare
from trmt.sets.shards import PreparedSet
from trmt.storage.files import checksum
from trmt.training.models import default_model
from trmt.training.planning import TrainOptions
from trmt.training.run import train
from trmt.training.run_validator import RunValidator
from trmt.validating import validate

STEPS = range(101, 109)
NOISE = 0.2  # so much that an average of some is better whatever the network has learned


@pytest.fixture(scope="module")
def base(toy_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    changes = {
        "training": {"steps": STEPS[0] - 1, "log_every": 50},
        "optim": {"lr": 0.01},
        "validation": {"every": STEPS[0] - 1, "metric": "chrf", "sentences": 30},
        "network": {"dropout": 0.0},
    }
    return train(options(folder / "models/run", toy_set, toy.recipe(folder, changes)), validate)


def scattered(base: Path, run: Path, toy_set: Path, metric: str) -> Path:
    """A run whose checkpoints lie around a good one, as those of a high learning rate do."""
    run.mkdir(parents=True)
    for name in (checkpoints.CONFIG, "origin.json", "data.json", "log.jsonl"):
        shutil.copy(base / name, run / name)
    config = (run / checkpoints.CONFIG).read_text()
    if metric == "loss":
        config = config.replace("sentences = 30", "sentences = 0").replace('"chrf"', '"loss"')
    (run / checkpoints.CONFIG).write_text(config)
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"event": "end", "step": STEPS[-1], "time": 1000.0, "seconds": 9.0}) + "\n")
    validator = RunValidator(run, PreparedSet.open(toy_set), validate)
    for step in STEPS:
        folder = run / f"step-{step:08d}"
        shutil.copytree(base / f"step-{STEPS[0] - 1:08d}", folder)
        change_weights(folder, lambda tensor: tensor + NOISE * torch.randn_like(tensor), seed=step)
        weights = bundles.read_weights(folder, bundles.read_manifest(folder))
        bundles.rewrite_manifest(folder, scores=validator.validate(weights, where=str(folder)))
    return run


def change_weights(folder: Path, change: Callable[[torch.Tensor], torch.Tensor], *, seed: int) -> None:
    path = folder / bundles.WEIGHTS
    torch.manual_seed(seed)
    save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)
    weights = {"bytes": path.stat().st_size, "sha256": checksum(path)}
    bundles.rewrite_manifest(folder, weights=weights)


def spoil(folder: Path, *, seed: int = 1) -> None:
    """Replace the weights of a checkpoint by noise, as training that diverged would; its scores stay."""
    change_weights(folder, lambda tensor: 3 * torch.randn_like(tensor), seed=seed)


@pytest.fixture(scope="module", params=["loss", "chrf"])
def trained(
    request: pytest.FixtureRequest, base: Path, toy_set: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return scattered(base, tmp_path_factory.mktemp("scattered") / "run", toy_set, request.param)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "models/run")


@pytest.fixture(scope="module")
def loss_run(base: Path, toy_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scattered(base, tmp_path_factory.mktemp("scattered") / "run", toy_set, "loss")


@pytest.fixture
def quick(loss_run: Path, tmp_path: Path) -> Path:
    """A run that is validated by loss alone, which takes milliseconds."""
    return shutil.copytree(loss_run, tmp_path / "models/run")


def score(run: Path, toy_set: Path, folder: Path) -> bundles.DevScore:
    """The score of a bundle, found anew."""
    validator = RunValidator(run, PreparedSet.open(toy_set), validate)
    weights = bundles.read_weights(folder, bundles.read_manifest(folder))
    found = bundles.first_score(validator.validate(weights, where=str(folder)))
    assert found
    return found


def best_of(run: Path) -> Path:
    return ranked(list_checkpoints(run))[0].folder


def averaged(bundle: Path) -> list[str]:
    names: list[str] = bundles.read_manifest(bundle).training["averaged"]
    return names


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_a_checkpoint_gets_the_score_that_training_gave_it(base: Path, toy_set: Path) -> None:
    [checkpoint] = list_checkpoints(base)
    validator = RunValidator(base, PreparedSet.open(toy_set), validate)
    weights = bundles.read_weights(checkpoint.folder, checkpoint.manifest)
    assert validator.validate(weights, where="there") == checkpoint.manifest.scores
    assert checkpoint.manifest.scores[0]["value"] > 10, "a model that has learned something"


def test_an_average_is_better_on_the_dev_set_than_every_checkpoint_and_both_scores_are_kept(
    run: Path, toy_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = average(AverageOptions(paths=(run,)))
    manifest, best = bundles.read_manifest(out), best_of(run)
    assert len(averaged(out)) > 1 and averaged(out)[0] == best.name
    found = score(run, toy_set, out)
    assert manifest.score() == found
    assert all(bundles.is_worse(each.score(), found) for each in list_checkpoints(run))
    assert manifest.average and manifest.average.best == best.name
    assert bundles.first_score(manifest.average.best_scores) == Checkpoint(best, 0).score()
    assert find_bundle(run) == out
    text = said(capsys)
    assert f"{found.value:.5g}" in text and f"best single checkpoint ({best.name})" in text
    assert "8 validations in" in text


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_a_bad_checkpoint_is_left_out_whatever_its_recorded_score(quick: Path, rank: int) -> None:
    bad = ranked(list_checkpoints(quick))[rank].folder
    spoil(bad)
    out = average(AverageOptions(paths=(quick,)))
    assert bad.name not in averaged(out) and len(averaged(out)) > 1


def test_where_all_others_are_bad_the_best_checkpoint_itself_is_written(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best, *others = ranked(list_checkpoints(run))
    for seed, checkpoint in enumerate(others):
        spoil(checkpoint.folder, seed=seed)
    out = average(AverageOptions(paths=(run,)))
    assert averaged(out) == [best.folder.name]
    written, before = load_file(out / bundles.WEIGHTS), load_file(best.folder / bundles.WEIGHTS)
    assert all(torch.equal(written[name], before[name]) for name in before)
    assert bundles.read_manifest(out).score() == best.score()
    assert f"the best checkpoint alone, {best.folder.name}: no average is better" in said(capsys)
    assert find_bundle(run) == out


def test_no_more_than_ten_averages_are_validated(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(109, 115):
        shutil.copytree(quick / "step-00000108", quick / f"step-{number:08d}")
    calls = []
    real = RunValidator.validate

    def counted(self: RunValidator, *arguments: Any, **named: Any) -> Any:
        calls.append(named)
        return real(self, *arguments, **named)

    monkeypatch.setattr(RunValidator, "validate", counted)
    average(AverageOptions(paths=(quick,)))
    assert len(calls) == averaging.MAX_CANDIDATES == 10


@pytest.mark.parametrize("how", ["last", "best", "named"])
def test_an_average_that_was_asked_for_is_made_and_when_worse_warned_of_and_not_the_default(
    run: Path, how: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRMT_MODEL", raising=False)
    best, bad, *_ = ranked(list_checkpoints(run))
    spoil(bad.folder)
    if how == "named":
        given = AverageOptions(paths=(best.folder, bad.folder), out=run / "average")
    else:
        given = AverageOptions(paths=(run,), **{how: 8 if how == "last" else 2})  # type: ignore[arg-type]
    out = average(given)
    manifest = bundles.read_manifest(out)
    assert bad.folder.name in averaged(out) and manifest.worse_than_best()
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert f"{out} is worse on the dev set than the best checkpoint" in warning
    assert find_bundle(run) == best.folder
    assert default_model(run.parent)[0] == best.folder
    assert find_bundle(out) == out, "named, it is what it is"
    good = average(AverageOptions(paths=(run,)))
    assert find_bundle(run) == good


def test_a_worse_average_outside_of_its_run_is_not_the_default_either(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRMT_MODEL", raising=False)
    best, bad, *_ = ranked(list_checkpoints(quick))
    spoil(bad.folder)
    out = average(AverageOptions(paths=(best.folder, bad.folder), out=quick.parent / "mean"))
    assert bundles.read_manifest(out).created > 0
    assert default_model(quick.parent)[0] == best.folder


def test_an_average_that_helps_is_not_warned_of(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = average(AverageOptions(paths=(quick,), best=2))
    assert "warning" not in (text := said(capsys)) and "best single checkpoint" in text
    assert find_bundle(quick) == out


def test_a_newer_checkpoint_that_is_better_replaces_an_average(
    quick: Path, toy_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = average(AverageOptions(paths=(quick,)))
    newer = shutil.copytree(quick / "step-00000108", quick / "step-00000109")
    assert find_bundle(quick) == out and "is older than" in said(capsys)
    bundles.rewrite_manifest(newer, scores=({"metric": "loss", "value": 0.1, "signature": "s"},))
    assert find_bundle(quick) == newer and "run trmt average" in said(capsys)


# Without a dev set


def test_neighbours_are_the_checkpoints_of_the_last_fifth(tmp_path: Path) -> None:
    def steps(*given: int) -> list[int]:
        return [each.step for each in neighbours([Checkpoint(tmp_path, step) for step in given])]

    assert steps(10, 20, 30, 79, 80, 90, 100) == [100, 90, 80]
    assert steps(1000, 2000) == [2000]
    assert steps(*range(81, 101)) == [100, 99, 98, 97, 96]


def test_without_a_dev_set_only_neighbours_of_the_last_checkpoint_are_averaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = toy.make_set(tmp_path / "toy", dev=False)
    changes = {"training": {"steps": 10, "save_every": 1, "keep_last": 10}}
    run = train(options(tmp_path / "run", data, toy.recipe(tmp_path, changes)))
    capsys.readouterr()
    out = average(AverageOptions(paths=(run,)))
    assert averaged(out) == ["step-00000010", "step-00000009", "step-00000008"]
    text = said(capsys)
    assert "3 of 10" in text and "earlier ones may be worse" in text
    assert bundles.read_manifest(out).scores == () and find_bundle(run) == out


def test_where_the_prepared_set_has_gone_the_best_checkpoint_is_written_and_data_is_the_way_out(
    quick: Path, toy_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = quick / "origin.json"
    edit(origin, data=str(tmp_path / "gone"))
    out = average(AverageOptions(paths=(quick,)))
    assert averaged(out) == [best_of(quick).name]
    text = said(capsys)
    assert text.count("warning: ") == 1 and str(tmp_path / "gone") in text and "--data" in text
    assert bundles.read_manifest(out).score() == Checkpoint(best_of(quick), 0).score()
    assert find_bundle(quick) == out and not said(capsys)
    moved = shutil.copytree(toy_set, tmp_path / "moved")
    average(AverageOptions(paths=(quick,), data=moved))
    assert len(averaged(out)) > 1
    average(AverageOptions(paths=(quick,), last=2))
    assert "it was not scored: the dev set of" in said(capsys)


def test_a_relative_prepared_set_is_found_from_another_folder(
    quick: Path, toy_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(toy_set, tmp_path / "data/set")
    origin = quick / "origin.json"
    edit(origin, data="data/set")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(averaged(average(AverageOptions(paths=(quick,))))) > 1


@pytest.mark.parametrize("change", ["dev set", "byte", "tokenizer"])
def test_another_dev_set_is_refused(quick: Path, toy_set: Path, tmp_path: Path, change: str) -> None:
    data = tmp_path / "other"
    if change == "byte":
        shutil.copytree(toy_set, data)
        text = data / "dev.target.txt"
        content = text.read_bytes()
        text.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    elif change == "dev set":
        pairs, dev = (toy.write_tsv(tmp_path / f"{seed}.tsv", toy.pairs(20, seed=seed)) for seed in (98, 99))
        prepare(PrepareOptions(train=(pairs,), dev=dev, out=data, tokenizer=toy_set / "tokenizer", workers=1))
    else:
        shutil.copytree(toy_set, data)
        for checkpoint in list_checkpoints(quick):
            bundles.rewrite_manifest(checkpoint.folder, tokenizer="another")
    with pytest.raises(DataError, match=r"has changed since|has another tokenizer"):
        average(AverageOptions(paths=(quick,), data=data))
    assert not (quick / "average").exists()


# Other runs


def test_a_run_of_code_outside_trmt_needs_to_be_trusted(quick: Path) -> None:
    config = quick / checkpoints.CONFIG
    config.write_text(
        config.read_text().replace('architecture = "transformer"', 'architecture = "os:system"')
    )
    with pytest.raises(ConfigError, match="--trust-code"):
        average(AverageOptions(paths=(quick,)))


def test_a_run_that_was_sharded_on_a_gpu_is_averaged_on_a_cpu(quick: Path) -> None:
    config = quick / checkpoints.CONFIG
    text = config.read_text()
    for before, now in (
        ('device = "cpu"', 'device = "cuda:3"'),
        ("shard = false", "shard = true"),
        ('precision = "auto"', 'precision = "fp16"'),
        ("ema = 0.0", "ema = 0.9"),
    ):
        assert before in text
        text = text.replace(before, now)
    config.write_text(text)
    expected = averaged(average(AverageOptions(paths=(quick,), device="cpu")))
    assert len(expected) > 1


def test_a_checkpoint_without_its_run_is_averaged_without_scores(
    quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (107, 108):
        shutil.copytree(quick / f"step-{number:08d}", tmp_path / f"copied/step-{number:08d}")
    paths = tuple(sorted((tmp_path / "copied").iterdir()))
    average(AverageOptions(paths=paths, out=tmp_path / "out"))
    assert "it was not scored: these are not checkpoints of one run" in said(capsys)


def test_a_pretraining_run_is_averaged_by_its_loss(tmp_path: Path, toy_set: Path) -> None:
    pytest.importorskip("trmt.lab")
    documents = toy.write_documents(tmp_path / "train.txt", count=40, seed=1)
    dev = toy.write_documents(tmp_path / "dev.txt", count=10, seed=2)
    data = tmp_path / "documents"
    prepare_documents(DocumentOptions(train=(documents,), dev=dev, out=data, tokenizer=toy_set / "tokenizer"))
    settings = [
        *("training.steps=6", "training.device=cpu", "validation.every=1", "training.keep_best=6"),
        *("network.d_model=16", "network.heads=2", "network.feed_forward=32", "network.encoder_layers=1"),
        *("batches.tokens=300", "optim.lr=0.01", "optim.warmup=1"),
    ]
    run = train(
        TrainOptions(run=tmp_path / "run", data=data, recipe="bert-tiny", settings=settings, pretrain=True)
    )
    out = average(AverageOptions(paths=(run,)))
    found = bundles.read_manifest(out).score()
    assert found and found.metric == "loss" and len(averaged(out)) >= 1
    assert not any(bundles.is_worse(found, each.score()) for each in list_checkpoints(run))


def test_a_better_average_is_not_replaced(quick: Path, tmp_path: Path) -> None:
    out = average(AverageOptions(paths=(quick,)))
    first = list_checkpoints(quick)[0].folder
    weights = checksum(out / bundles.WEIGHTS)
    shutil.copytree(quick, tmp_path / "early")
    for each in list_checkpoints(tmp_path / "early")[1:]:
        shutil.rmtree(each.folder)
    with pytest.raises(BundleError, match=r"is better on the dev set, .*; write this one elsewhere"):
        average(AverageOptions(paths=(tmp_path / "early",), last=1))
    assert checksum(tmp_path / "early/average" / bundles.WEIGHTS) == weights
    elsewhere = tmp_path / "elsewhere"
    average(AverageOptions(paths=(tmp_path / "early",), last=1, out=elsewhere))
    assert averaged(elsewhere) == [first.name]
