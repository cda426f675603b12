"""Hooks by which `LocalUpdates` sees a model's forwards and loads, and the steps of all optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from dist_ssn.errors import UserError
from dist_ssn.sync.changes import Changes
from dist_ssn.sync.trained import Trained
from dist_ssn.torch_private import active_ddp


class Hook:
    """A hook of a module. In a copy of the module it does nothing, and it can be saved with the module.

    Args:
        call: what it does, outside of graphs of torch.compile.
    """

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> None:
        """Runs it; a hook that returns nothing changes nothing."""
        if self._call is not None and not torch.compiler.is_compiling():
            self._call(*arguments)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def watch_forwards(model: nn.Module, wrapper: nn.Module, begin: Callable[[], None]) -> RemovableHandle:
    """Before each forward of the model, refuses a DistributedDataParallel that LocalUpdates does not know.

    Args:
        model: without its wrapper.
        wrapper: as LocalUpdates got it.
        begin: is called then.
    """
    known = wrapper if isinstance(wrapper, DistributedDataParallel) else None

    def before_forward(*_: object) -> None:
        if (active := active_ddp()) is not None and active is not known:
            raise UserError(
                "this forward runs in a DistributedDataParallel, which averages gradients on every step, and LocalUpdates got the "
                "model inside of it: call the model itself, or, for islands, give LocalUpdates the wrapper"
            )
        begin()

    return model.register_forward_pre_hook(Hook(before_forward))


def watch_loads(model: nn.Module, trained: Sequence[Trained], call: Callable[..., None]) -> list[RemovableHandle]:
    """Calls `call` before each load into a module that has trained parameters of its own."""
    ours = {id(t.parameter) for t in trained}
    return [
        module.register_load_state_dict_pre_hook(Hook(call))
        for module in model.modules()
        if any(id(p) in ours for p in module.parameters(recurse=False))
    ]


def watch_steps(changes: Changes) -> RemovableHandle:
    """Reports the steps of all of this process's optimizers as long as `changes` lives."""
    reference = weakref.ref(changes)

    def before_any_step(optimizer: Optimizer, *_: object) -> None:
        if (living := reference()) is not None:
            living.before_any_step(optimizer)

    handle = register_optimizer_step_pre_hook(before_any_step)
    weakref.finalize(changes, handle.remove)
    return handle
