"""The undocumented functions of PyTorch that we use, in one place (tried with torch 2.13).

PyTorch's own Python code uses each of them, too: activation checkpointing `graph_task_id`, AOTAutograd `saved_tensor_hooks`, and
FSDP2 `at_end_of_backward`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import _symbolic_trace

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


def graph_task_id() -> int:
    """Id of the backward pass that runs on this thread; -1 outside of a backward."""
    return torch._C._current_graph_task_id()


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Registers a callback for the end of the backward that runs on this thread; callbacks run in the order of registration."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # pyright: ignore[reportAttributeAccessIssue]


def is_tracing() -> bool:
    """True while torch.compile, a transform of torch.func or torch.fx traces; then only plain operations may run."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:  # pyright: ignore
        return True
    return _symbolic_trace._is_fx_tracing_flag


def saved_tensor_hooks() -> Hooks | None:
    """The innermost (pack, unpack) hooks for saved tensors that are active on this thread; None without any."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore


def active_ddp() -> torch.nn.Module | None:
    """The DistributedDataParallel whose forward runs; None outside of one."""
    return getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long a collective of this process group may take."""
    return group._get_backend(group._device_types[0]).options._timeout


def inside_compiled(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside `torch.compile(module)`; any other module itself."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # there is no compiled module before it is imported
    return model._orig_mod if dynamo and isinstance(model, dynamo.OptimizedModule) else model  # pyright: ignore


def assert_soon(condition: torch.Tensor, message: str) -> None:
    """Asserts a condition that is on a device, without waiting for it."""
    torch._assert_async(condition, message)  # pyright: ignore


def storage_uses(tensor: torch.Tensor) -> int:
    """Number of tensors, of Python or of a graph, that hold the storage of `tensor`."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # pyright: ignore


def leave_out_buffers(wrapper: torch.nn.Module, buffers: Sequence[torch.Tensor]) -> bool:
    """Asks DDP not to broadcast some buffers before each forward; True if it has done so when it was made.

    Args:
        wrapper: a DistributedDataParallel, or any other wrapper, of which nothing is asked.
        buffers: of its module.
    """
    if not isinstance(wrapper, torch.nn.parallel.DistributedDataParallel):
        return False
    names = {name for name, buffer in wrapper.module.named_buffers() if any(buffer is other for other in buffers)}
    wrapper.parameters_to_ignore |= names
    wrapper._assign_modules_buffers()  # pyright: ignore
    return bool(getattr(wrapper, "forward_sync_buffers", getattr(wrapper, "broadcast_buffers", False)))


def fsdp_mesh(module: torch.nn.Module) -> Any:
    """The device mesh over which FSDP2 has sharded the module's own parameters; None if it has not."""
    states = sys.modules.get("torch.distributed._composable_state")  # there is no FSDP2 before it is imported
    for reference in list(states._module_state_mapping.values()) if states else ():
        for group in getattr(reference(), "_fsdp_param_groups", None) or [
            getattr(reference(), "_fsdp_param_group", None)
        ]:
            if group is not None and any(p._module_info.module is module for p in group.fsdp_params):
                return group.mesh_info.mesh
    return None


def storage_users(tensor: torch.Tensor) -> int:
    """Number of tensors that have the memory of this one, itself among them; 1 where torch does not tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return 1 if count is None else count(tensor.untyped_storage()._cdata) - 1
