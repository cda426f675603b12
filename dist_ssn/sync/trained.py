"""The parameters that take part in a synchronization, and models that cannot take part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dist_ssn.errors import UserError
from dist_ssn.sharing.bank import banks_of
from dist_ssn.torch_private import inside_compiled


@dataclass(frozen=True)
class Trained:
    """A parameter that takes part.

    Args:
        name: its name in the model.
        parameter: as the optimizer holds it.
        plain: it travels apart from banks and weights: gains, coefficients, biases and norms.
    """

    name: str
    parameter: Tensor
    plain: bool

    @property
    def values(self) -> Tensor:
        """This process's values, which share the parameter's memory: the shard of a sharded parameter."""
        return values_of(self.parameter)


def values_of(parameter: Tensor) -> Tensor:
    """This process's values of a parameter, which share its memory."""
    parameter = parameter.detach()
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def check_model(model: nn.Module) -> None:
    """Checks that all of a model's parameters and buffers have values that can be sent.

    Raises:
        UserError: one has no shape, no memory or another layout, and is named.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise UserError(f"{name} has no shape yet: run a forward before LocalUpdates and the optimizer are made")
        if tensor.is_meta:
            raise UserError(f"{name} is on the meta device: give the model memory and values before local updates")
        if not _is_dense(tensor):
            raise UserError(
                f"{name} is sparse, quantized or expanded, and local updates send dense tensors only: keep a dense copy "
                "(to_dense(), dequantize(), clone()), or keep it in an attribute that is no buffer"
            )


def _is_dense(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_quantized:
        return False
    return not any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))


def trained_parameters(model: nn.Module, optimizer: Optimizer) -> list[Trained]:
    """The parameters of `model` that `optimizer` trains, once each, those that a codec packs first.

    Raises:
        UserError: the optimizer trains nothing of the model, parameters of another model, or parameters that are not real
            floating-point values of one device.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    if strangers := [p for key, p in held.items() if key not in names]:
        raise UserError(
            f"the optimizer holds {len(strangers)} of {len(held)} parameters that are not the model's (the first has the shape "
            f"{tuple(strangers[0].shape)}): give LocalUpdates the model that this optimizer trains"
        )
    plain = plain_ones(model)
    found = [
        Trained(names[key], p, key in plain)
        for key, p in ((id(p), p) for p in model.parameters())
        if key in held and p.requires_grad
    ]
    if not any(t.parameter.numel() for t in found):
        raise UserError("the optimizer trains no parameter of the model, so there is nothing to synchronize")
    for trained in found:
        if not trained.parameter.is_floating_point():
            raise UserError(
                f"{trained.name} is of {trained.parameter.dtype}: local updates average real floating-point values only"
            )
    if len(devices := {trained.values.device for trained in found}) > 1:
        raise UserError(
            f"the model's parameters are on several devices ({', '.join(sorted(map(str, devices)))}): use one"
        )
    return sorted(found, key=lambda trained: trained.plain)  # sorted() keeps the order of equal ones


def plain_ones(model: nn.Module) -> set[int]:
    """The ids of the parameters that travel apart from banks and weights: gains, coefficients, biases and norms."""
    small = {id(p) for bank in banks_of(model) for p in (bank.coefficients, bank.gains)}
    of_banks = {id(p) for bank in banks_of(model) for p in bank.parameters(recurse=False)}
    return small | {id(p) for p in model.parameters() if p.ndim < 2 and id(p) not in of_banks}


def unwrapped(model: nn.Module, group: Any) -> tuple[nn.Module, dist.ProcessGroup | None, bool]:
    """The model without its wrappers, and its island.

    Args:
        model: as the user's script calls it.
        group: the processes that the changes are averaged over; None for all.

    Returns:
        (the model itself, the processes of its island or None, True if its parameters are sharded over the island).

    Raises:
        UserError: its wrapper or its engine would average over the same processes on every step, or keeps parameters in a form
            that cannot be averaged.
    """
    model = inside_compiled(model)
    kind = type(model)
    if any(base.__module__.startswith("deepspeed.") for base in kind.__mro__) or any(
        hasattr(p, "ds_id") for p in model.parameters()
    ):
        raise UserError(
            "local updates do not work with DeepSpeed, whose engine averages gradients on every step and owns the parameters: "
            "use DDP over an island, FSDP2 over an island, or the model itself"
        )
    if any(base.__name__ == "FullyShardedDataParallel" for base in kind.__mro__):
        raise UserError(
            "local updates do not work with FSDP1 (FullyShardedDataParallel): shard with fully_shard (FSDP2)"
        )
    island: Any = None
    if isinstance(model, DistributedDataParallel):
        island = model.process_group
        _require_apart(island, group, "DistributedDataParallel")
        model = inside_compiled(model.module)
    if (mesh_group := _mesh_group(model)) is not None:
        _require_apart(mesh_group, group, "FSDP2")
        island = mesh_group
    island = island if island is not None and dist.get_world_size(island) > 1 else None
    return model, island, island is not None and mesh_group is not None


def _mesh_group(model: nn.Module) -> Any:
    """The process group that the model's parameters are sharded over; None if they are whole."""
    sharded = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    meshes = {p.device_mesh for p in sharded.values()}
    if not meshes:
        return None
    if len(meshes) > 1 or next(iter(meshes)).ndim > 1:
        raise UserError(
            "local updates take parameters that are sharded over one mesh of one dimension, the island; these have "
            f"{len(meshes)} meshes, of {', '.join(sorted(str(mesh.ndim) for mesh in meshes))} dimensions"
        )
    return next(iter(meshes)).get_group()


def _require_apart(inside: dist.ProcessGroup, group: Any, what: str) -> None:
    """Checks that no process of an island but this one is among those that the changes are averaged over."""
    if common := _both_in(inside, group):
        raise UserError(
            f"{what} averages over rank {', '.join(map(str, common))} on every step, and local updates would average "
            "over it again: give the model itself (DDP's .module) and drop the wrapper, or make islands: wrap it over the "
            "processes of the island, and give LocalUpdates a `group` across the islands"
        )


def require_own_steps(optimizer: Optimizer, group: Any) -> None:
    """Refuses an optimizer whose steps send parameters to the other workers.

    Args:
        optimizer: the innermost one.
        group: the processes that the changes are averaged over; None for all.

    Raises:
        UserError: it does.
    """
    inside = getattr(optimizer, "process_group", None)
    if isinstance(inside, dist.ProcessGroup) and (common := _both_in(inside, group)):
        raise UserError(
            f"the steps of {type(optimizer).__name__} send parameters to rank {', '.join(map(str, common))}, so that no worker "
            "trains apart: give each worker the plain optimizer, or shard it over an island"
        )


def _both_in(inside: dist.ProcessGroup, group: Any) -> list[int]:
    """Ranks of other processes in `inside` that the changes are averaged over, too."""
    of_group = group if isinstance(group, dist.ProcessGroup) else None  # a transport has all processes
    both = set(dist.get_process_group_ranks(inside)) & set(dist.get_process_group_ranks(of_group))
    return sorted(both - {dist.get_rank()})
