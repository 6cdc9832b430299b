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


# A minute to a minute and a half on one core, to the score that docs/lineage.md tells, less a margin.
SHORT = ["validation.sentences=100", "network.dropout=0.0", "batches.tokens=1024", "optim.schedule=cosine"]
RNNSEARCH = [
    "training.steps=900",
    "validation.every=900",
    "network.width=128",
    "optim.lr=5e-3",
    "optim.warmup=150",
]
LUONG = [
    "training.steps=600",
    "validation.every=600",
    "network.width=128",
    "optim.lr=4e-3",
    "optim.warmup=100",
]
FIXED = [
    "training.steps=900",
    "validation.every=900",
    "network.width=192",
    "optim.lr=4e-3",
    "optim.warmup=100",
]
CONV = [
    "training.steps=700",
    "validation.every=700",
    "network.width=128",
    "optim.lr=2e-3",
    "optim.warmup=100",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "settings", "bleu"),
    [
        ("phrasebook", ["training.steps=500", "validation.every=100"], 60),
        ("rnnsearch", SHORT + RNNSEARCH, 85),
        ("luong", SHORT + LUONG, 0),
        ("rnn-fixed", SHORT + FIXED, 0),
        ("convs2s", SHORT + CONV, 0),
        (
            "universal",
            [
                *(f"network.{size}" for size in ("width=128", "feed_forward=512", "dropout=0.0")),
                *(f"optim.{option}" for option in ("lr=2e-3", "warmup=200", "schedule=cosine")),
                *("batches.tokens=1024", "training.steps=500", "validation.every=100"),
            ],
            60,
        ),
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
    trmt("average", "--last", "1", cwd=tmp_path)
    source = (tmp_path / "texts" / "test.en").read_bytes()
    translated = trmt("translate", cwd=tmp_path, stdin=source)
    assert translated.count(b"\n") == source.count(b"\n")
    scored = json.loads(
        trmt("score", "--ref", "texts/test.de", "--metric", "bleu", "--json", cwd=tmp_path, stdin=translated)
    )
    assert bleu < scored["systems"][0]["scores"]["bleu"]["value"] <= 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "settings", "loss"),
    [
        (
            "bert-tiny",
            [
                "loss.next_sentence=false",
                "optim.schedule=constant",
                "batches.tokens=2048",
                "training.steps=300",
            ],
            3.0,
        ),
        ("bart-tiny", ["batches.tokens=1024", "training.steps=100"], 3.3),
    ],
)
def test_bare_commands_lead_from_documents_to_a_network_that_reads(
    tmp_path: Path, recipe: str, settings: list[str], loss: float
) -> None:
    """A unigram model of these pieces would lose more than 5 nats."""
    subprocess.run([sys.executable, str(ROOT / "data" / "phrasebook.py"), "texts"], cwd=tmp_path, check=True)
    languages = ("--from", "en", "--to", "de")
    trmt("tokenizer", "--train", "texts/train", *languages, "--size", "2400", cwd=tmp_path)
    for name in ("train", "dev"):  # like sentences together
        lines = sorted({*(tmp_path / f"texts/{name}.en").read_text("utf-8").splitlines()})
        documents = ("\n".join(lines[at : at + 10]) for at in range(0, len(lines), 10))
        (tmp_path / f"{name}.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    trmt("prepare", "--documents", "train.txt", "--dev", "dev.txt", cwd=tmp_path)
    settings = [*settings, "network.dropout=0.0", "batches.passage=32", "optim.warmup=100"]
    settings.append("validation.every=100")
    changes = [word for setting in settings for word in ("--set", setting)]
    trmt("pretrain", "models/reads", "--recipe", recipe, *changes, cwd=tmp_path)
    events = map(json.loads, (tmp_path / "models/reads/log.jsonl").read_text("utf-8").splitlines())
    found = [event["scores"][0]["value"] for event in events if event["event"] == "validate"]
    assert found[-1] < loss
    trmt("prepare", "--train", "texts/train", "--dev", "texts/dev", cwd=tmp_path)
    few = ("--set", "training.steps=4", "--set", "validation.sentences=4")
    start = ("--recipe", "phrasebook", "--init-from", "models/reads:encoder")
    trmt("train", "models/translates", *start, *few, cwd=tmp_path)
    assert trmt("translate", "models/translates", cwd=tmp_path, stdin=b"Hello.\n").count(b"\n") == 1


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
