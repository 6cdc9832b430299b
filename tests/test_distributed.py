from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import process_work, processes, toy
from trmt.bundles import bundles, checkpoints
from trmt.bundles.slices import SlicedTensors
from trmt.config import to_toml, to_tree
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer
from trmt.training.distributed import Distributed, init_distributed, short_reason
from trmt.training.overlap import buckets
from trmt.training.recipe import load_recipe
from trmt.training.state import TrainState
from trmt.training.step import compute_gradients, train_step
from trmt.training.validation import dev_loss

SIZES = (2, pytest.param(3, marks=pytest.mark.slow))
CLOSE = {"rtol": 2e-4, "atol": 1e-6}


class Results:
    """The folders with the results of process_work.everything by world size; each is computed once."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data

    def __getitem__(self, size: int) -> Path:
        path = self.folder / str(size)
        if not path.exists():
            self._prepare(path)
            started = processes.start(size, "everything", path)
            for rank, (code, error) in enumerate(processes.wait(started)):
                assert code == 0, error
                assert not (rank and error)
        return path

    def _prepare(self, path: Path) -> None:
        """The recipe, and a checkpoint of one process after three steps."""
        path.mkdir()
        tokenizer = Tokenizer.load(PreparedSet.open(self.data).tokenizer_folder)
        # A large epsilon, because otherwise Adam would amplify rounding errors of gradients.
        changes = {"optim": {"ema": 0.9, "clip": 0.5, "epsilon": 1e-3}, "network": {"positions": "learned"}}
        sizes = {
            "source_vocabulary": tokenizer.source.vocabulary,
            "target_vocabulary": tokenizer.target.vocabulary,
        }
        recipe = load_recipe(toy.recipe(path, changes), network=sizes)
        (path / "recipe.toml").write_text(to_toml(to_tree(recipe)))
        (path / "data").write_text(str(self.data))
        state = single_process(path)
        for _ in range(3):
            train_step(state, process_work.uneven_batches(path))
        checkpoints.save_checkpoint(
            path / "one",
            bundles.make_manifest(state.net, recipe.architecture, tokenizer, longest={}),
            state.bundle_weights(),
            tokenizer,
            step=3,
            state=(state.values(), state.tensors()),
        )


@pytest.fixture(scope="module")
def results(toy_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("distributed"), toy_set)


def single_process(folder: Path) -> TrainState:
    return process_work.make_state(folder, Distributed())


def by_rank(folder: Path, *keys: str) -> list[Any]:
    """The result of each rank."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    for key in keys:
        found = [result[key] for result in found]
    return found


# Communication


@pytest.mark.parametrize("size", SIZES)
def test_sums_and_values_are_the_same_on_all_ranks(results: Results, size: int) -> None:
    found = by_rank(results[size], "communication")
    assert len(found) == size
    total = sum(range(1, size + 1))
    for rank, result in enumerate(found):
        assert result["all_reduce"] == [[total] * 3, [total], [total] * 5, [total] * 4]
        assert result["broadcast"] == [[0.0] * 4, [0.0] * 2]
        assert result["all_reduce_numbers"] == [size, sum(range(size))]
        assert result["on_main"] == [0, "text"]
        assert result["all_gather"] == [{"rank": number} for number in range(size)]
        assert result["main_first"] == (rank > 0)
        assert result["seed_key"] == ([rank] if rank else [])


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_learn_of_a_flag_or_signal_of_one(results: Results, size: int) -> None:
    for result in by_rank(results[size], "communication"):
        assert result["flags"] == [False, True]
        assert result["signals"] == [None, 15]


@pytest.mark.parametrize("size", SIZES)
def test_a_value_that_differs_between_ranks_is_named(results: Results, size: int) -> None:
    for result in by_rank(results[size], "communication"):
        assert "rank 1 on" in result["check_equal"]
        assert "another other than rank 0" in result["check_equal"]


# Several processes compute what one process computes


@pytest.mark.parametrize("shard", ["False", "True"])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_and_steps_are_those_of_one_process(results: Results, size: int, shard: str) -> None:
    state, batches = single_process(results[size]), process_work.uneven_batches(results[size])
    result = compute_gradients(state, batches)
    expected = {f"grad:{name}": tensor for name, tensor in process_work.gradients(state.net).items()}
    for _ in range(3):
        train_step(state, batches)
    expected |= process_work.saved_tensors(state)
    with state.evaluating():
        loss = dev_loss(state, process_work.make_batches(results[size])).loss
        expected |= {f"full:{name}": tensor.clone() for name, tensor in state.net.state_dict().items()}
    found = load_file(results[size] / f"steps-{shard}.safetensors")
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **CLOSE, equal_nan=True, msg=name)
    for other in by_rank(results[size], "steps", shard):
        assert other["nll"] == pytest.approx(float(result.nll), rel=1e-5)
        assert other["tokens"] == result.tokens
        assert other["dev_loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_each_rank_of_a_sharded_run_holds_its_share_of_the_network(results: Results, size: int) -> None:
    state = single_process(results[size])
    total = state.parameter_count
    # A learned table of positions has a single row by its shape, [1, position, D], and stays whole.
    undivided = sum(each.numel() for each in state.net.parameters() if each.shape[0] == 1)
    local = [result["local_size"] for result in by_rank(results[size], "steps", "True")]
    assert sum(local) == total
    assert max(local) - undivided < (total - undivided) / size * 1.2
    assert all(result["local_size"] == total for result in by_rank(results[size], "steps", "False"))


@pytest.mark.parametrize("shard", ["False", "True"])
@pytest.mark.parametrize("size", SIZES)
def test_a_step_with_nan_on_one_rank_is_skipped_by_all(results: Results, size: int, shard: str) -> None:
    for result in by_rank(results[size], "steps", shard):
        assert result["finite"] == [True, True, True, False]
        assert result["unchanged"]


@pytest.mark.parametrize("size", SIZES)
def test_ranks_have_different_seeds(results: Results, size: int) -> None:
    seeds = [seed for found in by_rank(results[size], "seeds") for seed in found]
    batches = process_work.uneven_batches(results[size])
    shares = [len(batch.shard(rank, size)) for batch in batches for rank in range(size)]
    assert len(seeds) == sum(share > 0 for share in shares)
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("size", SIZES)
def test_short_memory_on_one_rank_splits_the_batches_of_all(results: Results, size: int) -> None:
    state = single_process(results[size])
    result = compute_gradients(state, process_work.uneven_batches(results[size]))
    for other in by_rank(results[size], "memory"):
        assert other["halvings"] == 2
        assert other["nll"] == pytest.approx(float(result.nll), rel=1e-5)
    found = load_file(results[size] / "memory.safetensors")
    expected = process_work.gradients(state.net)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **CLOSE, msg=name)


# Sharded checkpoints


@pytest.mark.parametrize("size", SIZES)
def test_slices_can_be_read_and_merged_by_one_process(results: Results, size: int) -> None:
    path = results[size] / "slices"
    full, sliced = load_file(path / "full"), SlicedTensors(path)
    assert sliced.altered_file() is None
    assert set(sliced) == set(full)
    for name, tensor in full.items():
        torch.testing.assert_close(sliced[name], tensor, rtol=0, atol=0, equal_nan=True)
    state = single_process(results[size])
    names, merged = state.bundle_names(), load_file(path / "merged")
    tied = bundles._tied(state.net.state_dict(keep_vars=True))
    assert set(names.values()) == {name for name in state.net.state_dict() if name not in tied}
    assert set(merged) == set(names.values())
    assert all(torch.equal(merged[name], full[saved]) for saved, name in names.items())


@pytest.mark.parametrize("size", SIZES)
def test_several_processes_restore_what_one_has_saved(results: Results, size: int) -> None:
    assert by_rank(results[size], "files", "same") == [[True, True]] * size


# Errors and the end


@pytest.mark.parametrize(
    ("work", "message"),
    [("one_fails", "rank 2 on"), ("one_exits", "another process of this run has died or is out of reach")],
)
@pytest.mark.slow
def test_only_one_process_prints_an_error(tmp_path: Path, work: str, message: str) -> None:
    began = time.monotonic()
    found = processes.wait(processes.start(3, work, tmp_path))
    assert time.monotonic() - began < 60
    assert all(code != 0 for code, _ in found)
    errors = [line for _, error in found for line in error.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, found
    assert message in errors[0]
    assert not list(tmp_path.glob("rank-*"))


def test_a_single_process_communicates_with_itself() -> None:
    with init_distributed() as single:
        assert (single.rank, single.world_size, single.is_main) == (0, 1, True)
        assert (single.seed_key, single.agreed_signal) == ((), None)
        gradient = torch.ones(2)
        single.start_all_reduce(gradient)()
        assert gradient.tolist() == [1, 1]
        assert single.all_gather("text") == ["text"]
        assert single.all_reduce_flag(True) and not single.all_reduce_flag(False)
        assert not torch.distributed.is_initialized()


def test_a_world_size_of_one_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "nowhere"), ("MASTER_PORT", "1")):
        monkeypatch.setitem(os.environ, name, value)
    with init_distributed() as single:
        assert single.world_size == 1
        assert not torch.distributed.is_initialized()


def test_buckets_hold_each_tensor_once_and_keep_to_the_size() -> None:
    generator = np.random.default_rng(3)
    dtypes = (torch.float32, torch.float16)
    tensors = [torch.zeros(int(generator.integers(0, 40)), dtype=dtypes[n % 2]) for n in range(30)]
    found = list(buckets(tensors, 100))
    assert sorted(id(t) for bucket in found for t in bucket) == sorted(id(t) for t in tensors)
    for bucket in found:
        assert len({tensor.dtype for tensor in bucket}) == 1
        assert len(bucket) == 1 or sum(tensor.nbytes for tensor in bucket) <= 100


def test_the_reason_is_the_first_sentence() -> None:
    error = RuntimeError(
        "[/src/gloo/pair.cc:537] Read error [1.2.3.4]:5: Connection reset. This is advice.\nmore"
    )
    assert short_reason(error) == "Read error [1.2.3.4]:5: Connection reset"
    assert short_reason(RuntimeError()) == "RuntimeError"


@pytest.mark.slow
def test_an_error_of_all_ranks_is_printed_once(tmp_path: Path) -> None:
    for attempt in range(3):  # where each thread is when the interpreter exits varies
        found = processes.wait(processes.start(2, "all_fail", tmp_path / str(attempt)))
        assert [code for code, _ in found] == [1, 1], found
        assert sorted(error.count("there is nothing here") for _, error in found) == [0, 1]
