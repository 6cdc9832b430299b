"""trmt compare and trmt inspect, with real runs, one of them on another dev set."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toy
from tests.edited import edit
from trmt import cli, scoring
from trmt.averaging import AverageOptions, average
from trmt.bundles import bundles, checkpoints
from trmt.errors import ConfigError, DataError
from trmt.insight.comparing import CompareOptions, as_tree, comparable, compare, differences
from trmt.insight.inspecting import inspect
from trmt.scoring import ScoreOptions
from trmt.sets.shards import PreparedSet
from trmt.training.run import train
from trmt.translating import TranslateOptions, Translator
from trmt.validating import validate


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs on one set, with different lengths and architectures, and a run on another set."""
    folder = tmp_path_factory.mktemp("runs")
    one, other = toy.make_set(folder / "one"), toy.make_set(folder / "other", seed=7)
    changes: dict[str, Any] = {"validation": {"metric": "chrf", "sentences": 30}}
    plans = {
        "base": (one, "transformer", ["training.steps=6"]),
        "long": (one, "rnn", ["training.steps=12", "optim.lr=0.01"]),
        "elsewhere": (other, "transformer", ["training.steps=6"]),
    }
    made = {}
    for name, (data, architecture, more) in plans.items():
        recipe = toy.recipe(folder, changes, architecture=architecture)
        made[name] = train(toy.options(folder / name, data, recipe, *more), validate)
    return made


def training_pairs(run: Path) -> int:
    return len(PreparedSet.open(run.parent / "one" / "set").split("train"))


def options(*runs: Path, **more: Any) -> CompareOptions:
    return CompareOptions(runs=runs, **{"beam": 1, "resamples": 50, **more})


def test_only_settings_that_differ_are_listed(runs: dict[str, Path]) -> None:
    found = compare(options(runs["base"], runs["long"], log_only=True))
    assert found.differences["training.steps"] == [6, 12]
    assert found.differences["optim.lr"] == [0.003, 0.01]
    assert found.differences["architecture"] == ["transformer", "rnn"]
    # Defaults that the other network does not have are listed as well.
    assert found.differences["network.norm_position"] == ["post", "-"]
    assert "optim.name" not in found.differences and "network.d_model" not in found.differences
    base, long = found.runs.values()
    assert (base.progress["step"], long.progress["step"]) == (6, 12)
    assert base.data["train"] == training_pairs(runs["base"]) and base.data == long.data
    assert base.parameters == sum(
        parameter.numel() for parameter in bundles.load_bundle(base.bundle or Path()).net.parameters()
    )
    assert not found.dev and not found.test


def test_scores_are_those_of_the_translations_of_each_run(runs: dict[str, Path]) -> None:
    found = compare(options(runs["base"], runs["long"]))
    data = PreparedSet.open(runs["base"].parent / "one" / "set")
    sources, references = data.dev_text()
    texts = {}
    for name in ("base", "long"):
        translator = Translator.load(runs[name], options=TranslateOptions(search="greedy"))
        texts[name] = [each.text for each in translator.translate(sources)]
    assert texts["base"] != texts["long"]
    how = ScoreOptions(metrics=("bleu", "chrf"), resamples=50)
    assert found.dev == scoring.compare(texts, [references], options=how)
    assert found.dev["base"]["chrf"].p_value is None and found.dev["long"]["chrf"].p_value is not None
    assert all("version:" in score.signature for row in found.dev.values() for score in row.values())


def test_runs_with_other_dev_sets_are_left_out_with_a_warning(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare(options(runs["base"], runs["elsewhere"], runs["long"]))
    assert list(found.dev) == ["base", "long"]
    assert list(found.left_out) == ["elsewhere"]
    assert "elsewhere is not compared on the dev set" in " ".join(capsys.readouterr().err.split())
    # A test set is translated with all runs.
    corpus = toy.write_tsv(runs["base"].parent / "test.tsv", toy.pairs(20, seed=30))
    found = compare(options(runs["elsewhere"], runs["base"], test=corpus))
    assert list(found.test) == ["elsewhere", "base"] and list(found.dev) == ["elsewhere"]
    tree = json.loads(json.dumps(as_tree(found, options(*runs.values(), test=corpus))))
    assert tree["test"]["scores"]["base"]["chrf"]["p_value"] >= 0
    assert tree["dev_left_out"]["base"] and tree["paired_bootstrap"]["baseline"] == "elsewhere"


def test_without_weights_of_the_first_run_nothing_is_compared(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "young"
    shutil.copytree(runs["base"], copy, ignore=shutil.ignore_patterns("step-*"))
    found = compare(options(copy, runs["long"]))
    assert not found.dev and found.left_out["young"] == "it has no checkpoint yet"
    assert "young" in found.left_out["long"]
    assert inspect(copy)["run"]["progress"]["step"] == 6
    assert comparable({"a": found.runs["young"]})[0] == {}


def test_a_dev_set_that_was_changed_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs["base"], copy)
    edit(copy / "origin.json", data=str(tmp_path / "gone"))
    with pytest.raises(DataError, match=r"cannot be read.*--log-only"):
        compare(options(copy, runs["long"]))
    edit(copy / "origin.json", data=str(runs["base"].parent / "other" / "set"))
    with pytest.raises(DataError, match=r"dev set in .* has changed.*--log-only"):
        compare(options(copy, runs["long"]))


def test_impossible_comparisons_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two runs"):
        options(runs["base"])
    with pytest.raises(ConfigError, match="--log-only"):
        options(*runs.values(), log_only=True, test="x.tsv")
    with pytest.raises(ConfigError, match="twice"):
        compare(options(runs["base"], runs["base"]))
    shutil.copy(runs["base"] / "log.jsonl", tmp_path)
    with pytest.raises(DataError, match="not a run folder"):
        compare(options(tmp_path, runs["base"]))


def test_differences_include_settings_that_some_runs_lack() -> None:
    settings = [{"a": 1, "b": 2, "description": "x"}, {"a": 1, "c": True, "description": "y"}, {"a": 1}]
    assert differences(settings) == {"b": [2, "-", "-"], "c": ["-", True, "-"]}


def test_the_command_shows_curves_settings_and_scores(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(runs["base"]), str(runs["long"])]
    monkeypatch.setattr(sys, "argv", ["trmt", "compare", *paths, "--beam", "1", "--resamples", "50"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr().out
    assert ended.value.code in (0, None)
    assert "training loss" in shown and "signature" not in shown and "|version:" in shown
    [line] = [line for line in shown.splitlines() if line.startswith("optim.lr")]
    assert line.split() == ["optim.lr", "0.003", "0.01"]
    monkeypatch.setattr(sys, "argv", ["trmt", "compare", *paths, "--log-only", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    tree = json.loads(capsys.readouterr().out)
    assert tree["differences"]["training.steps"] == {"base": 6, "long": 12} and tree["dev"] == {}


# trmt inspect


def test_a_run_is_described_by_its_best_checkpoint_and_its_history(runs: dict[str, Path]) -> None:
    facts = inspect(runs["long"])
    assert facts["folder"] == str(checkpoints.find_bundle(runs["long"]))
    assert facts["run"]["progress"]["step"] == 12 and facts["run"]["checkpoints"] == [3, 6, 9, 12]
    assert facts["run"]["data"]["train"] == training_pairs(runs["long"])
    assert facts["run"]["settings"]["optim.lr"] == 0.01
    kept = {score["metric"]: score["value"] for score in facts["scores"]}
    logged = {score["metric"]: score for score in facts["run"]["best"]}
    assert logged["chrf"]["value"] == pytest.approx(kept["chrf"]) and logged["chrf"]["signature"]
    assert facts["came_from"] == {"run": str(runs["long"])}
    net = bundles.load_bundle(Path(facts["folder"])).net
    counted = {
        name: sum(parameter.numel() for parameter in child.parameters())
        for name, child in net.named_children()
        if name != "output"  # which is the target embedding
    }
    assert {name: count for name, count in facts["parts"].items() if name in counted} == {
        name: count for name, count in counted.items() if count
    }
    assert facts["parameters"] == sum(parameter.numel() for parameter in net.parameters())
    assert facts["shared"] == {"output": "target_embedding"}
    assert facts["steps"] == ("CUDA graphs" if torch.cuda.is_available() else "direct") and facts[
        "device"
    ] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_origin_of_weights(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["base"], run)
    averaged = inspect(average(AverageOptions(paths=(run,), last=2)))
    assert averaged["came_from"]["averaged"] == ["step-00000006", "step-00000003"]
    assert averaged["came_from"]["run"] == str(run.resolve())
    recipe = toy.recipe(tmp_path, {}, architecture="transformer")
    tuned = train(
        toy.options(
            tmp_path / "tuned", runs["base"].parent / "one" / "set", recipe, "training.steps=1", init_from=run
        )
    )
    assert inspect(tuned)["came_from"]["init_from"] == str(run)
    moved = tmp_path / "moved"
    shutil.copytree(run / "average", moved)
    assert "run" not in inspect(moved)["came_from"] and "run" not in inspect(moved)


def test_the_command_prints_lines(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trmt", "inspect", str(runs["base"])])
    with pytest.raises(SystemExit):
        cli.main()
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert "encoder" in lines["components"] and "30 dev pairs" in lines["prepared"]
    assert "direct steps" in lines["runs"] and lines["trained"].startswith("6 steps")
