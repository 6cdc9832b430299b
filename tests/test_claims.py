"""The claims: their rule judges as it says, what they ask for is measured, what is done is kept."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

import lineage
from claims import computed, figures, page, sayings, systems, texts, verdicts
from claims.run import RESULT, place_of
from claims.scale import SCALES
from claims.verdicts import CANNOT_TELL, CONFIRMED, NOT_CONFIRMED, PENDING, Contrast

ROOT = Path(__file__).resolve().parent.parent

TOY = SCALES["toy"]


def contrast(**changes: Any) -> Contrast:
    usual: dict[str, Any] = {"asks": "a against b", "terms": ((1, "a"), (-1, "b")), "margin": 2.0}
    return Contrast(**{**usual, "unit": "BLEU", **changes})


def values(*found: float) -> dict[int, float]:
    return dict(enumerate(found, 1))


# ------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("expects", "above", "verdict"),
    [
        ("more", (10.0, 11.0, 12.0), CONFIRMED),  # 11 +- 2.5
        ("more", (0.1, 0.2, 0.3), NOT_CONFIRMED),  # nothing worth talking about
        ("more", (-10.0, -11.0, -12.0), NOT_CONFIRMED),
        ("more", (-3.0, 3.0, 9.0), CANNOT_TELL),
        ("same", (-0.1, 0.0, 0.1), CONFIRMED),
        ("same", (10.0, 11.0, 12.0), NOT_CONFIRMED),
        ("same", (-10.0, -11.0, -12.0), NOT_CONFIRMED),
        ("same", (-3.0, 0.0, 3.0), CANNOT_TELL),
        ("more", (10.0, 11.0), PENDING),  # too few seeds
        ("more", (), PENDING),
    ],
)
def test_a_verdict_follows_from_the_interval(expects: Any, above: tuple[float, ...], verdict: str) -> None:
    evidence = {"a": {seed: 50 + value for seed, value in values(*above).items()}, "b": values(50, 50, 50)}
    assert verdicts.judged(contrast(expects=expects), evidence).verdict == verdict


def test_what_systems_of_a_seed_share_cancels_out() -> None:
    evidence = {"a": values(11, 52, 91, 33), "b": values(1, 41, 82)}  # the fourth has nothing to compare with
    judged = verdicts.judged(contrast(), evidence)
    assert judged.values == (10, 11, 9) and judged.verdict == CONFIRMED
    # By hand: 4.303 times the deviation of 1, by the root of 3.
    assert judged.low == pytest.approx(10 - 2.4843, abs=1e-3)
    assert judged.high == pytest.approx(10 + 2.4843, abs=1e-3)


def test_the_interval_is_students() -> None:
    """Between -t and t lies 95 % of the density, summed up in small steps."""
    for degrees, t in enumerate(verdicts.STUDENT, 1):
        scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
        places = [t * (step + 0.5) / 5000 for step in range(5000)]
        inside = 2 * sum(scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2) * t / 5000 for x in places)
        assert inside == pytest.approx(0.95, abs=1e-4)


def test_factors_are_judged_as_factors() -> None:
    evidence = {"a": values(200, 210, 190), "b": values(100, 105, 95)}
    judged = verdicts.judged(contrast(unit="times", margin=1.1, at_least=1.5), evidence)
    assert judged.verdict == CONFIRMED and judged.mean == pytest.approx(2)
    asked = contrast(unit="times", margin=1.1, at_least=2.5)
    assert verdicts.judged(asked, evidence).verdict == NOT_CONFIRMED
    asked = contrast(unit="times", margin=1.1, expects="same")
    assert verdicts.judged(asked, {"a": evidence["a"], "b": values(201, 209, 190)}).verdict == CONFIRMED
    nothing = verdicts.judged(contrast(unit="times", margin=1.1), {"a": values(0, 0, 0), "b": evidence["b"]})
    assert nothing.verdict == NOT_CONFIRMED and nothing.mean is not None and nothing.mean > 0


def test_an_exact_value_needs_no_seeds() -> None:
    asked = contrast(terms=((1, "a"),), expects="same", margin=1e-9, unit="")
    assert verdicts.judged(asked, {"a": {0: 1e-12}}).verdict == CONFIRMED
    assert verdicts.judged(asked, {"a": {0: 1e-3}}).verdict == NOT_CONFIRMED
    assert verdicts.judged(asked, {"a": {1: 1e-12}}).verdict == PENDING  # one seed is no exact value


# ------------------------------------------------------------------- claims, systems, texts


def test_claims_ask_only_for_what_is_measured() -> None:
    """By name: a slip in a name would leave a claim pending for ever."""
    scale = SCALES["phrasebook"]
    lengths = {"all", *map(str, (*scale.shorter, *scale.longer))}
    timed = re.compile(r"(train|translate|memory)/(.*)/(\d+)")
    exact = computed.values()
    for claim in sayings.claims(scale):
        assert not claim.figure or claim.figure in figures.PICTURES
        for _, name in (term for asked in claim.contrasts for term in asked.terms):
            if match := timed.fullmatch(name):
                assert match[2] in {*lineage.speed.SYSTEMS, "as written"}
                known = lineage.speed.MEMORY if match[1] == "memory" else scale.lengths
                assert int(match[3]) in known
            elif name not in exact:
                kind, system, *what = name.split("/")
                assert system in systems.BY_NAME and kind in ("bleu", "nll", "parameters")
                assert not what or what[0] in lengths


def test_systems_differ_in_what_they_say() -> None:
    scale = SCALES["phrasebook"]
    recipes = [json.dumps(systems.recipe(one, scale, seed=1, device="cpu")) for one in systems.ALL]
    starts = [(recipe, one.start, one.data) for recipe, one in zip(recipes, systems.ALL, strict=True)]
    assert len(set(starts)) == len(systems.ALL)
    assert len({one.title for one in systems.ALL}) == len(systems.ALL) == len(systems.BY_NAME)


def test_texts_of_a_seed_are_the_same_and_held_out(tmp_path: Path) -> None:
    for place, seed in (("one", 1), ("again", 1), ("two", 2)):
        texts.write(tmp_path / place, TOY, seed, None)
    sources, targets = texts.read(tmp_path / "one", "train")
    assert len(sources) == len(targets) == TOY.examples
    assert texts.read(tmp_path / "again", "train") == (sources, targets)
    assert texts.read(tmp_path / "two", "train") != (sources, targets)
    little = texts.read(tmp_path / "one", "little")[0]
    assert little == sources[: TOY.little]
    known = set(re.findall(r"[^.?]+[.?]", " ".join(sources)))
    for sentences in (*TOY.shorter, *TOY.longer):
        tests, _ = texts.read(tmp_path / "one", texts.name_of(sentences))
        assert len(tests) == TOY.tests
        assert not known & {each for line in tests for each in re.findall(r"[^.?]+[.?]", line)}


def test_texts_of_a_corpus_are_its_own_sentences(tmp_path: Path) -> None:
    for name in ("train", *texts.HELD_OUT):
        for language in texts.LANGUAGES:
            lines = "".join(f"{name}-{language}-{number}\u2028\n" for number in range(9))
            (tmp_path / f"{name}.{language}").write_text(lines, encoding="utf-8")
    corpus = SCALES["multi30k"].__class__(
        **{**{name: getattr(TOY, name) for name in TOY.__dataclass_fields__}, "templates": 0}
    )
    texts.write(tmp_path / "out", corpus, 1, tmp_path)
    sources, targets = texts.read(tmp_path / "out", "train")
    assert [line.replace("-en-", "-de-") for line in sources] == targets
    longest, _ = texts.read(tmp_path / "out", texts.name_of(TOY.longer[0]))
    assert all(line.count("test_") == TOY.longer[0] for line in longest)


# --------------------------------------------------------------------------------- computed


def test_what_is_computed_is_near_nothing_where_it_should_be() -> None:
    found = computed.values()
    assert found["shift-residual"] < 1e-12 and found["feed-forward-difference"] < 1e-12
    assert found["table-difference"] < 1e-4, "the table that networks use is the one that is spoken of"
    assert found["shift-residual-of-sines"] < 1e-9 < 0.5 < found["shift-residual-of-chance"]


def test_no_matrix_but_the_right_one_shifts() -> None:
    table = computed.sines(16)
    assert (table[:-3] @ computed.turn(3, 16).T - table[3:]).abs().max() < 1e-12
    assert (table[:-3] @ computed.turn(4, 16).T - table[3:]).abs().max() > 0.1
    assert torch.allclose(computed.turn(3, 16) @ computed.turn(4, 16), computed.turn(7, 16))


def test_memory_of_a_formula_is_counted() -> None:
    """Four heads of n x n scores; softmax and the product with values keep them once."""
    small, large = (lineage.speed.kept_as_written(length, 16, "cpu") for length in (64, 128))
    assert large - 4 * 128 * 128 * 4 < 4 * (128 * 16) * 4 * 2
    assert 3 < large / small < 4


# ------------------------------------------------------------------------------ page, figures


def made_up(seeds: int = 3) -> dict[str, Any]:
    """A result in which every system with a longer name is a little better."""
    runs = []
    for seed in range(1, seeds + 1):
        for system in systems.ALL:
            score = {"bleu": 20.0 + 2 * len(system.name) + seed / 7, "chrf": 1.0, "exact": 0.0, "nll": 0.5}
            tests = {str(n): {"words": 7.0 * n, **score} for n in (*TOY.shorter, *TOY.longer)}
            training = {"parameters": 1000, "seconds": 2.5, "curve": [[1, 2.5], [2, 1.5]]}
            runs.append({"system": system.name, "seed": seed, "training": training})
            if system.family != "masked":
                runs[-1] |= {"all": score, "lengths": tests}
    found = {"scale": "toy", "seeds": seeds, "runs": runs, "speed": {}, "computed": computed.values()}
    return {"figures": lineage.with_verdicts(found)}


def test_the_page_says_what_the_result_says() -> None:
    found = made_up()
    text = page.sections(found)
    for claim in sayings.claims(TOY):
        verdict = found["figures"]["claims"][claim.name][0]["verdict"]
        assert f"**{claim.title}: {verdict}.**" in text
    # fixed-every has 6 letters more than fixed, at every seed.
    assert "At every step versus once: +12.0 BLEU, confirmed." in text
    assert PENDING not in [
        row[1] for row in page.overview(found, None)[1] if row[0].startswith("Context vector")
    ]
    few = made_up(seeds=2)
    assert "**Context vector at every step: pending.**" in page.sections(few)
    assert "pending, 2 of 2 seeds" in page.sections(few)


def test_pictures_can_be_drawn_of_much_and_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name, found in (("much", made_up()), ("nothing", made_up(seeds=0))):
        figures.draw(found["figures"], tmp_path / name)
        for picture in figures.PICTURES:
            drawn = (tmp_path / name / f"{picture}.svg").read_text(encoding="utf-8")
            ElementTree.fromstring(drawn)
            assert "prefers-color-scheme: dark" in drawn
            plain = [used for used in re.findall(r"(?:fill|stroke): (#\w+)", drawn) if used != "#000000"]
            assert not plain, "a colour that does not follow the page"
            assert (">pending<" in drawn) == (name == "nothing" and bool(figures.PICTURES[picture].rows))


def test_pictures_are_drawn_of_the_result_that_there_is() -> None:
    found = page.result()
    assert found, "there is no bench/results/lineage.json"
    for name in figures.PICTURES:
        drawn = (figures.DOCS / f"{name}.svg").read_text(encoding="utf-8")
        assert figures.digest(found["figures"]) in drawn, "run: python bench/claims/figures.py"


# ------------------------------------------------------------------------------- the program


def bench(*words: str, work: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "lineage.py"), "--scale", "toy", "--seeds", "1"]
    place = ["--work", str(work), "--out", str(work / "out")]
    return subprocess.run([*command, *place, *words], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_it_runs_run_by_run_and_ends(tmp_path: Path) -> None:
    """Tiny, on the CPU: one run, then the others, of which one begins with another's network."""
    wanted = ["--only", "fixed", "bert", "little-bert"]
    first = bench("--runs", "1", "--part", "runs", *wanted, work=tmp_path)
    assert first.returncode == 75, first.stderr
    assert [run["system"] for run in read(tmp_path)["runs"]] == ["fixed"]
    made = place_of(tmp_path, "fixed", 1) / RESULT
    before = made.stat().st_mtime_ns
    second = bench(*wanted, work=tmp_path)
    assert second.returncode == 0, second.stderr
    found = read(tmp_path)
    assert [run["system"] for run in found["runs"]] == ["fixed", "bert", "little-bert"]
    assert made.stat().st_mtime_ns == before, "what is done is not repeated"
    assert found["speed"] and all(len(rounds) in (1, TOY.rounds) for rounds in found["speed"].values())
    fixed = found["runs"][0]
    assert set(fixed["lengths"]) == {"1", "2", "3"} and fixed["training"]["steps"] == TOY.steps
    assert found["claims"]["shift"][0]["verdict"] == CONFIRMED
    third = bench(*wanted, work=tmp_path)
    assert third.returncode == 0 and "done" not in third.stderr


def read(work: Path) -> dict[str, Any]:
    return json.loads((work / "out" / "lineage-toy.json").read_bytes())["figures"]


def test_runs_of_an_earlier_result_are_taken_over(tmp_path: Path) -> None:
    runs = [{"system": name, "seed": 2} for name in ("fixed", "bert")]
    (tmp_path / "earlier.json").write_text(json.dumps({"figures": {"runs": runs}}), encoding="utf-8")
    lineage.take_over(tmp_path / "earlier.json", tmp_path / "work")
    lineage.take_over(tmp_path / "none.json", tmp_path / "work")
    done = {name: lineage.done(tmp_path / "work", (systems.BY_NAME[name], 2)) for name in ("fixed", "bert")}
    assert done == {"fixed": True, "bert": False}, "others begin with BERT's network, which is gone"
