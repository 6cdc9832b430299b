"""The whole way through the commands: from the phrasebook's text to a score on sentences never seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def trmt(*arguments: str, cwd: Path, stdin: bytes = b"") -> bytes:
    done = subprocess.run(
        [sys.executable, "-m", "trmt", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=stdin,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


# A minute and a half on one core; all but the first are still rising when it ends (docs/lineage.md).
SHORT = ["network.dropout=0.0", "batches.tokens=1024", "network.width=128", "validation.sentences=100"]
RNNSEARCH = ["training.steps=900", "validation.every=900", "optim.lr=5e-3", "optim.warmup=150"]
LUONG = ["training.steps=600", "validation.every=600", "optim.lr=4e-3", "optim.warmup=100"]
CONV = ["training.steps=900", "validation.every=150", "optim.warmup=150"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "settings", "bleu"),
    [
        ("phrasebook", ["training.steps=500", "validation.every=100"], 60),
        ("rnnsearch", [*SHORT, *RNNSEARCH, "optim.schedule=cosine"], 85),
        ("luong", [*SHORT, *LUONG, "optim.schedule=cosine"], 8),
        ("convs2s", SHORT + CONV, 35),
    ],
)
def test_bare_commands_lead_from_text_to_a_score(
    tmp_path: Path, recipe: str, settings: list[str], bleu: float
) -> None:
    subprocess.run([sys.executable, str(ROOT / "data" / "phrasebook.py"), "texts"], cwd=tmp_path, check=True)
    trmt(
        *("tokenizer", "--train", "texts/train", "--from", "en", "--to", "de", "--size", "2400"), cwd=tmp_path
    )
    trmt("prepare", "--train", "texts/train", "--dev", "texts/dev", cwd=tmp_path)
    changes = [word for setting in settings for word in ("--set", setting)]
    trmt("train", "--recipe", recipe, *changes, cwd=tmp_path)
    trmt("average", "--last", "2" if recipe == "convs2s" else "1", cwd=tmp_path)
    source = (tmp_path / "texts" / "test.en").read_bytes()
    translated = trmt("translate", cwd=tmp_path, stdin=source)
    assert translated.count(b"\n") == source.count(b"\n")
    scored = json.loads(
        trmt("score", "--ref", "texts/test.de", "--metric", "bleu", "--json", cwd=tmp_path, stdin=translated)
    )
    assert bleu < scored["systems"][0]["scores"]["bleu"]["value"] <= 100


@pytest.mark.slow
def test_a_wheel_installs_and_runs_outside_the_checkout(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)], check=True)
    [wheel] = wheels.glob("trmt-*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    [packages] = (tmp_path / "venv").glob("[lL]ib/**/site-packages")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(packages), str(wheel)], check=True)
    # torch and the others are there already: let the new environment see them.
    here = Path(__import__("torch").__file__).parent.parent
    (packages / "others.pth").write_text(f"{here}\n")
    python = next((tmp_path / "venv").glob("[bS]*/python*"))
    code = "import trmt, trmt.recipe as recipe; print(trmt.__file__, recipe.names())"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(packages) in done.stdout and "transformer-base" in done.stdout
    done = subprocess.run([python, "-m", "trmt", "env"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "torch" in done.stdout
