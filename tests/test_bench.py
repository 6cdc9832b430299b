"""The programs that measure: they stop in time, go on where they stopped, and score as they say."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sacrebleu

import budget
import corpora
import experiment
import gpu_suite
import gpu_tests
import moses
import multi30k
import provenance
import quality_tables
from trmt.training.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent

SAVES = """
import pathlib, signal, sys
place = pathlib.Path(sys.argv[1])
def save(*_):
    (place / "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(place / "begun").touch()
signal.pause()
"""


@pytest.mark.parametrize(("text", "expected"), [("9m", 540), ("90s", 90), ("2", 2), ("1.5h", 5400)])
def test_a_time_is_read(text: str, expected: float) -> None:
    assert budget.seconds(text) == expected


def test_a_time_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="is no time"):
        budget.seconds("9 minutes")


def test_a_command_is_told_to_save_before_the_budget_ends(tmp_path: Path) -> None:
    spent = budget.Budget(3.0, grace=1.5)
    with pytest.raises(budget.OutOfTime):
        spent.run([sys.executable, "-c", SAVES, str(tmp_path)], log=tmp_path / "log")
    assert (tmp_path / "begun").exists() and (tmp_path / "saved").exists()
    with pytest.raises(budget.OutOfTime):  # and nothing is begun after it
        spent.run([sys.executable, "-c", "open('again', 'w')"], log=tmp_path / "log", cwd=tmp_path)
    assert not (tmp_path / "again").exists()


def test_a_command_that_will_not_save_is_killed(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1); time.sleep(600)"
    with pytest.raises(budget.OutOfTime):
        budget.Budget(1.0, grace=0.5).run([sys.executable, "-c", deaf], log=tmp_path / "log")


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)ended with status 3.*the reason"):
        fails = "import sys; print('the reason', file=sys.stderr); sys.exit(3)"
        budget.Budget().run([sys.executable, "-c", fails], log=tmp_path / "log")


def test_times_add_up_over_calls(tmp_path: Path) -> None:
    for stage, spent in (("train", 1.5), ("translate", 2.0), ("train", 2.25)):
        budget.Ledger(tmp_path / "seconds").add(stage, spent)
    assert budget.Ledger(tmp_path / "seconds").totals() == {"train": 3.75, "translate": 2.0}


def test_text_becomes_what_results_are_published_on() -> None:
    """Moses' own escapes and cuts, worked out by hand."""
    sentences = ["Ein Mann mit „Hut“ & Joe's U-Bahn, ca. 3.5 m lang.", "A dog's ball (red)."]
    german, english = moses.tokenised(sentences[:1], "de"), moses.tokenised(sentences[1:], "en")
    assert german == ["ein mann mit &quot; hut &quot; &amp; joe &apos; s u-bahn , ca. 3.5 m lang ."]
    assert english == ["a dog &apos;s ball ( red ) ."]
    assert moses.detokenised(english, "en") == ["a dog's ball (red)."]


def test_lines_with_fewer_references_score_as_if_they_had_no_more(tmp_path: Path) -> None:
    translations = ["ich gehe jetzt nach Hause .", "das ist ein gutes Haus", "wo bist du denn ?"]
    references = [
        ["ich gehe nun nach Hause .", "jetzt gehe ich nach Hause .", "ich gehe heim ."],
        ["das ist ein schönes Haus"],
        ["wo bist du ?", "wo sind Sie ?"],
    ]
    text = "".join("\t".join(line) + "\n" for line in references)
    (tmp_path / "test.allrefs.de.tsv.gz").write_bytes(gzip.compress(text.encode()))
    tatoeba = corpora.EXPERIMENTS[0]
    where = experiment.Setting(texts=tmp_path, work=tmp_path, budget=budget.Budget())
    found = experiment.FORMS["all references"](tatoeba, where, "test", translations)
    ragged = [[line[n] if n < len(line) else None for line in references] for n in range(3)]
    assert found["bleu"]["value"] == sacrebleu.corpus_bleu(translations, ragged).score
    assert found["chrf"]["value"] == sacrebleu.corpus_chrf(translations, ragged).score


def test_the_published_recipe_is_the_published_one() -> None:
    """What LividWo/Revisit-MMT's README-baseline.md passes to fairseq."""
    recipe = load_recipe("multi30k")
    assert recipe.network["d_model"] == 128 and recipe.network["feed_forward"] == 256
    assert recipe.network["encoder_layers"] == recipe.network["decoder_layers"] == 4
    assert (recipe.network["heads"], recipe.network["dropout"]) == (4, 0.3)
    assert (recipe.optim.lr, recipe.optim.warmup, recipe.optim.schedule) == (5e-3, 2000, "inverse_sqrt")
    assert recipe.batches.tokens * recipe.batches.accumulate == 2 * 4096
    assert recipe.training.steps == 8000 and recipe.training.keep_last == 10
    assert ("last", 10) in multi30k.EXPERIMENTS[0].averages and "5" in multi30k.EXPERIMENTS[0].search


@pytest.mark.parametrize("one", [*multi30k.EXPERIMENTS, *corpora.EXPERIMENTS], ids=lambda one: one.name)
def test_what_an_experiment_averages_is_kept(one: experiment.Experiment) -> None:
    training = load_recipe(one.recipe).training
    kept = {"best": training.keep_best, "last": training.keep_last}
    assert all(count <= kept[kind] for kind, count in one.averages)


def test_seeds_of_an_earlier_result_are_not_repeated(tmp_path: Path) -> None:
    one = multi30k.EXPERIMENTS[0]
    where = experiment.Setting(texts=tmp_path, work=tmp_path / "work", budget=budget.Budget())
    figures = {**experiment.identity(one, where), "seeds": [{"seed": 2, "tests": {}}]}
    (tmp_path / "earlier.json").write_text(json.dumps({"figures": figures}), encoding="utf-8")
    other = replace(where, settings=("optim.lr=1",))
    experiment.take_over(tmp_path / "earlier.json", one, other)
    assert not where.work.exists(), "it was of another recipe"
    experiment.take_over(tmp_path / "earlier.json", one, where)
    experiment.take_over(tmp_path / "none.json", one, where)
    assert experiment.run_seed(one, where, 2) == {"seed": 2, "tests": {}}


# ---------------------------------------------------------------------------------- the suite


def a_row(name: str, code: str, **options: Any) -> gpu_suite.Row:
    return gpu_suite.Row(name=name, measures=name, command=lambda place: ["-c", code], least=0, **options)


WRITES = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(exist_ok=True)
(out / "{}.json").write_text(json.dumps({{"figures": 1}}))
"""


def attempts(rows: list[gpu_suite.Row], tmp_path: Path, **options: Any) -> list[str]:
    """Which rows were run by another call of the suite."""
    state = gpu_suite.State(tmp_path / "suite.json")
    place = gpu_suite.Place(data=tmp_path, work=tmp_path, device="cpu", smoke=False)
    chosen = gpu_suite.to_do(rows, state, again=options.get("again", []))
    for row in chosen:
        gpu_suite.attempt(row, place, state, budget.Budget(60, grace=1))
    return [row.name for row in chosen]


def test_a_row_that_is_done_is_not_repeated(tmp_path: Path) -> None:
    broken = a_row("broken", "raise SystemExit('what is wrong')")
    later = a_row("later", "raise SystemExit(75)")
    rows = [broken, a_row("good", WRITES.format("good")), later]
    assert attempts(rows, tmp_path) == ["broken", "good", "later"]
    state = gpu_suite.State(tmp_path / "suite.json")
    assert state.of("good")["result"] == {"figures": 1}
    assert "what is wrong" in state.of("broken")["why"]
    assert [state.of(row.name)["status"] for row in rows] == ["failed", "done", "interrupted"]
    assert attempts(rows, tmp_path) == ["later", "broken"], "what failed must not keep others waiting"
    assert attempts(rows, tmp_path, again=["good"]) == ["good", "later", "broken"]


def test_a_row_that_hangs_does_not_take_the_time_of_the_others(tmp_path: Path) -> None:
    hangs = a_row("hangs", WRITES.format("hangs") + "import time; time.sleep(600)", most=5)
    attempts([hangs, a_row("good", WRITES.format("good"))], tmp_path)
    state = gpu_suite.State(tmp_path / "suite.json")
    assert state.of("hangs")["status"] == "failed" and "longer than 5 s" in state.of("hangs")["why"]
    assert state.of("hangs")["result"] == {"figures": 1}, "what it had written is kept"
    assert state.of("good")["status"] == "done"


def test_programs_that_measure_end_with_the_suite_and_may_not_take_all_of_its_time(tmp_path: Path) -> None:
    place = gpu_suite.Place(data=tmp_path, work=tmp_path, device="cuda", smoke=False)
    for row in gpu_suite.ROWS:
        if not row.corpus:
            assert "die_together()" in Path(row.command(place)[0]).read_text(encoding="utf-8"), row.name
            assert row.most < 1000 or row.name == "gpu-tests", row.name


def test_what_was_interrupted_comes_after_what_was_never_begun(tmp_path: Path) -> None:
    slow, fast = a_row("slow", "raise SystemExit(75)"), a_row("fast", WRITES.format("fast"))
    broken = a_row("broken", "raise SystemExit(1)")
    attempts([broken, slow], tmp_path)
    assert attempts([broken, slow, fast], tmp_path) == ["fast", "slow", "broken"]


def test_a_truncated_result_does_not_end_the_suite(tmp_path: Path) -> None:
    torn = WRITES.format("torn") + "(out / 'torn.json').write_text('{\"figures\": {\"speed\"')"
    assert attempts([a_row("torn", torn), a_row("good", WRITES.format("good"))], tmp_path) == ["torn", "good"]
    state = gpu_suite.State(tmp_path / "suite.json")
    assert state.of("torn")["status"] == "failed" and "cut off" in state.of("torn")["why"]
    assert state.of("good")["status"] == "done"
    (tmp_path / "suite.json").write_text('{"smoke": false, "rows": {"goo')
    assert gpu_suite.State(tmp_path / "suite.json").of("good")["status"] == "pending"
    assert (tmp_path / "suite.json.damaged").exists()


def test_probes_come_first_and_tests_last() -> None:
    names = [row.name for row in gpu_suite.ROWS]
    assert names[:4] == ["gpu-probes", "machine", "translate-kernels", "train-base"]
    assert names[-1] == "gpu-tests" and gpu_suite.ROWS[-1].paced


def test_a_result_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    provenance.record("speed", {"tokens": 1}, command="", folder=tmp_path)

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        provenance.record("speed", {"tokens": 2}, command="", folder=tmp_path)
    assert json.loads((tmp_path / "speed.json").read_bytes())["figures"] == {"tokens": 1}


FAMILY = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(600)
"""


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it took too long")


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_a_command_that_is_stopped_leaves_no_process_behind(tmp_path: Path) -> None:
    with pytest.raises(budget.OutOfTime):
        budget.Budget(4.0, grace=1.0).run(
            [sys.executable, "-c", FAMILY, str(tmp_path / "child")], log=tmp_path / "log", own_group=True
        )
    child = int((tmp_path / "child").read_text())
    wait_until(lambda: not is_running(child))


SUITE = """
import pathlib, sys
import budget
budget.stop_together()
spent = budget.Budget(600, grace=1)
folder = pathlib.Path(sys.argv[1])
try:
    spent.run([sys.executable, "-c", sys.argv[2], str(folder / "child")], log=folder / "log", own_group=True)
except budget.OutOfTime:
    (folder / "noted").touch()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_suite_that_is_stopped_ends_what_it_runs_and_notes_it(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-c", SUITE, str(tmp_path), FAMILY]
    suite = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT / "bench")})
    wait_until(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text() != "")
    suite.send_signal(number)
    assert suite.wait(30) == 0
    child = int((tmp_path / "child").read_text())
    wait_until(lambda: not is_running(child))
    assert (tmp_path / "noted").exists()


THREE_TESTS = """
import pathlib, pytest
def test_good(): pass
def test_bad(): assert pathlib.Path(__file__).with_name("mended").exists(), "not mended"
def test_left_out(): pytest.skip("no")
"""


def test_each_test_has_a_result_and_those_that_passed_are_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(THREE_TESTS)
    kept: list[dict[str, Any]] = []

    def run(before: dict[str, Any]) -> dict[str, Any]:
        kept.clear()
        options = [str(tmp_path / "test_three.py"), f"--rootdir={tmp_path}"]
        gpu_tests.run(options, before, budget.Budget(), lambda tests: kept.append(gpu_tests.summed_up(tests)))
        provenance.record("gpu-tests", kept[-1], command="", folder=tmp_path)
        return kept[-1]

    first = run({})
    assert (first["tests"], first["passed"], first["failures"], first["skipped"]) == (3, 1, 1, 1)
    [why] = first["failed"].values()
    assert "not mended" in why
    (tmp_path / "mended").touch()
    before = gpu_tests.earlier(tmp_path / "gpu-tests.json")
    assert sorted(test["outcome"] for test in before.values()) == ["passed", "skipped"]
    second = run(before)
    assert (second["passed"], second["failures"], second["skipped"]) == (2, 0, 1)
    (tmp_path / "gpu-tests.json").write_text('{"figures": {"each"')
    assert gpu_tests.earlier(tmp_path / "gpu-tests.json") == {}


def test_a_row_goes_on_from_what_the_state_has(tmp_path: Path) -> None:
    """Even where its folder is gone: the state alone went to another machine."""
    half = WRITES.format("half") + "sys.exit(75)"
    whole = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
assert json.loads((out / "half.json").read_text()) == {"figures": 1}, "handed back"
assert "--budget" in sys.argv
"""
    attempts([a_row("half", half, paced=True)], tmp_path)
    shutil.rmtree(tmp_path / "results")
    attempts([a_row("half", whole, paced=True)], tmp_path)
    assert gpu_suite.State(tmp_path / "suite.json").of("half")["status"] == "done"


def test_only_experiments_share_the_machine() -> None:
    rows = [a_row("slow", ""), a_row("one", "", paced=True), a_row("fast", ""), a_row("two", "", paced=True)]
    names = [[row.name for row in group] for group in gpu_suite.in_groups(rows, 2)]
    assert names == [["slow"], ["fast"], ["one", "two"]]
    assert gpu_suite.in_groups(rows, 1) == [[row] for row in rows]


def test_a_row_that_leaves_no_result_has_failed(tmp_path: Path) -> None:
    attempts([a_row("silent", "pass")], tmp_path)
    assert gpu_suite.State(tmp_path / "suite.json").of("silent")["status"] == "failed"


def test_a_row_without_its_corpus_says_so(tmp_path: Path) -> None:
    attempts([a_row("lost", "raise SystemExit(1)", corpus="tatoeba")], tmp_path)
    state = gpu_suite.State(tmp_path / "suite.json")
    assert state.of("lost")["status"] == "unavailable" and "tatoeba" in state.of("lost")["why"]
    (tmp_path / "tatoeba-en-de").mkdir()
    place = gpu_suite.Place(data=tmp_path, work=tmp_path, device="cpu", smoke=False)
    assert place.corpus("tatoeba") == tmp_path / "tatoeba-en-de"


def test_a_smoke_run_is_no_result(tmp_path: Path) -> None:
    state = gpu_suite.State(tmp_path / "suite.json", smoke=True)
    state.note(gpu_suite.ROWS[0], "done", result={"figures": {}})
    with pytest.raises(SystemExit, match="no figures"):
        gpu_suite.collect(state)
    with pytest.raises(SystemExit, match="another kind of run"):
        gpu_suite.State(tmp_path / "suite.json")


@pytest.mark.slow
def test_the_suite_runs_in_budgets_and_ends(tmp_path: Path) -> None:
    """Every program, tiny, on the CPU: stopped on the way, gone on with, and then there is nothing to do."""
    out = tmp_path / "out"
    # Rows that differ from another one in sizes alone, which are tiny here, are left out.
    rows = [row for row in gpu_suite.ROWS if row.name not in ("train-big", "multi30k-plus", "laws")]
    command = [sys.executable, str(ROOT / "bench" / "gpu_suite.py"), "--smoke", "--out", str(out)]
    command += ["--only", *(row.name for row in rows)]
    first = subprocess.run([*command, "--budget", "60s"], capture_output=True, text=True, check=False)
    assert first.returncode in (0, budget.AGAIN), first.stderr
    second = subprocess.run([*command, "--budget", "20m"], capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    state = json.loads((out / "suite.json").read_bytes())["rows"]
    missing = {row.name for row in rows if not all(map(find_spec, row.packages))}
    assert {name: row["status"] for name, row in state.items()} == {
        row.name: "unavailable" if row.name in missing else "done" for row in rows
    }
    before = (out / "suite.json").read_bytes()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert (out / "suite.json").read_bytes() == before


def test_tables_show_the_mean_and_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_tables, "RESULTS", tmp_path)
    assert all(quality_tables.WAITS in row for row in quality_tables.multi30k_rows()[1:])
    assert all(row[-1] == quality_tables.WAITS for row in quality_tables.gpu_rows([("machine", "")]))
    scores = {
        "published": {"bleu": {"name": "BLEU", "value": 0.0, "signature": "tok:none"}},
        "detokenised": {
            metric: {"name": metric, "value": 0.0, "signature": metric} for metric in ("bleu", "chrf")
        },
    }
    seeds = []
    for bleu in (40.0, 41.0, 43.5):
        tests = json.loads(json.dumps(dict.fromkeys(quality_tables.PUBLISHED, scores)))
        tests["test_2016_flickr"]["published"]["bleu"]["value"] = bleu
        seeds.append({"tests": tests, "dev_scores": scores})
    figures = {"experiment": {"forms": ["published", "detokenised"]}, "wanted": 3, "seeds": seeds}
    (tmp_path / "multi30k.json").write_text(json.dumps({"figures": figures}), encoding="utf-8")
    [row] = [row for row in quality_tables.multi30k_rows() if row[:2] == ("published recipe", "published")]
    assert row[3] == "41.50 (40.00–43.50)" and row[-1] == "3"
    figures["wanted"] = 5
    (tmp_path / "multi30k.json").write_text(json.dumps({"figures": figures}), encoding="utf-8")
    assert "3 of 5" in [row[-1] for row in quality_tables.multi30k_rows()]


def test_result_files_do_not_name_the_folders_of_the_machine() -> None:
    found = {"argv": ["--data", "/here/set", "/here/settle"], "run": "/here/set/run", "size": 3}
    names = {"/here/set": "DATA_SET"}
    expected = {"argv": ["--data", "DATA_SET", "/here/settle"], "run": "DATA_SET/run", "size": 3}
    assert provenance.without_places(found, names) == expected


@pytest.mark.parametrize("file", sorted(provenance.RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_result_files_say_where_they_come_from(file: Path) -> None:
    result = json.loads(file.read_bytes())
    assert all(result[name] for name in ("command", "cpu", "versions", "date", "commit"))
    assert not [word for word in words_of(result) if Path(word).is_absolute()]


def words_of(value: Any) -> list[str]:
    """All text in a result, wherever it stands."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [word for part in parts for word in words_of(part)]
    return value.split() if isinstance(value, str) else []
