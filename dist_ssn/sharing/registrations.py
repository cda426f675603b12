"""Registrations of torch's tools in modules: shared layers in the module of a symbolic trace, generated weights as buffers.

torch calls these hooks when a module or a buffer is registered, and at no other time.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.module import register_module_buffer_registration_hook, register_module_module_registration_hook

from dist_ssn.errors import ShareError
from dist_ssn.sharing.agreement import is_wrapper, watch_wrapper
from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.read_only import GeneratedWeight


@functools.cache
def watch_registrations() -> None:
    """Registers the hooks of this file, once in a process."""
    register_module_module_registration_hook(_keep_banks)
    register_module_module_registration_hook(_watch_wrapper)
    register_module_buffer_registration_hook(_refuse_generated)


def _keep_banks(parent: nn.Module, _: str, child: Any) -> None:
    """Gives a traced module the banks of the layers that `torch.fx` copies into it, so that they are trained, saved and moved.

    `torch.fx` puts nested layers into plain `nn.Module`s of its own.
    """
    if not isinstance(child, nn.Module) or not (isinstance(parent, GraphModule) or type(parent) is nn.Module):
        return
    there = {*parent.modules(), *child.modules()}
    for layer in child.modules():
        for source, _index in layer.__dict__.get("_dist_ssn_slots", {}).values():
            if source not in there:
                there.add(source)
                parent.add_module(f"dist_ssn_{source.group.name if hasattr(source, 'group') else 'weights'}", source)


def _watch_wrapper(parent: nn.Module, _: str, child: Any) -> None:
    """Lets the ranks of a wrapper such as DDP agree on the scales of a shared model."""
    if is_wrapper(parent) and isinstance(child, nn.Module):
        watch_wrapper(parent, child, [module for module in child.modules() if isinstance(module, Bank)])


def _refuse_generated(module: nn.Module, name: str, buffer: Tensor | None) -> None:
    """Refuses a generated weight as a buffer, where `torch.nn.utils.parametrize` would put it.

    Raises:
        ShareError: always, for a generated weight.
    """
    if isinstance(buffer, GeneratedWeight):
        what = buffer._dist_ssn_name
        raise ShareError(
            f"{what} is generated from a bank, and cannot be a buffer {name!r} of {type(module).__name__}: register a "
            "parametrization before share() or on materialize(model), or copy the values, weight.detach().clone()"
        )
