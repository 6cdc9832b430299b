from __future__ import annotations

import gzip
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tests import toy
from tests.edited import edit
from trmt.bundles.bundles import read_manifest
from trmt.cli import app
from trmt.errors import BundleError, ConfigError, DataError
from trmt.training.history import NEW as RECORD

SETTINGS = ("--set", "training.steps=4", "--set", "validation.every=2", "--device", "cpu")


def run(*arguments: str) -> Result:
    """The result of a command; a TrmtError is raised, as the program prints it."""
    result = CliRunner().invoke(app, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def write_corpus(folder: Path, name: str, count: int, *, seed: int = 1) -> None:
    for side, text in zip(("x", "y"), zip(*toy.pairs(count, seed=seed), strict=True), strict=True):
        (folder / f"{name}.{side}{side}").write_text("\n".join(text) + "\n", encoding="utf-8")


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A short `trmt new` in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path, "train", 300)
    recipe = toy.recipe(tmp_path)
    return ("new", "models/toy", "--train", "train.xx,train.yy", "--recipe", recipe, *SETTINGS)


def printed(result: Result) -> list[str]:
    """The command lines that were printed before they were run."""
    return [line for line in result.stderr.splitlines() if line.startswith("trmt ")]


def planned(result: Result) -> list[str]:
    """The command lines of a dry run, whose standard output is a shell script."""
    return [line for line in result.stdout.splitlines() if not line.startswith("# ")]


def test_text_becomes_a_scored_translator_with_languages(new: tuple[str, ...], tmp_path: Path) -> None:
    result = run(*new)
    assert [shlex.split(line)[1] for line in printed(result)] == [
        *("tokenizer", "prepare", "train", "average", "translate", "score")
    ]
    assert "chrF2" in result.stdout
    folder = tmp_path / "models" / "toy"
    assert read_manifest(folder / "average").languages == ("xx", "yy")
    dev = (folder / "data" / "dev.source.txt").read_text("utf-8").splitlines()
    assert len((folder / "hypotheses-dev.yy").read_text("utf-8").splitlines()) == len(dev) > 0


def test_the_same_line_skips_what_is_done(new: tuple[str, ...], tmp_path: Path) -> None:
    run(*new)
    weights = tmp_path / "models/toy/average/weights.safetensors"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "models").rglob("*") if path.is_file()}
    again = run(*new)
    assert [shlex.split(line)[1] for line in printed(again)] == ["score"]
    assert again.stderr.count("done: trmt ") == 5 and "chrF2" in again.stdout
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "models").rglob("*") if path.is_file()}
    assert after == before and weights in after


@pytest.mark.parametrize("failing", ["prepare", "train", "average", "translate", "score"])
def test_a_stop_before_any_command_is_made_up_for_by_the_same_line(
    new: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    import trmt.cli.new as module

    original = module._run

    def stop(step: Any) -> None:
        if step.arguments[0] == failing:
            raise KeyboardInterrupt
        original(step)

    with monkeypatch.context() as patched:
        patched.setattr(module, "_run", stop)
        assert CliRunner().invoke(app, new).exit_code == 130
    again = run(*new)
    assert shlex.split(printed(again)[0])[1] == failing
    assert read_manifest(tmp_path / "models/toy/average").training["averaged"]


def test_a_kill_before_the_record_is_written_repeats_that_command(
    new: tuple[str, ...], tmp_path: Path
) -> None:
    run(*new)
    path = tmp_path / "models/toy" / RECORD
    record = json.loads(path.read_bytes())
    edit(path, done={name: record["done"][name] for name in ("tokenizer", "prepare")})
    again = run(*new)
    assert [shlex.split(line)[1] for line in printed(again)] == ["train", "average", "translate", "score"]
    assert "has ended at step 4" in again.stderr


def commands(result: Result) -> list[str]:
    return [shlex.split(line)[1] for line in printed(result)]


def test_what_was_changed_by_hand_is_made_again(new: tuple[str, ...], tmp_path: Path) -> None:
    run(*new)
    first = (tmp_path / "models/toy/average/weights.safetensors").read_bytes()
    run("average", "models/toy", "--last", "1", "-o", "models/one")
    shutil.rmtree(tmp_path / "models/toy/average")
    shutil.copytree(tmp_path / "models/one", tmp_path / "models/toy/average")
    assert commands(run(*new)) == ["average", "translate", "score"]
    assert (tmp_path / "models/toy/average/weights.safetensors").read_bytes() == first
    (tmp_path / "models/toy/hypotheses-dev.yy").write_text("x\n")
    assert commands(run(*new)) == ["translate", "score"]
    run("train", "models/toy", "--set", "training.steps=6")
    assert commands(run(*new)) == ["train", "average", "translate", "score"]
    assert commands(run(*new)) == ["score"]


def test_a_bare_name_is_in_models(new: tuple[str, ...], tmp_path: Path) -> None:
    assert all("models/toy" in line for line in planned(run("new", "toy", *new[2:], "--dry-run")))


def test_another_test_set_is_translated_again(new: tuple[str, ...], tmp_path: Path) -> None:
    tested = (*new, "--test", "test.xx,test.yy")
    for count, expected in ((20, 6), (10, 2), (10, 1)):
        write_corpus(tmp_path, "test", count, seed=count)
        assert len(commands(run(*tested))) == expected


@pytest.mark.parametrize("name", [".xx.gz", ".yy.gz"])
def test_a_test_set_may_be_compressed(new: tuple[str, ...], tmp_path: Path, name: str) -> None:
    write_corpus(tmp_path, "test", 20, seed=9)
    files = {".xx.gz": "test.xx", ".yy.gz": "test.yy"}
    (tmp_path / f"test{name}").write_bytes(gzip.compress((tmp_path / files[name]).read_bytes()))
    test = ",".join(f"test{name}" if name == key else file for key, file in files.items())
    assert "chrF2" in run(*new, "--test", test).stdout


def test_what_fails_before_training_can_be_mended(new: tuple[str, ...], tmp_path: Path) -> None:
    text = (tmp_path / "train.xx").read_bytes()
    (tmp_path / "train.xx").write_bytes(b"\xff" + text)
    with pytest.raises(DataError, match="not valid UTF-8"):
        run(*new)
    (tmp_path / "train.xx").write_bytes(text)
    assert len(commands(run(*new))) == 6


def test_the_same_text_may_be_named_otherwise(new: tuple[str, ...], tmp_path: Path) -> None:
    run(*new)
    corpus = f"{tmp_path}/train.xx,{tmp_path}/train.yy"
    assert commands(run(*(corpus if each == "train.xx,train.yy" else each for each in new))) == ["score"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--recipe", "nonsense"), "there is no recipe 'nonsense'"),
        (("--set", "training.stepz=4"), "stepz"),
        (("--device", "gpu"), "there is no device 'gpu'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_done(
    new: tuple[str, ...], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*new, *options)
    assert not (tmp_path / "models").exists()


def test_more_steps_go_on_with_the_run(new: tuple[str, ...], tmp_path: Path) -> None:
    run(*new)
    more = run(*new, "--set", "training.steps=6")
    assert shlex.split(printed(more)[0])[1] == "train" and "resuming" in more.stderr
    assert (tmp_path / "models/toy/step-00000006").is_dir()


def test_each_printed_line_can_be_typed(new: tuple[str, ...], tmp_path: Path) -> None:
    lines = planned(run(*new, "--dry-run"))
    assert len(lines) == 6 and not (tmp_path / "models").exists()
    for line in lines[:4]:
        run(*shlex.split(line)[1:])
    assert (tmp_path / "models/toy/average").is_dir()


def test_a_test_set_is_what_is_scored(new: tuple[str, ...], tmp_path: Path) -> None:
    write_corpus(tmp_path, "test", 20, seed=9)
    lines = planned(run(*new, "--test", "test.xx,test.yy", "--dry-run"))
    assert "-i test.xx -o models/toy/hypotheses-test.yy" in lines[-2]
    assert lines[-1] == "trmt score models/toy/hypotheses-test.yy --ref test.yy --to yy"


def test_little_text_without_dev_set_ends_without_a_score(new: tuple[str, ...], tmp_path: Path) -> None:
    write_corpus(tmp_path, "train", 60)
    result = run(*new, "--set", "training.patience=0")
    assert "there is neither --test nor a dev set" in result.stderr
    assert (tmp_path / "models/toy/average").is_dir()


def test_other_text_or_another_direction_is_refused(new: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "models" / "toy"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    for more in ((), ("--dry-run",)):
        with pytest.raises(ConfigError, match=r"holds notes\.txt and was not begun by trmt new"):
            run(*new, *more)
    (folder / "notes.txt").unlink()
    with pytest.raises(ConfigError, match=r"train\.xx is a file; name a folder"):
        run("new", "train.xx", *new[2:])
    run(*new)
    with pytest.raises(ConfigError, match="was trained on other text"):
        run(*new, "--to", "zz")
    write_corpus(tmp_path, "train", 300, seed=2)
    with pytest.raises(ConfigError, match="was trained on other text"):
        run(*new)


def test_text_without_languages_or_from_a_stream_is_refused(new: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("a\tb\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="do not tell the languages"):
        run("new", "models/other", "--train", "pairs.tsv")
    with pytest.raises(ConfigError, match="can be read only once"):
        run("new", "models/other", "--train", "-", "--from", "xx", "--to", "yy")


# ------------------------------------------------------------------------------ the same by hand


def test_two_pairs_have_a_tokenizer_and_a_set_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path, "train", 300)
    (tmp_path / "other.xx").write_bytes((tmp_path / "train.xx").read_bytes())
    (tmp_path / "other.zz").write_bytes((tmp_path / "train.yy").read_bytes())
    for corpus in ("train.xx,train.yy", "other.xx,other.zz"):
        run("tokenizer", "--train", corpus, "--size", "300")
        run("prepare", "--train", corpus, "--workers", "1")
    assert sorted(path.name for path in Path("data").iterdir()) == [
        *("tokenizer-xx-yy", "tokenizer-xx-zz", "xx-yy", "xx-zz")
    ]
    with pytest.raises(BundleError, match="is the tokenizer for xx to yy, which would be lost"):
        run("tokenizer", "data/tokenizer-xx-yy", "--train", "other.xx,other.zz", "--size", "300")
    with pytest.raises(BundleError, match="there are several tokenizers"):
        run("prepare", "data/third", "--train", "train")
    with pytest.raises(BundleError, match="there is no tokenizer for zz to xx in data/; train one"):
        run("prepare", "--train", "other.zz,other.xx")


def test_documents_have_the_language_of_their_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path, "train", 300)
    run("tokenizer", "--train", "train.xx,train.yy", "--size", "300")
    run("prepare", "--documents", "train.yy")
    assert json.loads((tmp_path / "data/documents-yy/index.json").read_bytes())["languages"] == ["yy", "yy"]
    with pytest.raises(ConfigError, match="--dev-size is for pairs"):
        run("prepare", "--documents", "train.yy", "--dev-size", "5")


def test_what_is_replaced_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path, "train", 300)
    for size, limit in (("300", "90"), ("300", "90"), ("280", "80")):
        first = run("tokenizer", "--train", "train.xx,train.yy", "--size", size).stderr
        second = run("prepare", "--train", "train.xx,train.yy", "--max-length", limit).stderr
        assert ("replacing the tokenizer in data/tokenizer-xx-yy" in first) == (size == "280")
        assert ("replacing data/xx-yy, which was made from other" in second) == (size == "280")


def test_the_tokenizer_of_older_versions_is_still_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path, "train", 200)
    run("tokenizer", "data/tokenizer", "--train", "train.xx,train.yy", "--size", "300")
    for corpus in ("train.xx,train.yy", "train"):
        assert "tokenizer: data/tokenizer" in run("prepare", "--train", corpus, "--workers", "1").stderr


def test_a_prefix_has_no_direction_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path, "train", 200)
    with pytest.raises(ConfigError, match=r"train stands for train\.xx, train\.yy, in no order; name the"):
        run("tokenizer", "--train", "train")
