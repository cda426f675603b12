"""Agreement of the ranks on a bank's scales and structure: rank 0's scales are everybody's, and all structures are equal.

A bank has its scales and a fingerprint of its structure in buffers. DDP copies rank 0's buffers to all ranks when it is made. Other
wrappers, and DDP with `broadcast_buffers=False`, don't: then the first forward that all ranks must be in sends them, once. These
buffers never change afterwards, so DDP is asked to leave them out of the broadcast before each forward.

Kept weights (`bases.py`) are compared in the same way: a bank has their fingerprints in a buffer.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ssn.errors import ShareError
from dist_ssn.plan.slots import Group
from dist_ssn.sharing.bases import as_rows, different, fingerprint, frozen_beside
from dist_ssn.sharing.start_values import check_starts
from dist_ssn.torch_private import fsdp_mesh, leave_out_buffers, leave_out_parameters

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
"""Classes around a model, by name, whose forward with gradients all ranks run together."""


def structure_of_bank(group: Group, seed: int) -> Tensor:
    """Fingerprint [1] of a bank's structure, equal on every machine."""
    digest = hashlib.sha256(f"{group!r}/{seed}".encode()).digest()
    return torch.tensor([int.from_bytes(digest[:8], "little", signed=True)])


def is_wrapper(module: object) -> bool:
    """True for a wrapper whose ranks must agree."""
    return any(kind.__name__ in _WRAPPERS for kind in type(module).__mro__)


def watch_wrapper(wrapper: nn.Module, model: nn.Module, banks: list[Any]) -> None:
    """Lets a wrapper's first forward check that its ranks agree.

    Args:
        wrapper: its constructor is about to take a shared model.
        model: the shared model.
        banks: of the model.
    """
    if not banks:
        return
    check_starts(model)
    require_frozen = _replace_frozen(wrapper, model, banks)

    def before_forward(wrapper: nn.Module, *_: Any) -> None:
        synced = leave_out_buffers(wrapper, [buffer for bank in banks for buffer in bank.fixed_buffers()])
        if not synced and not torch.is_grad_enabled():  # perhaps an evaluation by rank 0 alone
            return
        handle.remove()
        for bank in banks:
            _agree(bank, [] if synced else [_group_of(wrapper)])
        require_frozen()

    hook: Any = torch.compiler.disable(before_forward)
    handle = wrapper.register_forward_pre_hook(hook)


def _replace_frozen(wrapper: nn.Module, model: nn.Module, banks: list[Any]) -> Callable[[], None]:
    """Has DDP send fingerprints instead of the kept values outside of the banks.

    Args:
        wrapper: see `watch_wrapper`; other wrappers than DDP send or shard these values as they do.
        model: see `watch_wrapper`.
        banks: one of them gets the fingerprints as a buffer.

    Returns:
        The comparison with rank 0's, for after the broadcast.
    """
    kept = frozen_beside(model)
    if not kept or not leave_out_parameters(wrapper, kept):
        return lambda: None
    mine = [fingerprint(parameter) for parameter in kept.values()]
    banks[0].register_buffer("frozen_fingerprints", as_rows(mine, banks[0].device), persistent=False)

    def compare() -> None:
        if others := different(list(kept), mine, banks[0].frozen_fingerprints):
            raise ShareError(
                f"rank 0 has other values of {others[0]} ({len(others)} of the {len(kept)} frozen parameters differ), which nobody "
                "sends: load the same pretrained values on all ranks"
            )

    return compare


def agree_under_deepspeed(banks: Iterable[Any]) -> None:
    """Gives all ranks rank 0's scales, if DeepSpeed's engine runs the first forward of these banks with gradients.

    Its engine takes a module without torch's registration, so `watch_wrapper` does not see it: the callers' frames have it.
    """
    waiting = [bank for bank in banks if not bank.agreed]
    if not waiting or "deepspeed" not in sys.modules or not dist.is_initialized() or not torch.is_grad_enabled():
        return
    engine, frame = None, sys._getframe(1)
    while frame is not None and engine is None:
        if frame.f_code.co_name == "forward" and is_wrapper(found := frame.f_locals.get("self")):
            engine = found
        frame = frame.f_back
    if engine is not None:
        for bank in waiting:
            _agree(bank, [_group_of(engine)])


def agree_under_fsdp2(bank: Any) -> None:
    """Gives all ranks rank 0's scales, if FSDP2 has sharded the bank: it has just gathered it, so all ranks are here."""
    mesh = fsdp_mesh(bank)
    if mesh is not None:
        _agree(bank, mesh.get_all_groups())


def _group_of(wrapper: object) -> Any:
    """The process group of DDP, FSDP1 or DeepSpeed's engine; None for all processes."""
    return getattr(wrapper, "process_group", None) or getattr(wrapper, "data_parallel_group", None)


def _agree(bank: Any, groups: Iterable[Any]) -> None:
    """Gives the processes of these groups the first one's scales, and checks that they have its structure and kept values."""
    for group in groups:
        _send(bank, group)
    bank.require_structure()
    bank.require_base()
    bank.agreed = True


def _send(bank: Any, process_group: Any) -> None:
    """Copies the buffers of the group's first rank to the others."""
    from dist_ssn.comm.meter import purpose  # only where something is sent: `import dist_ssn` stays light

    first = 0 if process_group is None else dist.get_global_rank(process_group, 0)
    with purpose("initialization"), torch.no_grad():
        for buffer in bank.fixed_buffers():
            dist.broadcast(buffer, src=first, group=process_group)
