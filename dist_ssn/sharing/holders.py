"""Search for other holders of a weight's tensor when a model is shared, such as a list or a closure: they would read old values."""

from __future__ import annotations

import functools
import gc
import types
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_MOST = 8
"""Number of held weights whose holders are looked for, since each search passes over all objects."""
_PASSING = (types.FrameType, types.GeneratorType)


def warn_of_holders(weights: Mapping[str, torch.Tensor], model: nn.Module) -> bool:
    """Warns of the first object, other than the model's modules, that keeps the tensor of a weight.

    Local and global variables are not reported, because a loop over `named_parameters()` leaves one behind.

    Args:
        weights: the weights with more references than the model's own, or views of them, by name.
        model: is about to be shared.

    Returns:
        Whether there was one.
    """
    if not weights:
        return False
    names = {id(tensor): name for name, tensor in list(weights.items())[:_MOST]}
    found = (*weights.values(),)[:_MOST]  # a tuple: from a list, a call with *found makes one that is found, too
    known = {id(weights), id(found)}
    for module in model.modules():
        known |= {id(module._parameters), id(module.__dict__.get("_flat_weights"))}
    for holder in gc.get_referrers(*found):
        is_globals = type(holder) is dict and "__builtins__" in holder
        if id(holder) in known or is_globals or isinstance(holder, _PASSING):
            continue
        things = {id(thing) for thing in gc.get_referents(holder)}
        held = next((name for thing, name in names.items() if thing in things), None)
        if held is not None:
            warnings.warn(
                f"{held} is also kept by {_kind(holder)}: what reads it there reads the values of before sharing, which do not "
                f"train; read it from its layer at each use, or keep it dense, exclude={held!r}",
                stacklevel=4,
            )
            return True
    return False


def views_of(weights: dict[str, nn.Parameter], model: nn.Module) -> dict[str, torch.Tensor]:
    """For each weight the first tensor with its memory that is none of the model's own, such as `weight.t()` or `weight.detach()`.

    Args:
        weights: the weights whose memory other tensors have, too, by name.
        model: is about to be shared.
    """
    if not weights:
        return {}
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # an older norm, or pruning, has its result in the weight's place
        own |= {id(value) for name, value in module.__dict__.items() if f"{name}_orig" in module._parameters}
    memory = {weight.untyped_storage()._cdata: name for name, weight in weights.items()}
    found: dict[str, torch.Tensor] = {}
    for thing in gc.get_objects():
        if type(thing) not in (torch.Tensor, nn.Parameter) or id(thing) in own or thing.layout is not torch.strided:
            continue
        if name := memory.get(thing.untyped_storage()._cdata):
            found.setdefault(name, thing)
    return found


def _kind(holder: Any) -> str:
    """The kind of object that keeps a tensor, in words."""
    if isinstance(holder, types.CellType):
        return "the closure of a function"
    if isinstance(holder, (dict, tuple)):
        around = gc.get_referrers(holder)
        around += [owner for part in around if type(part) is dict for owner in gc.get_referrers(part)]
        for owner in around:
            if isinstance(owner, functools.partial):
                return "a functools.partial"
            if isinstance(owner, types.FunctionType) and (
                owner.__defaults__ is holder or owner.__kwdefaults__ is holder
            ):
                return f"a default argument of {owner.__qualname__}()"
            if isinstance(owner, nn.Module):
                kind = type(owner).__name__
                return (
                    f"an attribute of a {kind}"
                    if owner.__dict__ is holder
                    else f"a {kind} that is no part of the model"
                )
    name = type(holder).__name__
    if hasattr(holder, "__dict__"):  # from Python 3.13 on, attributes are in the object itself
        return f"an attribute of a {name}"
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
