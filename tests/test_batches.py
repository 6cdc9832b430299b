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
from trmt.sets.batches import BatchConfig, Batches, DataPosition, RaggedBatch
from trmt.sets.shards import PreparedSet
from trmt.sets.subword_sampling import subword_resampler
from trmt.text.tokenizer import Tokenizer


@pytest.fixture
def data(toy_set: Path) -> PreparedSet:
    return PreparedSet.open(toy_set)


def batches(data: PreparedSet, *, seed: int = 1, **options: Any) -> Batches:
    return Batches(data, BatchConfig(**{"tokens": 120, **options}), seed=seed)


def flat(plan: list[list[Any]]) -> list[int]:
    return [int(pair) for step in plan for batch in step for pair in batch]


def same_examples(first: RaggedBatch, second: RaggedBatch) -> bool:
    return all(
        np.array_equal(first.columns[name].values, second.columns[name].values)
        and np.array_equal(first.columns[name].lengths, second.columns[name].lengths)
        for name in first.columns
    )


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_has_every_pair_once(data: PreparedSet, epoch: int) -> None:
    plan = batches(data).plan(epoch)
    assert sorted(flat(plan)) == list(range(len(data.split("train"))))


def test_only_a_single_pair_may_exceed_the_tokens_of_a_batch(data: PreparedSet) -> None:
    some = batches(data, tokens=14)
    sizes = [(len(b), len(b) * int(some.lengths[b].max())) for step in some.plan(0) for b in step]
    assert all(cost <= 14 or count == 1 for count, cost in sizes)
    assert any(cost > 14 for _, cost in sizes), "the limit is meant to be too small for some pairs"
    assert any(count > 1 for count, _ in sizes)


def test_a_step_has_as_many_batches_as_are_accumulated(data: PreparedSet) -> None:
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
    """A set that has lengths alone."""
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


def test_there_is_little_padding() -> None:
    # Sentence lengths in pieces are about log-normal, those of a pair similar but not equal.
    generator = np.random.default_rng(0)
    source = np.clip(generator.lognormal(3.1, 0.6, 50_000), 1, 250).astype(np.int32)
    target = np.clip(source * generator.lognormal(0.05, 0.2, 50_000), 1, 250).astype(np.int32)
    some = batches(fake_set(source, target), tokens=4096)
    real = int((source + target + 2).sum())
    grid = sum(
        len(b) * (int(source[b].max()) + int(target[b].max()) + 2) for step in some.plan(0) for b in step
    )
    assert 1 - real / grid < 0.15


def test_started_at_any_position_the_steps_are_the_same(data: PreparedSet) -> None:
    per_epoch = len(batches(data).plan(0))
    count = per_epoch + 5
    whole = list(islice(batches(data).steps(DataPosition(0, 0)), count))
    for begin in (1, per_epoch - 1, per_epoch, per_epoch + 2):
        position = whole[begin - 1][0]
        rest = list(islice(batches(data).steps(position), count - begin))
        assert [after for after, _ in rest] == [after for after, _ in whole[begin:]]
        for (_, ours), (_, theirs) in zip(rest, whole[begin:], strict=True):
            assert all(same_examples(one, other) for one, other in zip(ours, theirs, strict=True))


def test_the_position_counts_epochs_and_steps(data: PreparedSet) -> None:
    per_epoch = len(batches(data).plan(0))
    after = [position for position, _ in islice(batches(data).steps(DataPosition(0, 0)), per_epoch + 1)]
    assert after[:2] == [DataPosition(0, 1), DataPosition(0, 2)]
    assert after[-2:] == [DataPosition(1, 0), DataPosition(1, 1)]


def test_a_batch_has_the_ids_of_its_pairs(data: PreparedSet) -> None:
    some = batches(data)
    numbers = some.plan(0)[0][0]
    ids, lengths = data.split("train").gather("target.ids", numbers)
    column = some.load(numbers).columns["target.ids"]
    assert np.array_equal(column.values, ids)
    assert np.array_equal(column.lengths, lengths)


def test_iterate_once_gives_every_pair_once(data: PreparedSet) -> None:
    total = int(data.split("train").lengths("target.ids").sum())
    parts = list(batches(data).iterate_once())
    assert sum(len(part) for part in parts) == len(data.split("train"))
    assert sum(len(part.columns["target.ids"].values) for part in parts) == total


@pytest.mark.parametrize(("weight", "least", "most"), [("@2", 2, 2), ("@2.5", 2, 3), ("@0.25", 0, 1)])
def test_corpus_weights_repeat_pairs_or_leave_them_out(
    tmp_path: Path, weight: str, least: int, most: int
) -> None:
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

    def failing(pairs: Any, *, seed: tuple[int, ...] = ()) -> RaggedBatch:
        if next(calls) == 3:
            raise DataError("the disk failed")
        return load(pairs, seed=seed)

    monkeypatch.setattr(some, "load", failing)
    steps = some.steps(DataPosition(0, 0))
    assert len([next(steps) for _ in range(3)]) == 3
    with pytest.raises(DataError, match="the disk failed"):
        next(steps)


def test_the_thread_ends_with_the_generator(data: PreparedSet) -> None:
    def readers() -> int:
        return sum(thread.name == "trmt-batches" for thread in threading.enumerate())

    before = readers()
    steps = batches(data).steps(DataPosition(0, 0))
    next(steps)
    assert readers() == before + 1
    steps.close()  # type: ignore[attr-defined]
    assert readers() == before


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_subword_sampling_depends_on_the_step_and_keeps_the_text(tmp_path: Path, kind: str) -> None:
    data = PreparedSet.open(toy.make_set(tmp_path, kind=kind))
    tokenizer = Tokenizer.load(data.tokenizer_folder)

    def sampled() -> Batches:
        return Batches(
            data,
            BatchConfig(tokens=120, subword_alpha=0.3),
            seed=1,
            resample=subword_resampler(tokenizer, 0.3, 1000),
        )

    whole = list(islice(sampled().steps(DataPosition(0, 0)), 6))
    resumed = list(islice(sampled().steps(whole[2][0]), 3))
    assert all(
        same_examples(ours[0], theirs[0]) for (_, ours), (_, theirs) in zip(resumed, whole[3:], strict=True)
    )
    plain = list(islice(batches(data).steps(DataPosition(0, 0)), 6))

    def texts(examples: RaggedBatch, name: str) -> list[str]:
        column = examples.columns[name]
        return [
            tokenizer.target.decode(ids.tolist())
            for ids in np.split(column.values, np.cumsum(column.lengths)[:-1])
        ]

    for name in ("source.ids", "target.ids"):
        assert [texts(s[0], name) for _, s in whole] == [texts(p[0], name) for _, p in plain]
    assert not all(same_examples(s[0], p[0]) for (_, s), (_, p) in zip(whole, plain, strict=True))
    again = sampled().load(sampled().plan(0)[0][0], seed=(1, 0, 0))
    assert not same_examples(again, whole[0][1][0]), "another epoch samples other pieces"


def test_every_step_samples_with_its_own_seed(data: PreparedSet) -> None:
    seeds: list[int] = []

    def recorded(name: str, column: Any, seed: int) -> Any:
        seeds.append(seed)
        return column

    some = Batches(data, BatchConfig(tokens=120, accumulate=2), seed=1, resample=recorded)
    steps = len(some.plan(0)) + 3
    list(islice(some.steps(DataPosition(0, 0)), steps))
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


def test_slices_and_halves_lose_nothing(data: PreparedSet) -> None:
    some = batches(data)
    examples = some.load(some.plan(0)[0][0][:7])
    for cuts in ([0, 3, 7], [0, 1, 2, 7]):
        parts = [examples.slice(begin, end) for begin, end in pairwise(cuts)]
        for name, column in examples.columns.items():
            assert np.array_equal(
                np.concatenate([part.columns[name].values for part in parts]), column.values
            )
            assert np.array_equal(
                np.concatenate([part.columns[name].lengths for part in parts]), column.lengths
            )
    assert [len(half) for half in examples.halve()] == [3, 4]


def test_weights_that_leave_no_pair_are_an_error(data: PreparedSet) -> None:
    data.__dict__["corpus_weights"] = np.zeros(2)
    with pytest.raises(DataError, match="raise them"):
        batches(data).plan(0)


@pytest.mark.parametrize(
    "wrong", [{"tokens": 0}, {"accumulate": 0}, {"subword_alpha": 1.0}, {"passage_tokens": 7}]
)
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        BatchConfig(**wrong)


def lognormal_lengths(count: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    source = np.clip(generator.lognormal(3.1, 0.6, count), 1, 250).astype(np.int32)
    return source, np.clip(source * generator.lognormal(-0.2, 0.2, count), 1, 250).astype(np.int32)


def padding_free(data: PreparedSet, **options: Any) -> Batches:
    return Batches(data, BatchConfig(**{"tokens": 120, **options}), seed=1, padding_free=True)


@pytest.mark.parametrize("epoch", [0, 3])
def test_padding_free_batches_have_every_pair_once(data: PreparedSet, epoch: int) -> None:
    plan = padding_free(data).plan(epoch)
    assert sorted(flat(plan)) == list(range(len(data.split("train"))))
    assert flat(plan) == flat(padding_free(data).plan(epoch))
    assert flat(plan) != flat(padding_free(data).plan(epoch + 1))


def test_padding_free_batches_fill_their_shape_and_fit_into_it() -> None:
    source, target = lognormal_lengths(50_000)
    some = padding_free(fake_set(source, target), tokens=8192)
    shape = some.shape
    assert shape is not None
    assert max(shape.source_tokens, shape.target_tokens) == 8192
    batches = [batch for step in some.plan(0) for batch in step]
    for batch in batches:
        assert int(source[batch].sum()) + len(batch) <= shape.source_tokens
        assert int(target[batch].sum()) + len(batch) <= shape.target_tokens
        assert len(batch) <= shape.sentences - 1
    real = int(source.sum() + target.sum()) + 2 * len(source)
    padded = len(batches) * (shape.source_tokens + shape.target_tokens)
    assert real / padded > 0.95, "less than 5 % is padding"


@pytest.mark.parametrize("count", [2, 3, 8])
def test_micro_batches_fit_into_their_shape(count: int) -> None:
    source, target = lognormal_lengths(20_000)
    some = padding_free(fake_set(source, target), tokens=8192)
    assert some.shape
    shape = some.shape.micro_batch(count)
    assert shape.source_tokens < some.shape.source_tokens / count + 3 * shape.max_length
    fits = []
    for batch in (batch for step in some.plan(0) for batch in step):
        for part in (batch[rank::count] for rank in range(count)):
            sums = [int(side[part].sum()) + len(part) for side in (source, target)]
            fits.append(sums[0] <= shape.source_tokens and sums[1] <= shape.target_tokens)
            assert len(part) < shape.sentences
    assert sum(fits) > 0.98 * len(fits), "few micro-batches have another shape"


def test_batches_with_sampled_subwords_fit_into_the_shape(tmp_path: Path) -> None:
    folder = toy.make_set(tmp_path)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    resample = subword_resampler(tokenizer, 0.15, max_length=1000)
    config = BatchConfig(tokens=400, subword_alpha=0.15)
    some = Batches(PreparedSet.open(folder), config, seed=1, padding_free=True, resample=resample)
    assert some.shape
    fits = []
    for _, [examples] in islice(some.steps(DataPosition(0, 0)), 20):
        sides = [len(examples) + len(column.values) for column in examples.columns.values()]
        fits.append(sides[0] <= some.shape.source_tokens and sides[1] <= some.shape.target_tokens)
    assert sum(fits) > 15, "most batches have the one shape that the network is compiled for"


def test_a_pair_that_exceeds_the_tokens_of_a_batch_is_a_batch_of_its_own() -> None:
    source = np.array([3, 500, 4, 2, 700, 1], np.int32)
    some = padding_free(fake_set(source, source), tokens=20)
    alone = [batch.tolist() for step in some.plan(0) for batch in step if source[batch].max() > 20]
    assert sorted(alone) == [[1], [4]]


def test_padded_batches_have_no_common_shape(data: PreparedSet) -> None:
    assert batches(data).shape is None


def test_the_window_in_which_batches_are_made_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, target = lognormal_lengths(3_000)
    whole = padding_free(fake_set(source, target), tokens=500).plan(0)
    monkeypatch.setattr("trmt.sets.batches.WINDOW", 64)
    windowed = padding_free(fake_set(source, target), tokens=500).plan(0)
    assert [batch.tolist() for step in windowed for batch in step] == [
        batch.tolist() for step in whole for batch in step
    ]


def test_lengths_may_need_more_than_two_bytes() -> None:
    source = np.array([70_000, 3, 65_535, 65_534], np.int32)
    some = padding_free(fake_set(source, source[::-1].copy()), tokens=100_000)
    assert some.lengths.tolist() == [70_001, 65_536, 65_536, 70_001]
    assert sorted(flat(some.plan(0))) == [0, 1, 2, 3]


def test_shards_of_a_batch_have_every_size_th_pair(data: PreparedSet) -> None:
    batches = Batches(data, BatchConfig(tokens=300), seed=1)
    for pairs in (batches.plan(0)[0][0], batches.plan(0)[0][0][:2]):
        whole = batches.load(pairs)
        for size in (1, 2, 3, 7):
            shards = [whole.shard(rank, size) for rank in range(size)]
            for rank, shard in enumerate(shards):
                assert len(shard) == len(range(rank, len(pairs), size))
                expected = batches.load(pairs[rank::size]) if len(shard) else whole.slice(0, 0)
                for name, column in shard.columns.items():
                    assert column.values.tolist() == expected.columns[name].values.tolist()
                    assert column.lengths.tolist() == expected.columns[name].lengths.tolist()
