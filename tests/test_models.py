"""The models in models/: which one is the default, how names are found, and `trmt models`."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import toy
from tests.commands import Command
from tests.fakes import small_network
from trmt.bundles import bundles, checkpoints
from trmt.bundles.bundles import AverageRecord
from trmt.cli import common
from trmt.errors import BundleError
from trmt.sets.index import FORMAT
from trmt.text.tokenizer import Tokenizer
from trmt.training.history import LogTimes, read_times
from trmt.training.models import default_model, find_model, list_models, newest_run
from trmt.training.planning import TrainOptions
from trmt.training.run import train

MODELS = Path("models")


@pytest.fixture(scope="module")
def bundle(toy_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = Tokenizer.load(toy_set / "tokenizer")
    net = small_network("rnn", source_vocabulary=60, target_vocabulary=60)
    manifest = bundles.make_manifest(net, "rnn", tokenizer, longest={"source": 9, "target": 9})
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    bundles.save_bundle(folder, manifest, net.state_dict(), tokenizer)
    return folder


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models/ in the working directory; no model comes with trmt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRMT_MODEL", raising=False)
    monkeypatch.setattr(checkpoints, "SHIPPED", (tmp_path / "installation",))
    MODELS.mkdir()
    return MODELS


def add_bundle(bundle: Path, name: str, **manifest: Any) -> Path:
    folder = shutil.copytree(bundle, MODELS / name)
    bundles.rewrite_manifest(folder, **manifest)
    return folder


def add_run(
    bundle: Path, name: str, *steps: int, ended: float | None = None, end_step: int | None = None
) -> Path:
    """A run with checkpoints at these steps, of which each is better than the one before."""
    folder = MODELS / name
    for step in steps:
        copied = shutil.copytree(bundle, folder / f"step-{step:08d}")
        bundles.rewrite_manifest(copied, scores=({"metric": "chrf", "value": float(step), "signature": "s"},))
    (folder / checkpoints.CONFIG).write_text("")
    entries = [{"event": "begin", "step": 0, "time": 1.0}]
    if ended is not None:
        entries += [{"event": "end", "step": end_step or steps[-1], "time": ended}]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def log(folder: Path, **entry: Any) -> None:
    with (folder / "log.jsonl").open("a") as stream:
        stream.write(json.dumps(entry) + "\n")


def states() -> dict[str, str]:
    return {model.name: model.state for model in list_models()}


# The default


def test_the_newest_finished_run_is_the_default_by_its_log_and_never_by_the_time_of_a_file(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [add_run(bundle, name, 5, ended=ended) for name, ended in (("a", 20.0), ("b", 30.0), ("c", 10.0))]
    for order in (runs, runs[::-1]):
        for age, run in enumerate(order):
            for file in [run, *run.rglob("*")]:
                os.utime(file, (10**9 - 1000 * age, 10**9 - 1000 * age))
        assert find_model() == MODELS / "b/step-00000005"
        assert capsys.readouterr().err == (
            "model: models/b/step-00000005 (the newest finished one in models/)\n"
        )
        assert [model.name for model in list_models()] == ["b", "a", "c"]


def test_an_unfinished_run_is_never_the_default(bundle: Path) -> None:
    add_run(bundle, "unfinished", 5)
    with pytest.raises(BundleError, match=r"models/unfinished \(stopped\); name the one to use"):
        default_model()
    finished = add_run(bundle, "finished", 5, ended=10.0)
    assert default_model()[0] == finished / "step-00000005"
    # It goes on training: with a newer checkpoint it is no longer what it was when it ended.
    log(finished, event="resume", step=5, time=11.0)
    assert default_model()[0] == finished / "step-00000005"
    shutil.copytree(finished / "step-00000005", finished / "step-00000006")
    with pytest.raises(BundleError):
        default_model()
    log(finished, event="end", step=6, time=12.0)
    assert default_model()[0] == finished / "step-00000005", "the best checkpoint"


def test_a_finished_run_that_is_started_again_without_new_steps_stays_finished(
    toy_set: Path, tmp_path: Path
) -> None:
    given = toy.options(MODELS / "run", toy_set, toy.recipe(tmp_path))
    run = train(given)
    assert states() == {"run": "finished"}
    train(given)
    assert states() == {"run": "finished"}
    train(toy.options(run, toy_set, given.recipe or "", "training.steps=7"))
    assert states() == {"run": "finished"}
    assert default_model()[1] == "the only finished one in models/"


def test_the_variable_is_before_all_others(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_run(bundle, "finished", 5, ended=10.0)
    run = add_run(bundle, "unfinished", 5)
    for named in (str(run), "unfinished", str(run.resolve())):
        monkeypatch.setenv("TRMT_MODEL", named)
        found, why = default_model()
        assert found.resolve() == (run / "step-00000005").resolve() and why == "$TRMT_MODEL"
    monkeypatch.setenv("TRMT_MODEL", "nowhere")
    with pytest.raises(BundleError, match="nowhere"):
        default_model()


def test_bundles_count_by_the_time_in_their_manifests_and_quantised_ones_last(bundle: Path) -> None:
    add_bundle(bundle, "int8", precision="int8", created=99.0)
    assert default_model()[0] == MODELS / "int8", "there is no other"
    add_bundle(bundle, "old")
    assert default_model()[0] == MODELS / "old"
    add_bundle(bundle, "imported", created=20.0, training={"imported": "opus"})
    assert default_model()[0] == MODELS / "imported"
    run = add_run(bundle, "run", 5, ended=30.0)
    assert default_model()[0] == run / "step-00000005"
    assert states() == {"int8": "int8", "old": "bundle", "imported": "imported", "run": "finished"}


def test_an_average_that_is_worse_than_its_best_checkpoint_is_not_the_default(bundle: Path) -> None:
    add_bundle(bundle, "good", created=1.0)
    record = AverageRecord("step-00000009", "step-00000005", ({"metric": "loss", "value": 2.0},))
    mean = add_bundle(bundle, "mean", created=9.0, average=record, scores=({"metric": "loss", "value": 2.1},))
    assert default_model()[0] == MODELS / "good"
    bundles.rewrite_manifest(mean, scores=({"metric": "loss", "value": 1.9},))
    assert default_model()[0] == mean


def test_what_was_pretrained_or_is_damaged_is_not_the_default(bundle: Path) -> None:
    add_bundle(bundle, "encoder", architecture="masked-encoder-alibi", created=9.0)
    denoising = add_run(bundle, "denoising", 5, ended=9.0)
    index = {"format": FORMAT, "kind": "documents", "languages": ["x", ""]}
    index |= {"corpora": [], "files": {}, "splits": {}}
    (denoising / "data.json").write_text(json.dumps(index))
    damaged = add_bundle(bundle, "damaged", created=9.0)
    (damaged / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="is finished and can translate"):
        default_model()
    translator = add_run(bundle, "translator", 5, ended=1.0)
    assert default_model()[0] == translator / "step-00000005"


def test_a_model_that_comes_with_trmt_is_the_last_resort(bundle: Path) -> None:
    for name, shipped in (("de-en", True), ("en-de", False)):
        folder = shutil.copytree(bundle, Path("installation").absolute() / name)
        bundles.rewrite_manifest(folder, shipped=shipped, created=10.0**12)
    found, why = default_model()
    assert found == Path("installation/de-en").absolute() and why.startswith("comes with trmt")
    assert checkpoints.find_bundle(Path("de-en")) == found
    with pytest.raises(BundleError):
        checkpoints.find_bundle(Path("en-de"))  # a folder of this name alone is not enough
    bundles.rewrite_manifest(Path("installation/en-de"), shipped=True)
    assert default_model()[0] == Path("installation/en-de").absolute()
    # A copy of it in models/ still comes with trmt, and any model of the user is before it.
    add_bundle(bundle, "copy", shipped=True, created=10.0**12)
    add_run(bundle, "own", 5, ended=1.0)
    assert default_model()[0] == MODELS / "own/step-00000005"
    assert states()["copy"] == "comes with trmt"


def test_leftovers_of_killed_processes_are_not_models(bundle: Path) -> None:
    with pytest.raises(BundleError, match="set TRMT_MODEL"):
        default_model()
    shutil.copytree(bundle, MODELS / ".partial-killed")
    (MODELS / "empty").mkdir()
    (MODELS / "README.md").write_text("not a model")
    assert list_models() == []


def test_the_newest_run_is_that_of_the_newest_entry_in_a_log(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_run(bundle, "finished", 5, ended=10.0)
    run = add_run(bundle, "unfinished", 5)
    log(run, event="train", step=5, time=11.0)
    assert newest_run() == run
    assert capsys.readouterr().err == "run: models/unfinished (the newest, not finished)\n"


def test_times_are_read_from_logs_with_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert read_times(path) == LogTimes()
    path.write_bytes(
        b'{"event": "end", "step": 4, "time": 40.0}\n{"event": "resume", "step": 4, "time": 41.0}\n'
        b'["end"]\n{"event": "end", "step": null, "time": 1}\n\xff"end"\n{"event": "train", "st'
    )
    assert read_times(path) == LogTimes(41.0, 40.0, 4)


# Names


def test_a_name_is_a_path_first_and_then_one_in_models(bundle: Path) -> None:
    run = add_run(bundle, "demo", 5, ended=1.0)
    assert checkpoints.find_bundle(Path("demo")) == run / "step-00000005"
    assert checkpoints.find_bundle(Path("demo/step-00000005")) == run / "step-00000005"
    Path("demo").mkdir()  # a folder with something else in it
    Path("demo/text.en").write_text("text")
    assert checkpoints.find_bundle(Path("demo")) == run / "step-00000005"
    shutil.rmtree("demo")
    shutil.copytree(bundle, "demo")
    assert checkpoints.find_bundle(Path("demo")) == Path("demo")
    for wrong in ("nothing", "../models/nothing", "models/nothing"):
        with pytest.raises(BundleError, match=f"there is no model in {wrong}; .*trmt models"):
            checkpoints.find_bundle(Path(wrong))


def test_a_new_name_is_one_in_models_and_what_is_there_keeps_its_path(bundle: Path) -> None:
    run = add_run(bundle, "old", 5)
    for typed, meant in (
        ("new", MODELS / "new"),
        ("old", run),
        ("models/new", Path("models/new")),
        ("./new", Path("new")),
        ("./old", Path("old").absolute()),  # a relative path would be found in models/
        ("/somewhere/new", Path("/somewhere/new")),
        ("..", Path("..")),
        ("a.en,a.de", Path("a.en,a.de")),
    ):
        assert checkpoints.named_folder(typed) == meant
        assert checkpoints.find_folder(checkpoints.named_folder(typed)) == checkpoints.named_folder(typed)
    shutil.copytree(bundle, "here")
    Path("text").mkdir()
    assert checkpoints.named_folder("here") == Path("here")
    assert checkpoints.named_folder("text") == Path("text")
    shutil.copytree(bundle, "old")
    assert checkpoints.named_folder("old") == checkpoints.named_folder("./old") == Path("old")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1}', '{"format": 2, "golden": 5}'])
def test_a_damaged_average_leaves_the_best_checkpoint(
    bundle: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = add_run(bundle, "run", 3, 5, ended=1.0)
    shutil.copytree(bundle, run / "average")
    (run / "average/manifest.json").write_text(damage)
    assert find_model("run") == run / "step-00000005"
    (warning,) = capsys.readouterr().err.splitlines()
    assert "models/run/average/manifest.json" in warning and "copy" not in warning
    assert "models/run/step-00000005 is used instead" in warning
    assert warning.endswith("make the average again with trmt average models/run")
    assert default_model()[0] == run / "step-00000005"


def test_a_damaged_checkpoint_leaves_the_others(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = add_run(bundle, "run", 3, 5, ended=1.0)
    (run / "step-00000005/manifest.json").write_text("{")
    assert find_model("run") == run / "step-00000003"
    (warning,) = capsys.readouterr().err.splitlines()
    assert "step-00000005/manifest.json" in warning and "step-00000003 is used" in warning
    (run / "step-00000003/manifest.json").write_text("{")
    with pytest.raises(BundleError, match=r"step-00000003/manifest\.json is not valid JSON"):
        find_model("run")


@pytest.mark.parametrize(
    "command",
    [
        ("translate", "demo"),
        ("inspect", "demo"),
        ("verify", "demo"),
        ("quantize", "demo", "--out", "int8"),
        ("average", "demo"),
        ("average", "demo/step-00000003", "demo/step-00000006", "--out", "mean"),
        ("plot", "demo"),
        ("compare", "demo", "other", "--log-only"),
        ("train", "demo", "--set", "training.steps=7"),
        ("train", "tuned", "--init-from", "demo", "--recipe", "toy.toml", "--data", "set"),
    ],
    ids=" ".join,
)
def test_models_and_runs_are_found_by_their_names(
    trmt: Command, trained: Path, toy_set: Path, command: tuple[str, ...]
) -> None:
    for name in ("demo", "other"):
        shutil.copytree(trained, MODELS / name)
    shutil.copy(trained.parent / "transformer.toml", "toy.toml")
    Path("set").symlink_to(toy_set)
    code, _, err = trmt(*command, stdin=b"ka\n")
    assert code == 0, err
    assert not [name for name in ("demo", "int8", "mean", "tuned") if Path(name).exists()]


@pytest.fixture(scope="module")
def trained(toy_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return train(TrainOptions(run=folder / "run", data=toy_set, recipe=toy.recipe(folder)))


# trmt models


def test_models_are_listed_with_state_languages_sizes_and_scores(trmt: Command, bundle: Path) -> None:
    code, out, err = trmt("models")
    assert (code, out) == (0, b"") and "has no models" in err
    wide = "a-name-" * 30
    add_run(bundle, wide, 5, ended=1.0)
    locked = add_run(bundle, "locked", 5)
    (locked / "lock").write_text(f"{os.getppid()} {platform.node()}")
    (MODELS / "begun").mkdir()
    (MODELS / "begun/config.toml").write_text("")
    damaged = add_bundle(bundle, "damaged")
    (damaged / "manifest.json").write_text("{")
    code, out, err = trmt("models")
    assert code == 0
    head, *rows = out.decode().splitlines()
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    assert head.split() == ["name", "state", "languages", "parameters", "on", "disk", "dev", "set"]
    assert cells.keys() == {wide, "locked", "begun", "damaged"}
    assert cells[wide][0] == "finished" and cells[wide][-3:] == ["chrF", "5", "default"]
    assert cells[wide][1:4] == ["x", "->", "y"]
    assert [cells[name][0] for name in ("locked", "begun", "damaged")] == ["training", "stopped", "damaged"]
    (warning,) = err.splitlines()
    assert warning.startswith("warning: ") and "models/damaged" in warning

    code, out, err = trmt("models", "--json")
    facts = {each["name"]: each for each in json.loads(out)}
    assert code == 0 and err == ""
    weights = bundles.read_weights(bundle, bundles.read_manifest(bundle))
    tied = bundles.read_manifest(bundle).tied
    count = sum(tensor.numel() for name, tensor in weights.items() if name not in tied)
    assert facts[wide]["parameters"] == count
    assert facts[wide]["languages"] == ["x", "y"] and facts[wide]["default"] is True
    assert facts[wide]["bundle"] == f"models/{wide}/step-00000005"
    assert facts[wide]["bytes"] == sum(
        file.stat().st_size for file in (MODELS / wide).rglob("*") if file.is_file()
    )
    assert facts["begun"]["bundle"] is None and facts["begun"]["parameters"] is None
    assert "problem" in facts["damaged"] and not facts["locked"]["default"]


@pytest.mark.parametrize("command", ["models", "inspect models/short"])
def test_reports_fit_into_a_narrow_terminal(
    trmt: Command, bundle: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    run = add_run(bundle, "the-name-of-this-model-is-rather-long", 5, ended=1.0)
    add_bundle(bundle, "short")
    piped = trmt(*command.split())[1].decode()
    assert max(map(len, piped.splitlines())) > 60
    monkeypatch.setattr(common, "terminal_width", lambda: 60)
    code, out, _ = trmt(*command.split())
    lines = out.decode().splitlines()
    assert code == 0
    assert not [line for line in lines if len(line) >= 60 and len(max(line.split(), key=len)) < 40]
    assert not {*out.decode().replace(",", " ").split()} - {*piped.replace(",", " ").split()}
    if command == "models":
        assert run.name in lines and "short" in lines
        assert all(line.startswith("  ") for line in lines if line not in (run.name, "short"))
    monkeypatch.setattr(common, "terminal_width", lambda: 1000)
    assert trmt(*command.split())[1].decode() == piped


def test_a_default_elsewhere_is_named_below_the_list(
    trmt: Command, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_run(bundle, "own", 5, ended=1.0)
    monkeypatch.setenv("TRMT_MODEL", str(bundle))
    code, out, err = trmt("models")
    assert code == 0 and b"default" not in out and err == f"default: {bundle} ($TRMT_MODEL)\n"
    monkeypatch.delenv("TRMT_MODEL")
    log(MODELS / "own", event="begin", step=0, time=2.0)
    shutil.rmtree(MODELS / "own")
    add_run(bundle, "unfinished", 5)
    code, out, err = trmt("models")
    assert code == 0 and b"default" not in out and err.startswith("there is no default: ")
