"""Scores equal sacreBLEU's own, digit for digit, and bad input is refused by name."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from trmt import scoring
from trmt.cli.score import command
from trmt.errors import ConfigError, DataError, TrmtError
from trmt.scoring import ScoreOptions, bleu_tokenizer, compare, score

TEXT = "Der Zug nach Köln fährt um halb vier ab , weil 3,50 € (bar) „heute“ 中文字 don't U.S. & <b> -"
WORDS = TEXT.split(" ")
SHOWN = {"bleu": "BLEU", "chrf": "chrF2", "chrf++": "chrF2++", "ter": "TER"}

app = typer.Typer()
app.command()(command)


def sentences(seed: int, count: int = 120) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 14))) for _ in range(count)]


def noisy(lines: list[str], seed: int, rate: float) -> list[str]:
    """A translation of `lines` by a poor system: words dropped, changed and moved, some lines empty."""
    rng = random.Random(seed)
    out = []
    for line in lines:
        words = [rng.choice(WORDS) if rng.random() < rate else word for word in line.split()]
        words = [word for word in words if rng.random() > rate / 2]
        if rng.random() < rate:
            rng.shuffle(words)
        out.append("" if rng.random() < 0.03 else " ".join(words))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scoring")
    reference = sentences(1)
    texts = {
        "one": reference,
        "two": noisy(reference, 2, 0.2),
        "base": noisy(reference, 3, 0.3),
        "better": noisy(reference, 4, 0.1),
        "third": noisy(reference, 5, 0.3),
    }
    for name, text in texts.items():
        (folder / name).write_bytes("".join(f"{line}\n" for line in text).encode())
    return folder


def sacrebleu(folder: Path, *arguments: str, seed: int | None = None, shape: str = "json") -> Any:
    """What the sacrebleu command itself says; as text it gives less digits, but can do all metrics."""
    environment = os.environ | {"PYTHONUTF8": "1"} | ({"SACREBLEU_SEED": str(seed)} if seed else {})
    width = "17" if shape == "json" else "12"
    full = [sys.executable, "-m", "sacrebleu", *arguments, "-w", width, "-f", shape]
    run = subprocess.run(full, cwd=folder, env=environment, capture_output=True, check=True)
    if shape == "text":
        return run.stdout.decode()
    found = json.loads(run.stdout)
    return found if isinstance(found, list) else [found]


def trmt(folder: Path, *arguments: str, stdin: bytes | None = None) -> dict[str, Any]:
    """What `trmt score --json` says: system -> metric -> score."""
    names = [str(folder / part) if (folder / part).is_file() else part for part in arguments]
    result = CliRunner().invoke(app, [*names, "--json"], input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return {row["system"]: row["scores"] for row in json.loads(result.stdout)["systems"]}


def only(table: dict[str, Any]) -> dict[str, Any]:
    (scores,) = table.values()
    return dict(scores)


# ----------------------------------------------------------------- equal to the sacrebleu command


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([], []),
        (["--lowercase"], ["-lc", "--chrf-lowercase"]),
        (["--tokenize", "intl"], ["-tok", "intl"]),
        (["--to", "zh"], ["-tok", "zh"]),
        (["--tokenize", "none"], ["-tok", "none"]),
        (["--tokenize", "char"], ["-tok", "char"]),
    ],
)
@pytest.mark.parametrize("references", [["one"], ["two", "one"]], ids=["one reference", "two references"])
def test_one_system(folder: Path, ours: list[str], theirs: list[str], references: list[str]) -> None:
    flags = [flag for name in references for flag in ("--ref", name)]
    found = only(trmt(folder, "base", *flags, *ours))
    expected = sacrebleu(folder, *references, "-i", "base", "-m", "bleu", "chrf", "ter", *theirs)
    assert [row["name"] for row in expected] == ["BLEU", "chrF2", "TER"]
    for row, mine in zip(expected, found.values(), strict=True):
        assert (mine["name"], mine["value"], mine["signature"]) == (
            row["name"],
            row["score"],
            row["signature"],
        )


def test_chrf_with_words(folder: Path) -> None:
    (expected,) = sacrebleu(folder, "one", "-i", "base", "-m", "chrf", "--chrf-word-order", "2")
    found = only(trmt(folder, "base", "--ref", "one", "-m", "chrf++"))["chrf++"]
    assert (found["name"], found["value"]) == (expected["name"], expected["score"])
    assert found["signature"] == expected["signature"]


def test_confidence_intervals(folder: Path) -> None:
    arguments = ("one", "-i", "base", "-m", "bleu", "chrf", "ter", "--confidence", "--confidence-n", "300")
    expected = sacrebleu(folder, *arguments, seed=7)
    found = only(trmt(folder, "base", "--ref", "one", "--resamples", "300", "--seed", "7"))
    for row, mine in zip(expected, found.values(), strict=True):
        assert mine["value"] == row["score"]
        assert mine["interval"] == {"mean": row["confidence_mean"], "half_width": row["confidence_var"]}
        assert mine["signature"] == row["signature"]
        assert "bs:300|seed:7" in mine["signature"]


def test_paired_bootstrap_of_three_systems(folder: Path) -> None:
    names = ["base", "better", "third"]
    table = sacrebleu(
        folder, "one", "two", "-i", *names, "--paired-bs", "-m", "bleu", "chrf", "ter", shape="text"
    )
    found = trmt(folder, *names, "--ref", "one", "--ref", "two")
    ours = [entry for scores in found.values() for entry in scores.values()]
    assert len(ours) == 9
    # Row by row: score (mean ± half width) of each metric, and below it the p-values.
    assert re.findall(r"([0-9.]+) \(([0-9.]+) ± ([0-9.]+)\)", table) == [
        tuple(f"{number:.12f}" for number in (entry["value"], *entry["interval"].values())) for entry in ours
    ]
    p_values = [entry["p_value"] for entry in ours if "p_value" in entry]
    assert re.findall(r"p = ([0-9.]+)", table) == [f"{p:.4f}" for p in p_values]
    assert len(p_values) == 6 and min(p_values) < 0.01 < max(p_values)
    assert all(f" {entry['signature']}\n" in table for entry in ours)


def test_approximate_randomization(folder: Path) -> None:
    arguments = (
        "one",
        "-i",
        "base",
        "better",
        "--paired-ar",
        "--paired-ar-n",
        "200",
        "-m",
        "bleu",
        "chrf",
        "ter",
    )
    expected = sacrebleu(folder, *arguments, seed=3)
    found = trmt(
        folder, "base", "better", "--ref", "one", "--paired", "ar", "--resamples", "200", "--seed", "3"
    )
    for row, mine in zip(expected, found.values(), strict=True):
        for metric in ("bleu", "chrf", "ter"):
            assert mine[metric]["value"] == row[SHOWN[metric]]["score"]
            assert mine[metric].get("p_value") == row[SHOWN[metric]]["p_value"]
            assert mine[metric]["interval"]["half_width"] > 0


def test_comparing_agrees_with_scoring_one_by_one(folder: Path) -> None:
    read = {name: scoring.read_sentences(folder / name) for name in ("base", "better", "one")}
    reference = [read.pop("one")]
    options = ScoreOptions(metrics=("ter", "chrf++", "bleu"), resamples=50)
    together = compare(read, reference, options=options)
    for name, text in read.items():
        alone = score(text, reference, options=options)
        assert list(together[name]) == list(alone) == ["ter", "chrf++", "bleu"]
        for metric, found in alone.items():
            assert together[name][metric].value == found.value
            assert (together[name][metric].p_value is None) == (name == "base")
    # The bootstrap of the baseline is the one of a system alone, so even its interval is the same.
    baseline = score(read["base"], reference, options=options)
    for metric, found in baseline.items():
        interval = together["base"][metric].interval
        assert interval is not None and found.interval is not None
        assert interval.mean == pytest.approx(found.interval.mean, rel=1e-6)
    assert together["better"]["bleu"].significant


def test_the_environment_is_left_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = scoring.read_sentences(folder / "base")
    for before in (None, "99"):
        if before:
            monkeypatch.setenv("SACREBLEU_SEED", before)
        else:
            monkeypatch.delenv("SACREBLEU_SEED", raising=False)
        found = score(lines, [lines], options=ScoreOptions(metrics=("bleu",), resamples=20, seed=5))
        assert "seed:5" in found["bleu"].signature
        assert os.environ.get("SACREBLEU_SEED") == before


# -------------------------------------------------------------------------------- the command


def test_stdin_gz_and_crlf_score_the_same(folder: Path, tmp_path: Path) -> None:
    raw = (folder / "base").read_bytes()
    expected = only(trmt(folder, "base", "--ref", "one"))
    windows, packed = tmp_path / "crlf", tmp_path / "base.gz"
    windows.write_bytes(raw.replace(b"\n", b"\r\n").removesuffix(b"\r\n"))
    packed.write_bytes(gzip.compress(raw))
    assert only(trmt(folder, "--ref", "one", stdin=raw)) == expected
    assert only(trmt(folder, "-", "--ref", "one", stdin=raw)) == expected
    assert only(trmt(folder, str(windows), "--ref", "one")) == expected
    assert only(trmt(folder, str(packed), "--ref", "one")) == expected


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    odd = "a\u2028b\rc\x0bd\x85e"
    for name in ("system", "reference"):
        (tmp_path / name).write_bytes(f"{odd}\nlast".encode())
    found = only(trmt(tmp_path, "system", "--ref", "reference", "-m", "chrf"))
    assert found["chrf"]["value"] == 100


def run_text(*arguments: str) -> list[str]:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_one_system_prints_a_line_with_a_signature_for_each_metric(folder: Path) -> None:
    found = only(trmt(folder, "base", "--ref", "one"))
    rows = run_text(str(folder / "base"), "--ref", str(folder / "one"))
    assert [row.split() for row in rows] == [
        [entry["name"], f"{entry['value']:.2f}", entry["signature"]] for entry in found.values()
    ]


def test_several_systems_print_a_table_and_then_the_signatures(folder: Path) -> None:
    names = [str(folder / name) for name in ("base", "better")]
    rows = run_text(*names, "--ref", str(folder / "one"), "--resamples", "100", "-m", "bleu", "-m", "ter")
    assert rows[0].split() == ["system", "BLEU", "TER"]
    assert rows[1].startswith(names[0]) and "p =" not in rows[1] and "±" in rows[1]
    assert rows[2].startswith(names[1]) and rows[2].count("p =") == 2
    assert rows[3] == ""
    assert [row.split()[0] for row in rows[4:]] == ["BLEU", "TER"]
    assert all("bs:100|seed:12345" in row for row in rows[4:])


def test_several_systems_without_tests(folder: Path) -> None:
    found = trmt(folder, "base", "better", "--ref", "one", "--resamples", "0")
    assert len(found) == 2
    for scores in found.values():
        assert all(set(entry) == {"name", "value", "signature"} for entry in scores.values())


# --------------------------------------------------------------------------- what is refused


def refusal(*arguments: str, stdin: bytes = b"") -> str:
    with pytest.raises(TrmtError) as caught:
        CliRunner().invoke(app, list(arguments), input=stdin, catch_exceptions=False)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unequal_line_counts_name_both_files(folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.de"
    short.write_text("eins\nzwei\n", encoding="utf-8")
    message = refusal(str(short), "--ref", str(folder / "one"))
    assert f"{short} has 2 lines" in message and f"{folder / 'one'} has 120" in message
    message = refusal("--ref", str(short), stdin=b"eins\n")
    assert "standard input has 1" in message and f"{short} has 2" in message
    # The second system and the second reference are looked at too.
    message = refusal(str(folder / "base"), str(short), "--ref", str(folder / "one"))
    assert str(short) in message
    message = refusal(str(folder / "base"), "--ref", str(folder / "one"), "--ref", str(short))
    assert str(short) in message


def test_bad_bytes_name_the_file_and_the_line(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.de"
    broken.write_bytes(b"gut\n" * 3 + b"schlecht \xff\n")
    message = refusal(str(broken), "--ref", str(folder / "one"))
    assert str(broken) in message and "line 4" in message


def test_what_cannot_work_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    base, one = str(folder / "base"), str(folder / "one")
    assert "--ref" in refusal(base)
    assert "twice" in refusal(base, base, "--ref", one)
    assert "only once" in refusal("-", "--ref", "-")
    assert "bleu" in refusal(base, "--ref", one, "-m", "blue")
    assert "13a" in refusal(base, "--ref", one, "--tokenize", "13")
    assert "resamples" in refusal(base, "--ref", one, "--resamples", "1")
    assert str(tmp_path / "gone") in refusal(str(tmp_path / "gone"), "--ref", one)
    (tmp_path / "empty").touch()
    assert "empty" in refusal(str(tmp_path / "empty"), "--ref", str(tmp_path / "empty"))


def test_the_library_refuses_too() -> None:
    with pytest.raises(DataError, match="reference 2 has 1"):
        score(["a", "b"], [["a", "b"], ["a"]])
    with pytest.raises(ConfigError, match="reference"):
        score(["a"], [])
    with pytest.raises(ConfigError, match="two systems"):
        compare({"a": ["a"]}, [["a"]])
    for wrong in ({"metrics": ()}, {"seed": 0}, {"paired": "xx"}, {"resamples": -1}):
        with pytest.raises(ConfigError):
            ScoreOptions(**wrong)


# ------------------------------------------------------------------------------- tokenizers


def test_the_tokenizer_follows_the_language(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [bleu_tokenizer(code) for code in ("de", "", "zh", "zh-Hant", "ZH_cn", "fa")] == [
        "13a",
        "13a",
        "zh",
        "zh",
        "zh",
        "13a",
    ]


@pytest.mark.parametrize(
    ("language", "module", "name"), [("ja", "ja_mecab", "ja-mecab"), ("ko", "ko_mecab", "ko-mecab")]
)
def test_a_missing_tokenizer_falls_back_to_characters_and_says_so_once(
    language: str, module: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"sacrebleu.tokenizers.tokenizer_{module}.MeCab", None)
    bleu_tokenizer.cache_clear()
    assert [bleu_tokenizer(language), bleu_tokenizer(language)] == ["char", "char"]
    assert capsys.readouterr().err.count(f"sacrebleu[{language}]") == 1
    with pytest.raises(ConfigError, match=f"sacrebleu\\[{language}\\]"):
        score(["a"], [["a"]], options=ScoreOptions(tokenize=name))
    bleu_tokenizer.cache_clear()
