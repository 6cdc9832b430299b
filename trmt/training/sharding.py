"""Networks that do not fit on one device: each process keeps a slice of every tensor (torch's FSDP2).

The matrices of a layer are gathered when its first module is called and let go after its last; gradients
are summed into slices. What is in no layer (embeddings) and what is small (norms, which networks may use
without calling them) stays gathered from the beginning of a step to its end, because the loss reads out
logits after the network's own forward is over.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trmt.bundles.slices import Slice, chunk
from trmt.errors import ConfigError
from trmt.nets.base import Network
from trmt.training.distributed import Team


def shard(net: Network, team: Team, device: torch.device) -> None:
    """Cut every parameter of `net` into slices of rows, one for each rank."""
    # They take most of a second to load, which only large networks have to pay.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not net.layers_called_once:
        raise ConfigError(
            f"training.shard does not work with {type(net).__name__}, whose layers are not each called once; "
            "leave it out, or choose another architecture"
        )
    # It warns of operations in place on what a module returns; the gradient tests would show one.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (team.size,))
    for layer in (layer for part in net.children() if isinstance(part, nn.ModuleList) for layer in part):
        # The pieces and not the layer: networks call what is in a layer, never the layer itself.
        if pieces := [piece for piece in layer.modules() if _has_matrix(piece)]:
            fully_shard(pieces, mesh=mesh)
    fully_shard(net, mesh=mesh, reshard_after_forward=False)
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # gradients are sums; they are divided by tokens already
            module.set_force_sum_reduction_for_comms(True)


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def let_go(net: nn.Module) -> None:
    """Forget gathered weights: after a look without a backward pass they would outlive a change of slices."""
    for module in net.modules():
        if reshard := getattr(module, "reshard", None):
            reshard()


def sliced(tensor: Tensor) -> bool:
    """Whether only a slice of a tensor is here."""
    return hasattr(tensor, "to_local")  # a DTensor; its class would have to be loaded


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is here."""
    return tensor.to_local() if sliced(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered if it is in slices: for all ranks to call together."""
    return tensor.full_tensor() if sliced(tensor) else tensor  # type: ignore[attr-defined]


def gather_into(plain: Network | None, net: Network) -> None:
    """Fill an ordinary network with the weights of one in slices, a tensor at a time; others pass None."""
    for name, tensor in net.state_dict().items():
        gathered = whole(tensor)
        if plain is not None:
            plain.state_dict()[name].copy_(gathered)


def slices_of(tensors: Mapping[str, Tensor], team: Team) -> dict[str, Slice]:
    """What this rank writes of these tensors; those that all have alike are the leader's to write."""
    found = {}
    for name, tensor in tensors.items():
        if sliced(tensor):
            begin, end = chunk(tensor.shape[0], team.rank, team.size)
            rows = local(tensor)
            assert rows.shape[0] == end - begin, "slices are cut as torch cuts them"
            found[name] = Slice(rows, begin, tuple(tensor.shape))
        elif team.leads:
            found[name] = Slice(tensor, 0, tuple(tensor.shape))
    return found


@torch.no_grad()
def put(target: Tensor, saved: Mapping[str, Tensor], name: str, team: Team) -> None:
    """Fill a tensor, or the slice of it that is here, with what was saved under `name`."""
    if not sliced(target):
        target.copy_(saved[name])
        return
    begin, end = chunk(target.shape[0], team.rank, team.size)
    read = getattr(saved, "rows", None)
    local(target).copy_(read(name, begin, end) if read else saved[name][begin:end])


def restore_moments(
    net: Network, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor], team: Team
) -> None:
    """Give an optimiser this rank's slices of its saved memory."""
    for name, parameter in net.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key}:{name}" not in saved:
                continue
            if key == "step":
                device = parameter.device if optimizer.defaults.get("fused") else "cpu"
                optimizer.state[parameter][key] = saved[f"{key}:{name}"].to(device)
            else:
                optimizer.state[parameter][key] = torch.zeros_like(parameter)
                put(optimizer.state[parameter][key], saved, f"{key}:{name}", team)
