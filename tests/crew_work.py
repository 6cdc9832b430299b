"""What the processes of a team do in tests; each function is run by all ranks, by name."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from trmt.bundles import checkpoints, slices
from trmt.config import build, read_toml
from trmt.errors import TrmtError
from trmt.nets.base import Seq2Seq
from trmt.objectives.base import Loss
from trmt.objectives.translation import Translation, TranslationBatch
from trmt.sets.batches import BatchConfig, Batches, RaggedBatch
from trmt.sets.shards import PreparedSet
from trmt.training import distributed, sharding
from trmt.training.distributed import Team, TeamError
from trmt.training.learner import Learner
from trmt.training.recipe import Recipe

LOSS = Translation.loss


def learner(folder: Path, crew: Team, *, shard: bool = False, dropout: float = 0.0) -> Learner:
    """A small network, the same for all; `folder` has its recipe."""
    recipe = build(Recipe, read_toml(folder / "recipe.toml"), where="recipe")
    recipe = replace(
        recipe,
        training=replace(recipe.training, shard=shard),
        network={**recipe.network, "dropout": dropout},
    )
    return Learner(recipe, steps=10, team=crew)


def batches(folder: Path) -> Batches:
    data = PreparedSet.open(Path((folder / "data").read_text()))
    return Batches(data, BatchConfig(tokens=150), seed=1)


def some(folder: Path) -> list[RaggedBatch]:
    """Three batches: many pairs, two, and one, so that not every rank has some of each."""
    found = batches(folder)
    return [
        found.load(pairs) for pairs in (found.plan(0)[0][0], found.plan(0)[1][0][:2], found.plan(0)[2][0][:1])
    ]


def gradients(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: sharding.whole(p.grad) for name, p in net.named_parameters() if p.grad is not None}


def everything(made: Learner) -> dict[str, Tensor]:
    """All that is saved, whole."""
    return {name: sharding.whole(tensor).detach().clone() for name, tensor in made.tensors().items()}


def alike(one: Tensor, two: Tensor) -> bool:
    return bool(((one == two) | (one.isnan() & two.isnan())).all())


def words(folder: Path, crew: Team) -> dict[str, Any]:
    """What a team promises about numbers and words."""
    ones = [torch.full((size,), float(crew.rank + 1)) for size in (3, 1, 5)]
    ones.append(torch.full((2, 2), crew.rank + 1, dtype=torch.int64))
    with mock.patch.object(distributed, "BUCKET_BYTES", 16):
        crew.add(ones)
    mine = [torch.full((4,), float(crew.rank)), torch.full((2,), float(crew.rank))]
    crew.spread(mine)
    place = folder / "first"

    def create() -> bool:
        existed = place.exists()
        place.touch()
        return existed

    try:
        crew.alike(same=1, other=crew.rank)
        unlike = ""
    except TeamError as error:
        unlike = str(error)
    crew.wish = 15 if crew.rank == crew.size - 1 else 0
    before = crew.signal
    settled = [crew.settle(False), crew.settle(crew.rank == crew.size - 1)]
    return {
        "sums": [tensor.flatten().tolist() for tensor in ones],
        "spread": [tensor.tolist() for tensor in mine],
        "total": crew.total(1.0, crew.rank),
        "lead": crew.lead(lambda: [crew.rank, "words"]),
        "gather": crew.gather({"rank": crew.rank}),
        "found it there": crew.first(create),
        "unlike": unlike,
        "settled": settled,
        "signals": [before, crew.signal],
        "key": crew.key,
    }


def steps(folder: Path, crew: Team, *, shard: bool) -> dict[str, Any]:
    """Gradients, three steps, the dev loss, and a step that is no number on one rank only."""
    made = learner(folder, crew, shard=shard)
    learned = made._gradients_that_fit(some(folder), step=0)
    found = {f"grad:{name}": tensor for name, tensor in gradients(made.net).items()}
    for step in range(3):
        made.learn(some(folder), step)
    found |= everything(made)
    with made.at_rest():
        loss = made.dev_loss(batches(folder)).loss
        net = made.to_translate_with()
        if crew.leads:
            found |= {f"rest:{name}": tensor.clone() for name, tensor in net.state_dict().items()}
    before = everything(made)
    broken = crew.rank == crew.size - 1
    with mock.patch.object(Translation, "loss", _broken_loss) if broken else nullcontext():
        made.learn(some(folder), 3)
    verdicts = [verdict.finite for verdict in made.guard.verdicts()]
    after = everything(made)
    unmoved = all(torch.equal(before[name], after[name]) for name in before if name.startswith("live:"))
    if crew.leads:
        save_file({name: t.contiguous() for name, t in found.items()}, folder / f"steps-{shard}.safetensors")
    return {
        "nll": float(learned.nll),
        "tokens": learned.tokens,
        "dev": loss,
        "verdicts": verdicts,
        "unmoved": unmoved,
        "held": sum(sharding.local(parameter).numel() for parameter in made.net.parameters()),
    }


def _broken_loss(self: Translation, net: Seq2Seq, batch: TranslationBatch) -> Loss:
    found = LOSS(self, net, batch)
    return replace(found, total=found.total * torch.nan)


def memory(folder: Path, crew: Team) -> dict[str, Any]:
    """Memory ends on the last rank only, twice."""
    made, left = learner(folder, crew), [2]

    def short(self: Translation, net: Seq2Seq, batch: TranslationBatch) -> Loss:
        if crew.rank == crew.size - 1 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return LOSS(self, net, batch)

    with mock.patch.object(Translation, "loss", short):
        learned = made._gradients_that_fit(some(folder), step=0)
    found = gradients(made.net)
    if crew.leads:
        save_file(found, folder / "memory.safetensors")
    return {"halvings": made.parts.halvings, "nll": float(learned.nll)}


def draws(folder: Path, crew: Team) -> dict[str, Any]:
    """The seed that each pass of a step sets, with dropout."""
    made, seeds = learner(folder, crew, dropout=0.5), []

    def noted(self: Translation, net: Seq2Seq, batch: TranslationBatch) -> Loss:
        seeds.append(torch.initial_seed())
        return LOSS(self, net, batch)

    with mock.patch.object(Translation, "loss", noted):
        made._gradients_that_fit(some(folder), step=0)
    return {"seeds": seeds}


def files(folder: Path, crew: Team) -> dict[str, Any]:
    """Slices are written; and a state that one process saved is taken up, in slices and whole."""
    made = learner(folder, crew, shard=True)
    made.learn(some(folder), 0)
    place = folder / "slices"
    if crew.leads:
        place.mkdir()
    crew.lead(lambda: None)
    mine = sharding.slices_of(made.tensors(), crew)
    written = crew.gather(slices.write(place, mine, number=crew.rank, count=crew.size))
    whole = everything(made)
    if crew.leads:
        slices.write_index(place, written)
        slices.Slices(place).merge(place / "merged", made.kept())
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, place / "whole")
    plain, saved = checkpoints.Checkpoint(folder / "one", 3).state()
    same = []
    for shard in (True, False):
        other = learner(folder, crew, shard=shard)
        other.restore(plain["learner"], saved)
        now = everything(other)
        same.append(now.keys() == saved.keys() and all(alike(now[name], saved[name]) for name in saved))
    return {"same": same}


def facts(folder: Path, crew: Team) -> dict[str, Any]:
    """All of the above, in one life of the processes."""
    return {
        "words": words(folder, crew),
        "steps": {str(shard): steps(folder, crew, shard=shard) for shard in (False, True)},
        "memory": memory(folder, crew),
        "draws": draws(folder, crew),
        "files": files(folder, crew),
    }


def fails(folder: Path, crew: Team) -> dict[str, Any]:
    """One rank makes a mistake while the others wait for the leader."""
    if crew.rank == crew.size - 1:
        raise TrmtError("this rank cannot go on; mend it")
    crew.lead(lambda: crew.gather(None) and None)
    return {}


def misled(folder: Path, crew: Team) -> dict[str, Any]:
    """All ranks meet the same mistake of the user's."""
    raise TrmtError("there is nothing here; look elsewhere")


def vanishes(folder: Path, crew: Team) -> dict[str, Any]:
    """One rank is gone without a word while the others add up."""
    if crew.rank == crew.size - 1:
        os._exit(9)
    while True:
        crew.total(1.0)


if __name__ == "__main__":
    works: dict[str, Callable[[Path, Team], dict[str, Any]]] = {
        work.__name__: work for work in (facts, fails, misled, vanishes)
    }
    torch.set_num_threads(1)
    target = Path(sys.argv[2])
    try:
        with distributed.assembled() as everyone:
            answer = works[sys.argv[1]](target, everyone)
            (target / f"rank-{everyone.rank}.json").write_text(json.dumps(answer))
    except TrmtError as problem:
        sys.exit(f"error: {problem}")
