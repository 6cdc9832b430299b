from __future__ import annotations

import os
import subprocess
import sys
import threading
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from tests import toy
from trmt.errors import ConfigError, DataError
from trmt.sets.batches import BatchConfig, Batches, Examples, Position, halves
from trmt.sets.resampling import resample_with
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer


@pytest.fixture
def data(toy_set: Path) -> PreparedSet:
    return PreparedSet.open(toy_set)


def batches(data: PreparedSet, *, seed: int = 1, **options: Any) -> Batches:
    return Batches(data, BatchConfig(**{"tokens": 120, **options}), seed=seed)


def flat(plan: list[list[Any]]) -> list[int]:
    return [int(pair) for step in plan for batch in step for pair in batch]


def same_examples(first: Examples, second: Examples) -> bool:
    return all(
        np.array_equal(first.columns[name].ids, second.columns[name].ids)
        and np.array_equal(first.columns[name].lengths, second.columns[name].lengths)
        for name in first.columns
    )


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_pair_comes_once_in_an_epoch(data: PreparedSet, epoch: int) -> None:
    plan = batches(data).plan(epoch)
    assert sorted(flat(plan)) == list(range(len(data.split("train"))))


def test_no_batch_is_over_the_budget_unless_it_is_a_single_pair(data: PreparedSet) -> None:
    some = batches(data, tokens=14)
    sizes = [(len(b), len(b) * int(some.lengths[b].max())) for step in some.plan(0) for b in step]
    assert all(cost <= 14 or count == 1 for count, cost in sizes)
    assert any(cost > 14 for _, cost in sizes), "the budget is meant to be too small for some pairs"
    assert any(count > 1 for count, _ in sizes)


def test_steps_hold_as_many_batches_as_are_accumulated(data: PreparedSet) -> None:
    plan = batches(data, accumulate=3).plan(0)
    assert {len(step) for step in plan[:-1]} == {3}
    assert 1 <= len(plan[-1]) <= 3


def test_the_plan_depends_on_seed_and_epoch_alone(data: PreparedSet) -> None:
    first, second = batches(data), batches(data)
    second.plan(5)
    assert flat(first.plan(2)) == flat(second.plan(2))
    assert flat(first.plan(2)) != flat(first.plan(3))
    assert flat(first.plan(2)) != flat(batches(data, seed=2).plan(2))


def fake_set(source: np.ndarray, target: np.ndarray) -> PreparedSet:
    """A set of which nothing but the lengths is ever asked."""
    lengths = {"source.ids": source, "target.ids": target}

    class Split:
        def __len__(self) -> int:
            return len(source)

        def lengths(self, name: str) -> np.ndarray:
            return lengths[name]

    return cast(
        PreparedSet,
        SimpleNamespace(kind="pairs", split=lambda name: Split(), corpus_weights=np.ones(1), folder="fake"),
    )


def test_padding_wastes_little() -> None:
    # Sentence lengths in pieces are about log-normal, those of a pair alike but far from equal.
    generator = np.random.default_rng(0)
    source = np.clip(generator.lognormal(3.1, 0.6, 50_000), 1, 250).astype(np.int32)
    target = np.clip(source * generator.lognormal(0.05, 0.2, 50_000), 1, 250).astype(np.int32)
    some = batches(fake_set(source, target), tokens=4096)
    real = int((source + target + 2).sum())
    grid = sum(
        len(b) * (int(source[b].max()) + int(target[b].max()) + 2) for step in some.plan(0) for b in step
    )
    assert 1 - real / grid < 0.15


def test_started_anywhere_it_continues_alike(data: PreparedSet) -> None:
    per_epoch = len(batches(data).plan(0))
    count = per_epoch + 5
    whole = list(islice(batches(data).steps(Position(0, 0)), count))
    for begin in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        position = whole[begin - 1][0]
        rest = list(islice(batches(data).steps(position), count - begin))
        assert [after for after, _ in rest] == [after for after, _ in whole[begin:]]
        for (_, ours), (_, theirs) in zip(rest, whole[begin:], strict=True):
            assert all(same_examples(one, other) for one, other in zip(ours, theirs, strict=True))


def test_the_position_counts_epochs_and_steps(data: PreparedSet) -> None:
    per_epoch = len(batches(data).plan(0))
    after = [position for position, _ in islice(batches(data).steps(Position(0, 0)), per_epoch + 1)]
    assert after[:2] == [Position(0, 1), Position(0, 2)]
    assert after[-2:] == [Position(1, 0), Position(1, 1)]


def test_batches_hold_the_ids_of_their_pairs(data: PreparedSet) -> None:
    some = batches(data)
    numbers = some.plan(0)[0][0]
    ids, lengths = data.split("train").gather("target.ids", numbers)
    column = some.load(numbers).columns["target.ids"]
    assert np.array_equal(column.ids, ids)
    assert np.array_equal(column.lengths, lengths)


def test_whole_is_every_pair_once(data: PreparedSet) -> None:
    total = int(data.split("train").lengths("target.ids").sum())
    parts = list(batches(data).whole())
    assert sum(len(part) for part in parts) == len(data.split("train"))
    assert sum(len(part.columns["target.ids"].ids) for part in parts) == total


@pytest.mark.parametrize(("weight", "least", "most"), [("@2", 2, 2), ("@2.5", 2, 3), ("@0.25", 0, 1)])
def test_corpus_weights_repeat_and_leave_out(tmp_path: Path, weight: str, least: int, most: int) -> None:
    data = PreparedSet.open(toy.make_set(tmp_path, weight=weight))
    count = len(data.split("train"))
    weighted = data.split("train").scalars("corpus", np.arange(count)) == 0
    some = batches(data)
    epochs = [np.bincount(flat(some.plan(epoch)), minlength=count) for epoch in range(8)]
    for times in epochs:
        assert set(times[~weighted].tolist()) == {1}
        assert set(times[weighted].tolist()) == set(range(least, most + 1))
    mean = np.mean([times[weighted].mean() for times in epochs])
    assert mean == pytest.approx(float(weight[1:]), abs=0.1)


def test_an_error_in_the_thread_reaches_the_consumer(
    data: PreparedSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = batches(data)
    load, calls = some.load, iter(range(100))

    def failing(pairs: Any, *, seed: tuple[int, ...] = ()) -> Examples:
        if next(calls) == 3:
            raise DataError("the disk is gone")
        return load(pairs, seed=seed)

    monkeypatch.setattr(some, "load", failing)
    steps = some.steps(Position(0, 0))
    assert len([next(steps) for _ in range(3)]) == 3
    with pytest.raises(DataError, match="the disk is gone"):
        next(steps)


def test_the_thread_ends_when_nobody_listens(data: PreparedSet) -> None:
    def readers() -> int:
        return sum(thread.name == "trmt-batches" for thread in threading.enumerate())

    before = readers()
    steps = batches(data).steps(Position(0, 0))
    next(steps)
    assert readers() == before + 1
    steps.close()  # type: ignore[attr-defined]
    assert readers() == before


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_subword_sampling_is_keyed_by_position_and_keeps_the_text(tmp_path: Path, kind: str) -> None:
    data = PreparedSet.open(toy.make_set(tmp_path, kind=kind))
    tokenizer = Tokenizer.load(data.tokenizer_folder)

    def sampled() -> Batches:
        return Batches(
            data,
            BatchConfig(tokens=120, subword_alpha=0.3),
            seed=1,
            resample=resample_with(tokenizer, 0.3, 1000),
        )

    whole = list(islice(sampled().steps(Position(0, 0)), 6))
    resumed = list(islice(sampled().steps(whole[2][0]), 3))
    assert all(
        same_examples(ours[0], theirs[0]) for (_, ours), (_, theirs) in zip(resumed, whole[3:], strict=True)
    )
    plain = list(islice(batches(data).steps(Position(0, 0)), 6))

    def texts(examples: Examples, name: str) -> list[str]:
        column = examples.columns[name]
        return [
            tokenizer.target.decode(ids.tolist())
            for ids in np.split(column.ids, np.cumsum(column.lengths)[:-1])
        ]

    for name in ("source.ids", "target.ids"):
        assert [texts(s[0], name) for _, s in whole] == [texts(p[0], name) for _, p in plain]
    assert not all(same_examples(s[0], p[0]) for (_, s), (_, p) in zip(whole, plain, strict=True))
    again = sampled().load(sampled().plan(0)[0][0], seed=(1, 0, 0))
    assert not same_examples(again, whole[0][1][0]), "another epoch draws other pieces"


def test_every_step_draws_anew(data: PreparedSet) -> None:
    seeds: list[int] = []

    def recorded(name: str, column: Any, seed: int) -> Any:
        seeds.append(seed)
        return column

    some = Batches(data, BatchConfig(tokens=120, accumulate=2), seed=1, resample=recorded)
    steps = len(some.plan(0)) + 3
    list(islice(some.steps(Position(0, 0)), steps))
    assert len(seeds) >= 3 * steps
    assert len(set(seeds)) == len(seeds), "no epoch, step, batch or side shares its seed with another"


SAMPLE = """
import sys
from pathlib import Path
from trmt.text.tokenizer import Tokenizer
side = Tokenizer.load(Path(sys.argv[1])).source
print(side.sample(side.encode(["ka lomo ti saru ne hikado mi"] * 20), alpha=0.3, seed=7))
"""


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_subword_sampling_is_the_same_in_another_process(tmp_path: Path, kind: str) -> None:
    folder = PreparedSet.open(toy.make_set(tmp_path, kind=kind)).tokenizer_folder
    drawn = {
        subprocess.run(
            [sys.executable, "-c", SAMPLE, str(folder)],
            capture_output=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": str(hash_seed)},
        ).stdout
        for hash_seed in range(3)
    }
    assert len(drawn) == 1


def test_halves_and_parts_lose_nothing(data: PreparedSet) -> None:
    some = batches(data)
    examples = some.load(some.plan(0)[0][0][:7])
    for cuts in ([0, 3, 7], [0, 1, 2, 7]):
        parts = [examples.part(begin, end) for begin, end in pairwise(cuts)]
        for name, column in examples.columns.items():
            assert np.array_equal(np.concatenate([part.columns[name].ids for part in parts]), column.ids)
            assert np.array_equal(
                np.concatenate([part.columns[name].lengths for part in parts]), column.lengths
            )
    assert [len(half) for half in halves(examples)] == [3, 4]


def test_weights_that_leave_nothing_are_said(data: PreparedSet) -> None:
    data.__dict__["corpus_weights"] = np.zeros(2)
    with pytest.raises(DataError, match="raise them"):
        batches(data).plan(0)


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"accumulate": 0}, {"subword_alpha": 1.0}])
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        BatchConfig(**wrong)


def lognormal_lengths(count: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    source = np.clip(generator.lognormal(3.1, 0.6, count), 1, 250).astype(np.int32)
    return source, np.clip(source * generator.lognormal(-0.2, 0.2, count), 1, 250).astype(np.int32)


def in_a_row(data: PreparedSet, **options: Any) -> Batches:
    return Batches(data, BatchConfig(**{"tokens": 120, **options}), seed=1, in_row=True)


@pytest.mark.parametrize("epoch", [0, 3])
def test_in_a_row_every_pair_comes_once_too(data: PreparedSet, epoch: int) -> None:
    plan = in_a_row(data).plan(epoch)
    assert sorted(flat(plan)) == list(range(len(data.split("train"))))
    assert flat(plan) == flat(in_a_row(data).plan(epoch))
    assert flat(plan) != flat(in_a_row(data).plan(epoch + 1))


def test_in_a_row_batches_fill_their_room_and_fit_into_it() -> None:
    source, target = lognormal_lengths(50_000)
    some = in_a_row(fake_set(source, target), tokens=8192)
    room = some.room
    assert room is not None
    assert max(room.source, room.target) == 8192
    batches = [batch for step in some.plan(0) for batch in step]
    for batch in batches:
        assert int(source[batch].sum()) + len(batch) <= room.source
        assert int(target[batch].sum()) + len(batch) <= room.target
        assert len(batch) <= room.sentences - 1
    real = int(source.sum() + target.sum()) + 2 * len(source)
    assert real / (len(batches) * (room.source + room.target)) > 0.95, "padding wastes less than 5 %"


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_of_batches_fit_into_parts_of_their_room(parts: int) -> None:
    source, target = lognormal_lengths(20_000)
    some = in_a_row(fake_set(source, target), tokens=8192)
    assert some.room
    room = some.room.part(parts)
    assert room.source < some.room.source / parts + 3 * room.longest
    fits = []
    for batch in (batch for step in some.plan(0) for batch in step):
        for part in (batch[rank::parts] for rank in range(parts)):
            sums = [int(side[part].sum()) + len(part) for side in (source, target)]
            fits.append(sums[0] <= room.source and sums[1] <= room.target)
            assert len(part) < room.sentences
    assert sum(fits) > 0.98 * len(fits), "what does not fit is a shape of its own"


def test_what_is_drawn_fits_into_the_room(tmp_path: Path) -> None:
    folder = toy.make_set(tmp_path)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    resample = resample_with(tokenizer, 0.15, longest=1000)
    config = BatchConfig(tokens=400, subword_alpha=0.15)
    some = Batches(PreparedSet.open(folder), config, seed=1, in_row=True, resample=resample)
    assert some.room
    fits = []
    for _, [examples] in islice(some.steps(Position(0, 0)), 20):
        sides = [len(examples) + len(column.ids) for column in examples.columns.values()]
        fits.append(sides[0] <= some.room.source and sides[1] <= some.room.target)
    assert sum(fits) > 15, "most batches are of the one shape that the network is compiled for"


def test_in_a_row_a_pair_over_the_budget_stands_alone() -> None:
    source = np.array([3, 500, 4, 2, 700, 1], np.int32)
    some = in_a_row(fake_set(source, source), tokens=20)
    alone = [batch.tolist() for step in some.plan(0) for batch in step if source[batch].max() > 20]
    assert sorted(alone) == [[1], [4]]


def test_networks_that_pad_get_no_room(data: PreparedSet) -> None:
    assert batches(data).room is None


def test_in_a_row_the_window_in_which_batches_are_cut_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, target = lognormal_lengths(3_000)
    whole = in_a_row(fake_set(source, target), tokens=500).plan(0)
    monkeypatch.setattr("trmt.sets.batches.WINDOW", 64)
    cut = in_a_row(fake_set(source, target), tokens=500).plan(0)
    assert [batch.tolist() for step in cut for batch in step] == [
        batch.tolist() for step in whole for batch in step
    ]


def test_lengths_that_need_more_than_two_bytes_are_kept() -> None:
    source = np.array([70_000, 3, 65_535, 65_534], np.int32)
    some = in_a_row(fake_set(source, source[::-1].copy()), tokens=100_000)
    assert some.lengths.tolist() == [70_001, 65_536, 65_536, 70_001]
    assert sorted(flat(some.plan(0))) == [0, 1, 2, 3]


def test_shares_are_all_pairs_alike_in_length(data: PreparedSet) -> None:
    batches = Batches(data, BatchConfig(tokens=300), seed=1)
    for pairs in (batches.plan(0)[0][0], batches.plan(0)[0][0][:2]):
        whole = batches.load(pairs)
        for size in (1, 2, 3, 7):
            shares = [whole.share(rank, size) for rank in range(size)]
            for rank, share in enumerate(shares):
                assert len(share) == len(range(rank, len(pairs), size))
                expected = batches.load(pairs[rank::size]) if len(share) else whole.part(0, 0)
                for name, column in share.columns.items():
                    assert column.ids.tolist() == expected.columns[name].ids.tolist()
                    assert column.lengths.tolist() == expected.columns[name].lengths.tolist()
