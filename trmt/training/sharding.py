"""Sharded training for networks that do not fit on one device: each rank keeps some rows of every tensor.

This is FSDP2 of torch. The matrices of a layer are gathered when its first module is called and freed after
its last; gradients are summed into the ranks' rows. Parameters outside of layers (embeddings) and small ones
(norms, which networks may use without calling them) stay gathered from the beginning of a step to its end,
because the loss computes logits after the network's own forward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trmt.bundles.slices import TensorSlice, row_range
from trmt.devices.hardware import has_nccl
from trmt.errors import ConfigError
from trmt.nets.base import Network
from trmt.training.distributed import Distributed


def shard(net: Network, distributed: Distributed, device: torch.device) -> None:
    """Split every parameter of `net` by rows over the ranks."""
    # Imported here because they take most of a second to load, and few runs are sharded.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not net.layers_called_once:
        raise ConfigError(
            f"training.shard does not work with {type(net).__name__}, whose layers are not each called once; "
            "leave it out, or choose another architecture"
        )
    if device.type == "cuda" and not has_nccl():
        raise ConfigError(
            "training.shard needs NCCL on GPUs, which this build of PyTorch does not have; leave it out"
        )
    # The warning is about in-place operations on a module's output; the gradient tests would show one.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (distributed.world_size,))
    for layer in layers(net):
        # The modules inside and not the layer: networks call what is in a layer, never the layer itself.
        if modules := [module for module in layer.modules() if has_matrix(module)]:
            fully_shard(modules, mesh=mesh)
    fully_shard(net, mesh=mesh, reshard_after_forward=False)
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # gradients are sums; they are divided by tokens already
            module.set_force_sum_reduction_for_comms(True)


def layers(net: nn.Module) -> list[nn.Module]:
    """The layers of a network: what stands in its module lists."""
    return [layer for module in net.modules() if isinstance(module, nn.ModuleList) for layer in module]


def has_matrix(module: nn.Module) -> bool:
    """Whether the module itself, without its children, has a parameter of two or more axes."""
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def reshard(net: nn.Module) -> None:
    """Free gathered weights: after a forward pass without a backward pass they would hide later changes."""
    for module in net.modules():
        if free := getattr(module, "reshard", None):
            free()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only some rows of the tensor."""
    return hasattr(tensor, "to_local")  # a DTensor, whose class would have to be imported


def local_rows(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this rank holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if it is sharded: for all ranks to call together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gather_into(target: Network | None, net: Network) -> None:
    """Fill an ordinary network with the weights of a sharded one, tensor by tensor; other ranks pass None."""
    for name, tensor in net.state_dict().items():
        gathered = full_tensor(tensor)
        if target is not None:
            target.state_dict()[name].copy_(gathered)


def slices_to_save(tensors: Mapping[str, Tensor], distributed: Distributed) -> dict[str, TensorSlice]:
    """What this rank writes of these tensors; those that are the same on all ranks are written by rank 0."""
    found = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            begin, end = row_range(tensor.shape[0], distributed.rank, distributed.world_size)
            rows = local_rows(tensor)
            assert rows.shape[0] == end - begin, "row_range splits as torch does"
            found[name] = TensorSlice(rows, begin, tuple(tensor.shape))
        elif distributed.is_main:
            found[name] = TensorSlice(tensor, 0, tuple(tensor.shape))
    return found


def saved_shape(saved: Mapping[str, Tensor], name: str) -> torch.Size:
    """The shape of a saved tensor, without reading it where it is saved in slices."""
    shape = getattr(saved, "shape", None)
    return torch.Size(shape(name)) if shape else saved[name].shape


@torch.no_grad()
def load_tensor(target: Tensor, saved: Mapping[str, Tensor], name: str, distributed: Distributed) -> None:
    """Copy the tensor saved under `name` into `target`, or the rows of it that this rank holds."""
    if saved_shape(saved, name) != target.shape:  # copying would repeat the rows of some other shapes
        raise RuntimeError(f"{name!r} is of another shape")
    if not is_sharded(target):
        target.copy_(saved[name])
        return
    begin, end = row_range(target.shape[0], distributed.rank, distributed.world_size)
    read_rows = getattr(saved, "rows", None)
    local_rows(target).copy_(read_rows(name, begin, end) if read_rows else saved[name][begin:end])
