"""What measures translation on a GPU: on the CPU, with a network of a few numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import budget
import gpu_suite
import gpu_translate
import gpu_translation_tables
from gpu_networks import TOY, Network, Size, random_sources
from translators import server
from translators.client import Engine, Failed
from translators.trmt_engine import TrmtEngine, batching
from trmt import console, registry
from trmt.decoding.graphs import GraphRunner


class Here:
    """Stands for an engine's process: the same answers, in this one."""

    def __init__(self, translator: Any, sentences: Path) -> None:
        self.translator, self.sentences = translator, json.loads(sentences.read_bytes())
        self.told = {"version": translator.version, "load_seconds": 0.0}

    def ask(self, *, calls: list[tuple[int, int]], how: dict[str, Any]) -> dict[str, Any]:
        parts = [self.sentences[begin:end] for begin, end in calls]
        told = server.run(self.translator, parts, server.How(**how), 0.0)
        return told | self.translator.more()

    def end(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _messages_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "say", console.say)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    made = Network("base", tmp_path_factory.mktemp("networks"), TOY)
    made.prepare()
    return made


def run(monkeypatch: pytest.MonkeyPatch, start: Callable[..., Any], *words: str) -> None:
    """The program with engines that are started otherwise."""
    monkeypatch.setattr(gpu_translate.Crew, "_started", start)
    monkeypatch.setattr(sys, "argv", ["gpu_translate.py", "base", "--smoke", "--device", "cpu", *words])
    gpu_translate.main()


def start_here(crew: gpu_translate.Crew, name: str, compute: str) -> Here:
    if name not in gpu_translate.OWN:
        raise Failed(f"there is no {name}")
    translator = TrmtEngine(str(crew.network.bundle), compute, 1, "cpu", name)
    return Here(translator, crew.network.sentences("ids"))


def never(*_: Any) -> Any:
    raise AssertionError("there is nothing left to measure")


def test_every_point_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--rounds", "2", "--work", str(tmp_path / "work"), "--out", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, never, *words, "--budget", "1s")
    assert stopped.value.code == budget.AGAIN
    run(monkeypatch, start_here, *words, "--points", "fp32/8/*")
    run(monkeypatch, start_here, *words)
    run(monkeypatch, never, *words)
    figures = json.loads((tmp_path / "translate-base.json").read_bytes())["figures"]
    assert "random" in figures["weights"] and "forced" in figures["translations"]
    assert set(figures["points"]) == set(map(str, gpu_translate.TOY_POINTS))
    sources = random_sources(TOY)
    for point in gpu_translate.TOY_POINTS:
        found = figures["points"][str(point)]
        for name in gpu_translate.OWN:
            one = found["engines"][name]
            assert one["target_tokens"] == sum(map(len, sources[: one["sentences"]]))
            assert one["target_tokens_per_second"] > 0 and len(one["rounds"]) == 2
        assert found["engines"]["graphs"]["graphs"] > 0 and found["engines"]["graphs"]["settled"]
        assert set(found["ratios"]) == {"direct"}
        failed = {name: one["failed"] for name, one in found["engines"].items() if "failed" in one}
        assert failed == (
            {name: f"there is no {name}" for name in gpu_translate.PEERS} if point.peers else {}
        )


def test_an_engine_that_dies_keeps_nobody_from_going_on(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(Here):
        asked = 0

        def ask(self, **what: Any) -> dict[str, Any]:
            self.asked += 1
            if self.asked > 4:
                raise Failed("out of memory")
            return super().ask(**what)

    def start(crew: gpu_translate.Crew, name: str, compute: str) -> Here:
        kind = Dying if name == "graphs" else Here
        return kind(TrmtEngine(str(network.bundle), compute, 1, "cpu", name), network.sentences("ids"))

    monkeypatch.setattr(gpu_translate.Crew, "_started", start)
    monkeypatch.setattr(sys, "argv", ["gpu_translate.py", "base", "--rounds", "3", "--seconds", "0"])
    given = gpu_translate.arguments()
    crew = gpu_translate.Crew(network, given)
    found = gpu_translate.measure(gpu_translate.TOY_POINTS[0], crew, given, most=TOY.sentences)
    assert found["engines"]["graphs"] == {"failed": "out of memory"}
    assert len(found["engines"]["direct"]["rounds"]) == 3 and not found["ratios"]
    assert [*crew.running] == [("direct", "fp32")]


class Scripted:
    """Takes so long for each sentence, and has so many graphs after each pass."""

    def __init__(self, each: float, graphs: list[int]) -> None:
        self.each, self.graphs, self.passes = each, graphs, []

    def ask(self, *, calls: list[tuple[int, int]], how: dict[str, Any]) -> dict[str, Any]:
        [(_, sentences)] = calls
        self.passes.append(sentences)
        return {"seconds": self.each * sentences, "graphs": self.graphs[len(self.passes) - 1]}


def test_warming_up_ends_when_nothing_new_is_recorded() -> None:
    engine = Scripted(0.01, [0, 3, 5, 5, 5])
    how = server.How(beam=4, batch=8)
    lane = gpu_translate.Lane(engine, how, most=1000, seconds=1.0)
    lane.warm_up()
    assert engine.passes == [32, 104, 104, 104], "whole batches, and one pass without a new graph"
    assert lane.warm["settled"] and lane.warm["warm_up_passes"] == 4


def test_warming_up_ends_though_it_never_settles() -> None:
    engine = Scripted(0.01, [*range(100)])
    lane = gpu_translate.Lane(engine, server.How(beam=4, batch=8), most=50, seconds=1.0)
    lane.warm_up()
    assert max(engine.passes) == 50 and not lane.warm["settled"]


def test_who_falls_back_says_so(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = GraphRunner.__init__

    def fallen_back(runner: GraphRunner, *arguments: Any) -> None:
        begin(runner, *arguments)
        runner._fall_back("of the weather")

    monkeypatch.setattr(GraphRunner, "__init__", fallen_back)
    translator = TrmtEngine(str(network.bundle), "fp32", 1, "cpu", "graphs")
    engine = Here(translator, network.sentences("ids"))
    lane = gpu_translate.Lane(engine, server.How(beam=2, batch=4, mirrored=True), most=8, seconds=0)
    lane.warm_up()
    lane.runs.append(lane.run())
    figures = lane.figures()
    assert figures["graphs"] == 0 and "of the weather" in figures["fell_back"]
    assert "fell back to direct" in gpu_translation_tables.speed(figures)


def test_a_batch_has_room_for_the_sentences_it_is_asked_for() -> None:
    assert batching(server.How(beam=1, batch=4096)).tokens >= 4096 * max(map(len, random_sources(TOY)))
    assert batching(server.How(beam=1, batch=32)).sentences == 32


def test_sources_are_as_long_as_they_should_be() -> None:
    size = Size(sentences=2000)
    sources = random_sources(size)
    lengths = [len(source) for source in sources]
    assert min(lengths) >= size.shortest and max(lengths) <= size.longest and len(lengths) == 2000
    assert 24 < sum(lengths) / len(lengths) < 30
    assert sources == random_sources(size)
    assert all(4 <= number < size.vocabulary for source in sources for number in source)


@pytest.mark.parametrize("name", ["ctranslate2", pytest.param("transformers", marks=pytest.mark.slow)])
def test_others_do_the_same_work(name: str, network: Network) -> None:
    """One sentence after the other they translate as we do; in batches all are as long as the longest."""
    pytest.importorskip(name)
    module = import_module(f"translators.{name}")
    kind = {"ctranslate2": "CTranslate2", "transformers": "Transformers"}[name]
    other = getattr(module, kind)(str(network.model(name)), "fp32", 1, "cpu")
    ours = TrmtEngine(str(network.bundle), "fp32", 1, "cpu", "direct")
    ids, pieces = (json.loads(network.sentences(kind).read_bytes())[:6] for kind in ("ids", "pieces"))
    how = server.How(beam=4, batch=1, mirrored=True)
    mine = dict(ours.translate(ids, how))
    side = ours.tokenizer.target
    assert dict(other.translate(pieces, how)) == {n: side.pieces(mine[n]) for n in mine}
    together = dict(other.translate(pieces, server.How(beam=2, batch=3, mirrored=True)))
    for numbers in server.neighbours(pieces, 3):
        assert {len(together[number]) for number in numbers} == {len(pieces[numbers[0]])}


def test_a_model_that_cannot_be_written_ends_nothing(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> Any:
        raise KeyError("a part that it has no more")

    monkeypatch.setattr(registry, "resolve", breaks)
    with pytest.raises(Failed, match="no more"):
        Network("big", network.work, TOY).model("transformers")


def test_a_process_that_ends_says_why(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="No module named"):
        Engine(Path(sys.executable), "nobody", [], threads=1, log=tmp_path / "log")


def test_speed_is_measured_alone() -> None:
    rows = [row for row in gpu_suite.ROWS if row.paced]
    groups = gpu_suite.in_groups(rows, 3)
    assert [row.name for group in groups[:2] for row in group] == ["translate-base", "translate-big"]
    assert len(groups[2]) == len(rows) - 3
    assert [row.name for row in groups[3]] == ["gpu-tests"] and len(groups) == 4


# ---------------------------------------------------------------------------------------- the table


def test_the_table_has_the_points_that_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_translation_tables, "RESULTS", tmp_path)
    assert set(gpu_translation_tables.POINTS) == set(map(str, gpu_translate.POINTS))
    assert set(gpu_translation_tables.NETWORKS) == set(gpu_translate.NETWORKS)
    pending = gpu_translation_tables.rows()
    assert len(pending) == 2 * len(gpu_translate.POINTS)
    assert all(row[4] == gpu_translation_tables.WAITS for row in pending)
    graphs = {
        "target_tokens_per_second": 45_678.9,
        "graphs": 7,
        "warm_up_seconds": 3.2,
        "peak_reserved_mib": 2048,
    }
    point = {
        "engines": {
            "graphs": graphs,
            "direct": {"failed": "out of memory"},
            "transformers": {"target_tokens_per_second": 4_000.0},
            "ctranslate2": {"failed": "install it"},
        },
        "ratios": {"transformers": {"median": 11.42, "interval": [10.0, 12.0]}},
    }
    result = {"gpu": "a card", "figures": {"points": {"bf16/32/beam": point}}}
    (tmp_path / "translate-base.json").write_text(json.dumps(result), encoding="utf-8")
    [row] = [row for row in gpu_translation_tables.rows() if row[4] != gpu_translation_tables.WAITS]
    assert row[1:4] == ("bf16", "32", "beam of 4") and row[4] == "45,679"
    assert row[6:9] == ("failed: out of memory", "11.4 (10.0–12.0)", "failed: install it")
    assert row[9:] == ("7", "2,048 MiB", "3 s")
    assert "45,679 at bf16/32/beam" in gpu_translation_tables.summary(result["figures"])
