"""What measures translation: its points, its calls, and an engine's process that is told what to do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

import translate
from tests.scripted import random_bundle, small_tokenizer
from translators.server import How


def test_points_are_chosen_by_pattern() -> None:
    every = translate.points_of(["*"], ["base", "deep"], 2)
    assert len(every) == len(set(map(str, every))) == 2 * 2 * 4 * 2 * 2
    some = translate.points_of(["base/fp32/16/*/1", "deep/int8/whole/beam/2"], ["base", "deep"], 2)
    assert [*map(str, some)] == ["base/fp32/16/greedy/1", "base/fp32/16/beam/1", "deep/int8/whole/beam/2"]


def test_calls_have_as_many_sentences_as_the_point_says() -> None:
    network = translate.Network(Path(), [["a"]] * 70, [], 0)
    point = translate.Point("base", "fp32", "16", "greedy", 1)
    assert translate.calls_of(point, network) == [(0, 16), (16, 32), (32, 48), (48, 64)]
    whole = translate.Point("base", "fp32", "whole", "greedy", 1)
    assert translate.calls_of(whole, network) == [(0, 70)]


def test_a_power_of_the_length_changes_as_the_penalty_does() -> None:
    network = translate.Network(Path(), [["a"] * 15], [], 0)

    def penalty(length: float) -> float:
        return ((5 + length) / 6) ** translate.PENALTY

    # A longer translation is favoured as much by one as by the other.
    assert (16 / 15) ** network.power == pytest.approx(penalty(16) / penalty(15), abs=2e-3)


def test_limits_are_the_same_for_everyone() -> None:
    assert How(beam=1, batch=1).limit(["a"] * 7) == 57
    assert How(beam=1, batch=1, forced=30).limit(["a"] * 7) == 30


def test_a_point_is_measured(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path / "text")
    random_bundle(tmp_path / "bundle", tokenizer)
    texts = ["Where can I buy a ticket?", "It rains.", "The river is high.", "One more."]
    for name in ("source", "reference"):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in texts))
    network = translate.trained_network(*(tmp_path / name for name in ("bundle", "source", "reference")))
    given = argparse.Namespace(engines=["trmt", "ctranslate2"], peers=None, pairs=2, seconds=0.01)
    point = translate.Point("trained", "fp32", "2", "greedy", 1)
    (tmp_path / "sentences.json").write_text(json.dumps(network.sentences))
    engines, failed = translate.started(given, network, point, tmp_path)
    assert list(engines) == ["trmt"] and not failed
    try:
        engines["trmt"].ask(sentences=str(tmp_path / "sentences.json"))
        found = translate.measure(point, network, engines, given)
        forced = engines["trmt"].ask(calls=[(0, 4)], how={"beam": 2, "batch": 4, "forced": 9}, show=True)
    finally:
        engines["trmt"].end()
    ours = found["engines"]["trmt"]
    assert ours["target_tokens"] > 0 and ours["seconds"] > 0 and ours["first_seconds"] <= ours["seconds"]
    assert ours["chrf"]["sentences"] == 2 * found["calls"]
    assert [len(pieces) for pieces in forced["translations"]] == [9] * 4
    assert forced["target_tokens"] == 36
