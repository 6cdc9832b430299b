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

from tests import crew_work, crews, toy
from trmt.bundles import bundles, checkpoints, slices
from trmt.config import to_toml, to_tree
from trmt.sets.shards import PreparedSet
from trmt.text.tokenizer import Tokenizer
from trmt.training.distributed import Team, assembled, buckets, reason
from trmt.training.learner import Learner
from trmt.training.recipe import load_recipe

SIZES = (2, pytest.param(3, marks=pytest.mark.slow))
CLOSE = {"rtol": 2e-4, "atol": 1e-6}


class Teams:
    """What teams did, by their size; each works once."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data

    def __getitem__(self, size: int) -> Path:
        place = self.folder / str(size)
        if not place.exists():
            self._prepare(place)
            for rank, (code, said) in enumerate(crews.ended(crews.start(size, "facts", place))):
                assert code == 0, said
                assert not (rank and said)
        return place

    def _prepare(self, place: Path) -> None:
        """The recipe, and what one process saves after three steps."""
        place.mkdir()
        tokenizer = Tokenizer.load(PreparedSet.open(self.data).tokenizer_folder)
        # With a small epsilon, Adam would make steps of what is but rounding in a gradient.
        changes = {"optim": {"ema": 0.9, "clip": 0.5, "epsilon": 1e-3}, "network": {"positions": "learned"}}
        sizes = {
            "source_vocabulary": tokenizer.source.vocabulary,
            "target_vocabulary": tokenizer.target.vocabulary,
        }
        recipe = load_recipe(toy.recipe(place, changes), network=sizes)
        (place / "recipe.toml").write_text(to_toml(to_tree(recipe)))
        (place / "data").write_text(str(self.data))
        one = alone(place)
        for step in range(3):
            one.learn(crew_work.some(place), step)
        manifest = bundles.describe(one.net, recipe.architecture, tokenizer, longest={})
        state = ({"learner": one.state()}, one.tensors())
        point = checkpoints.save(place, manifest, one.weights(), tokenizer, step=3, state=state)
        point.folder.rename(place / "one")


@pytest.fixture(scope="module")
def folders(toy_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Teams:
    return Teams(tmp_path_factory.mktemp("teams"), toy_set)


def alone(folder: Path) -> Learner:
    return crew_work.learner(folder, Team())


def answers(folder: Path, *keys: str) -> list[Any]:
    """What each rank found."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    for key in keys:
        found = [answer[key] for answer in found]
    return found


# Words and numbers


@pytest.mark.parametrize("size", SIZES)
def test_sums_and_words_are_the_same_everywhere(folders: Teams, size: int) -> None:
    found = answers(folders[size], "words")
    assert len(found) == size
    total = sum(range(1, size + 1))
    for rank, mine in enumerate(found):
        assert mine["sums"] == [[total] * 3, [total], [total] * 5, [total] * 4]
        assert mine["spread"] == [[0.0] * 4, [0.0] * 2]
        assert mine["total"] == [size, sum(range(size))]
        assert mine["lead"] == [0, "words"]
        assert mine["gather"] == [{"rank": number} for number in range(size)]
        assert mine["found it there"] == (rank > 0)
        assert mine["key"] == ([rank] if rank else [])


@pytest.mark.parametrize("size", SIZES)
def test_a_signal_or_failure_of_one_is_known_to_all(folders: Teams, size: int) -> None:
    for mine in answers(folders[size], "words"):
        assert mine["settled"] == [False, True]
        assert mine["signals"] == [None, 15]


@pytest.mark.parametrize("size", SIZES)
def test_what_differs_between_ranks_is_named(folders: Teams, size: int) -> None:
    for mine in answers(folders[size], "words"):
        assert "rank 1 on" in mine["unlike"]
        assert "another other than rank 0" in mine["unlike"]


# N processes are one


@pytest.mark.parametrize("shard", ["False", "True"])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_and_steps_are_those_of_one_process(folders: Teams, size: int, shard: str) -> None:
    one = alone(folders[size])
    learned = one._gradients_that_fit(crew_work.some(folders[size]), step=0)
    expected = {f"grad:{name}": tensor for name, tensor in crew_work.gradients(one.net).items()}
    for step in range(3):
        one.learn(crew_work.some(folders[size]), step)
    expected |= crew_work.everything(one)
    with one.at_rest():
        loss = one.dev_loss(crew_work.batches(folders[size])).loss
        expected |= {f"rest:{name}": tensor.clone() for name, tensor in one.net.state_dict().items()}
    found = load_file(folders[size] / f"steps-{shard}.safetensors")
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **CLOSE, equal_nan=True, msg=name)
    for mine in answers(folders[size], "steps", shard):
        assert mine["nll"] == pytest.approx(float(learned.nll), rel=1e-5)
        assert mine["tokens"] == learned.tokens
        assert mine["dev"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_slices_are_a_part_of_the_network(folders: Teams, size: int) -> None:
    whole = alone(folders[size]).parameters
    held = [mine["held"] for mine in answers(folders[size], "steps", "True")]
    assert sum(held) == whole
    assert max(held) < whole / size * 1.2
    assert all(mine["held"] == whole for mine in answers(folders[size], "steps", "False"))


@pytest.mark.parametrize("shard", ["False", "True"])
@pytest.mark.parametrize("size", SIZES)
def test_a_step_that_is_no_number_on_one_rank_is_left_out_by_all(
    folders: Teams, size: int, shard: str
) -> None:
    for mine in answers(folders[size], "steps", shard):
        assert mine["verdicts"] == [True, True, True, False]
        assert mine["unmoved"]


@pytest.mark.parametrize("size", SIZES)
def test_ranks_draw_differently(folders: Teams, size: int) -> None:
    seeds = [seed for mine in answers(folders[size], "draws", "seeds") for seed in mine]
    shares = [len(batch.shard(rank, size)) for batch in crew_work.some(folders[size]) for rank in range(size)]
    assert len(seeds) == sum(share > 0 for share in shares)
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("size", SIZES)
def test_memory_that_ends_on_one_rank_splits_the_batches_of_all(folders: Teams, size: int) -> None:
    one = alone(folders[size])
    learned = one._gradients_that_fit(crew_work.some(folders[size]), step=0)
    for mine in answers(folders[size], "memory"):
        assert mine["halvings"] == 2
        assert mine["nll"] == pytest.approx(float(learned.nll), rel=1e-5)
    found = load_file(folders[size] / "memory.safetensors")
    expected = crew_work.gradients(one.net)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **CLOSE, msg=name)


# Slices in files


@pytest.mark.parametrize("size", SIZES)
def test_slices_are_read_and_merged_by_one_process(folders: Teams, size: int) -> None:
    place = folders[size] / "slices"
    whole, read = load_file(place / "whole"), slices.Slices(place)
    assert read.altered() is None
    assert set(read) == set(whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(read[name], tensor, rtol=0, atol=0, equal_nan=True)
    one = alone(folders[size])
    kept, merged = one.kept(), load_file(place / "merged")
    assert set(kept.values()) == {
        name for name in one.net.state_dict() if name not in bundles._tied(one.net.state_dict(keep_vars=True))
    }
    assert set(merged) == set(kept.values())
    assert all(torch.equal(merged[name], whole[saved]) for saved, name in kept.items())


@pytest.mark.parametrize("size", SIZES)
def test_what_one_process_saved_is_taken_up_by_several(folders: Teams, size: int) -> None:
    assert answers(folders[size], "files", "same") == [[True, True]] * size


# Ends


@pytest.mark.parametrize(
    ("work", "words"),
    [("fails", "rank 2 on"), ("vanishes", "another process of this run has died or is out of reach")],
)
@pytest.mark.slow
def test_of_a_failing_team_one_speaks(tmp_path: Path, work: str, words: str) -> None:
    began = time.monotonic()
    found = crews.ended(crews.start(3, work, tmp_path))
    assert time.monotonic() - began < 60
    assert all(code != 0 for code, _ in found)
    said = [line for _, said in found for line in said.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, found
    assert words in said[0]
    assert not list(tmp_path.glob("rank-*"))


def test_a_process_alone_has_nobody_to_ask() -> None:
    with assembled() as team:
        assert (team.rank, team.size, team.leads, team.key, team.signal) == (0, 1, True, (), None)
        gradient = torch.ones(2)
        team.add([gradient])
        assert gradient.tolist() == [1, 1]
        assert team.gather("word") == ["word"]
        assert team.settle(True) and not team.settle(False)
        assert not torch.distributed.is_initialized()


def test_a_team_of_one_is_a_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "nowhere"), ("MASTER_PORT", "1")):
        monkeypatch.setitem(os.environ, name, value)
    with assembled() as team:
        assert team.size == 1
        assert not torch.distributed.is_initialized()


def test_buckets_hold_every_tensor_once_and_no_more_than_they_may() -> None:
    chooser = np.random.default_rng(3)
    kinds = (torch.float32, torch.float16)
    tensors = [torch.zeros(int(chooser.integers(0, 40)), dtype=kinds[n % 2]) for n in range(30)]
    found = list(buckets(tensors, 100))
    assert sorted(id(t) for bucket in found for t in bucket) == sorted(id(t) for t in tensors)
    for bucket in found:
        assert len({tensor.dtype for tensor in bucket}) == 1
        assert len(bucket) == 1 or sum(tensor.nbytes for tensor in bucket) <= 100


def test_the_reason_is_what_a_person_can_use() -> None:
    error = RuntimeError(
        "[/src/gloo/pair.cc:537] Read error [1.2.3.4]:5: Connection reset. This is advice.\nmore"
    )
    assert reason(error) == "Read error [1.2.3.4]:5: Connection reset"
    assert reason(RuntimeError()) == "RuntimeError"


@pytest.mark.slow
def test_a_mistake_is_said_once_and_aborts_nobody(tmp_path: Path) -> None:
    for attempt in range(3):  # which thread is where when the interpreter goes is a matter of chance
        found = crews.ended(crews.start(2, "misled", tmp_path / str(attempt)))
        assert [code for code, _ in found] == [1, 1], found
        assert sorted(said.count("there is nothing here") for _, said in found) == [0, 1]
