"""What the processes of distributed tests do; each function is run by all ranks, by name."""

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
from trmt.bundles.slices import SlicedTensors
from trmt.config import build, build_stored, read_toml
from trmt.errors import TrmtError
from trmt.nets.base import Seq2Seq
from trmt.objectives.base import Loss
from trmt.objectives.translation import TranslationBatch, TranslationObjective
from trmt.sets.batches import BatchConfig, Batches, RaggedBatch
from trmt.sets.shards import PreparedSet
from trmt.training import distributed, overlap, sharding
from trmt.training.distributed import Distributed, DistributedError
from trmt.training.recipe import Recipe
from trmt.training.state import SavedValues, TrainState
from trmt.training.step import compute_gradients, train_step
from trmt.training.validation import dev_loss, full_network

LOSS = TranslationObjective.loss


def make_state(
    folder: Path, processes: Distributed, *, shard: bool = False, dropout: float = 0.0
) -> TrainState:
    """The state of a small network, the same on all ranks; `folder` has its recipe."""
    recipe = build(Recipe, read_toml(folder / "recipe.toml"), where="recipe")
    recipe = replace(
        recipe,
        training=replace(recipe.training, shard=shard),
        network={**recipe.network, "dropout": dropout},
    )
    with mock.patch.object(overlap, "BUCKET_BYTES", 1000):  # several buckets
        state = TrainState(recipe, total_steps=10, distributed=processes)
    assert state.overlap is None or len(state.overlap.sums) > 3
    return state


def make_batches(folder: Path) -> Batches:
    data = PreparedSet.open(Path((folder / "data").read_text()))
    return Batches(data, BatchConfig(tokens=150), seed=1)


def uneven_batches(folder: Path) -> list[RaggedBatch]:
    """Three batches: many pairs, two, and one, so that not every rank has a share of each."""
    found = make_batches(folder)
    return [
        found.load(pairs) for pairs in (found.plan(0)[0][0], found.plan(0)[1][0][:2], found.plan(0)[2][0][:1])
    ]


def gradients(net: torch.nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {name: sharding.full_tensor(grad).clone() for name, grad in grads.items()}


def saved_tensors(state: TrainState) -> dict[str, Tensor]:
    """All tensors that are saved, gathered."""
    return {name: sharding.full_tensor(tensor).detach().clone() for name, tensor in state.tensors().items()}


def equal_or_nan(one: Tensor, two: Tensor) -> bool:
    return bool(((one == two) | (one.isnan() & two.isnan())).all())


def communication(folder: Path, processes: Distributed) -> dict[str, Any]:
    """The result of each method of Distributed."""
    rank, world_size = processes.rank, processes.world_size
    summed = [torch.full((size,), float(rank + 1)) for size in (3, 1, 5)]
    summed.append(torch.full((2, 2), rank + 1, dtype=torch.int64))
    for wait in [processes.start_all_reduce(tensor) for tensor in summed]:
        wait()
    broadcast = [torch.full((4,), float(rank)), torch.full((2,), float(rank))]
    processes.broadcast(broadcast)
    path = folder / "main_first"

    def existed() -> bool:
        found = path.exists()
        path.touch()
        return found

    try:
        processes.check_equal(same=1, other=rank)
        error = ""
    except DistributedError as unequal:
        error = str(unequal)
    processes.requested_signal = 15 if rank == world_size - 1 else 0
    before = processes.agreed_signal
    flags = [processes.all_reduce_flag(False), processes.all_reduce_flag(rank == world_size - 1)]
    return {
        "all_reduce": [tensor.flatten().tolist() for tensor in summed],
        "broadcast": [tensor.tolist() for tensor in broadcast],
        "all_reduce_numbers": processes.all_reduce_numbers(1.0, rank),
        "on_main": processes.on_main(lambda: [rank, "text"]),
        "all_gather": processes.all_gather({"rank": rank}),
        "main_first": processes.main_first(existed),
        "check_equal": error,
        "flags": flags,
        "signals": [before, processes.agreed_signal],
        "seed_key": processes.seed_key,
    }


def steps(folder: Path, processes: Distributed, *, shard: bool) -> dict[str, Any]:
    """Gradients, three steps, the dev loss, and a step whose gradient is NaN on one rank only."""
    state, batches = make_state(folder, processes, shard=shard), uneven_batches(folder)
    result = compute_gradients(state, batches)
    found = {f"grad:{name}": tensor for name, tensor in gradients(state.net).items()}
    for _ in range(3):
        train_step(state, batches)
    found |= saved_tensors(state)
    with state.evaluating():
        loss = dev_loss(state, make_batches(folder)).loss
        net = full_network(state)
        if processes.is_main:
            found |= {f"full:{name}": tensor.clone() for name, tensor in net.state_dict().items()}
    before = saved_tensors(state)
    is_broken = processes.rank == processes.world_size - 1
    with mock.patch.object(TranslationObjective, "loss", _nan_loss) if is_broken else nullcontext():
        train_step(state, batches)
    finite = [report.finite for report in state.guard.pop_reports()]
    after = saved_tensors(state)
    weights = [name for name in before if name.startswith("weights:")]
    if processes.is_main:
        save_file({name: t.contiguous() for name, t in found.items()}, folder / f"steps-{shard}.safetensors")
    return {
        "nll": float(result.nll),
        "tokens": result.tokens,
        "dev_loss": loss,
        "finite": finite,
        "unchanged": all(torch.equal(before[name], after[name]) for name in weights),
        "local_size": sum(sharding.local_rows(parameter).numel() for parameter in state.net.parameters()),
    }


def _nan_loss(self: TranslationObjective, net: Seq2Seq, batch: TranslationBatch) -> Loss:
    found = LOSS(self, net, batch)
    return replace(found, total=found.total * torch.nan)


def memory(folder: Path, processes: Distributed) -> dict[str, Any]:
    """The last rank runs out of memory twice."""
    state, left = make_state(folder, processes), [2]

    def out_of_memory(self: TranslationObjective, net: Seq2Seq, batch: TranslationBatch) -> Loss:
        if processes.rank == processes.world_size - 1 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return LOSS(self, net, batch)

    with mock.patch.object(TranslationObjective, "loss", out_of_memory):
        result = compute_gradients(state, uneven_batches(folder))
    found = gradients(state.net)
    if processes.is_main:
        save_file(found, folder / "memory.safetensors")
    return {"halvings": state.micro_batches.halvings, "nll": float(result.nll)}


def seeds(folder: Path, processes: Distributed) -> list[int]:
    """The seed of each micro-batch of a step with dropout."""
    state, found = make_state(folder, processes, dropout=0.5), []

    def recorded(self: TranslationObjective, net: Seq2Seq, batch: TranslationBatch) -> Loss:
        found.append(torch.initial_seed())
        return LOSS(self, net, batch)

    with mock.patch.object(TranslationObjective, "loss", recorded):
        compute_gradients(state, uneven_batches(folder))
    return found


def files(folder: Path, processes: Distributed) -> dict[str, Any]:
    """Write slices; and restore a state that one process saved, sharded and not."""
    state = make_state(folder, processes, shard=True)
    train_step(state, uneven_batches(folder))
    path = folder / "slices"
    if processes.is_main:
        path.mkdir()
    processes.on_main(lambda: None)
    own = sharding.slices_to_save(state.tensors(), processes)
    written = processes.all_gather(
        slices.write_slices(path, own, rank=processes.rank, world_size=processes.world_size)
    )
    full = saved_tensors(state)
    if processes.is_main:
        slices.write_index(path, written)
        SlicedTensors(path).merge(path / "merged", state.bundle_names())
        save_file({name: tensor.contiguous() for name, tensor in full.items()}, path / "full")
    tree, saved = checkpoints.Checkpoint(folder / "one" / "step-00000003", 3).load_state()
    values = build_stored(SavedValues, {"data": "", **tree}, where="the state", advice="")
    same = []
    for shard in (True, False):
        other = make_state(folder, processes, shard=shard)
        other.restore(values, saved)
        found = saved_tensors(other)
        same.append(
            found.keys() == saved.keys() and all(equal_or_nan(found[name], saved[name]) for name in saved)
        )
    return {"same": same}


def everything(folder: Path, processes: Distributed) -> dict[str, Any]:
    """All of the above in one start of the processes."""
    return {
        "communication": communication(folder, processes),
        "steps": {str(shard): steps(folder, processes, shard=shard) for shard in (False, True)},
        "memory": memory(folder, processes),
        "seeds": seeds(folder, processes),
        "files": files(folder, processes),
    }


def one_fails(folder: Path, processes: Distributed) -> dict[str, Any]:
    """One rank raises an error while the others wait for rank 0."""
    if processes.rank == processes.world_size - 1:
        raise TrmtError("this rank cannot go on; correct it")
    processes.on_main(lambda: processes.all_gather(None) and None)
    return {}


def all_fail(folder: Path, processes: Distributed) -> dict[str, Any]:
    """All ranks raise the same error."""
    raise TrmtError("there is nothing here; look elsewhere")


def one_exits(folder: Path, processes: Distributed) -> dict[str, Any]:
    """One rank exits without an error message while the others wait in a collective."""
    if processes.rank == processes.world_size - 1:
        os._exit(9)
    while True:
        processes.all_reduce_numbers(1.0)


if __name__ == "__main__":
    functions: dict[str, Callable[[Path, Distributed], dict[str, Any]]] = {
        function.__name__: function for function in (everything, one_fails, all_fail, one_exits)
    }
    torch.set_num_threads(1)
    target = Path(sys.argv[2])
    try:
        with distributed.init_distributed() as group:
            result = functions[sys.argv[1]](target, group)
            (target / f"rank-{group.rank}.json").write_text(json.dumps(result))
    except TrmtError as problem:
        sys.exit(f"error: {problem}")
