"""Refuses or tells what torch does to a part of a shared model by walking through its modules, where that misses the part's banks.

`state_dict`, `load_state_dict`, `deepcopy` and conversions such as `half` call each layer of a part, and pass no note on of the
module at which they began. So a shared layer finds that module in the callers' frames, and asks whether its bank is inside.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import sys
import sysconfig
import threading
import warnings
import weakref
from typing import Any

import torch
from torch import nn

import dist_ssn.errors
from dist_ssn.errors import ShareError
from dist_ssn.sharing.parts import listed, outside, set_trained, slots_of
from dist_ssn.sharing.places import warn_of_places
from dist_ssn.torch_private import MODULE_APPLY, MODULE_MEMBERS

COPIED = "dist_ssn"
"""Key in a deep copy's memo, whose other keys are integers: the ids of all modules that are being copied."""
NO_REPLICAS = (
    "a replica of DataParallel would read the original's banks, on the original's device: use DistributedDataParallel, one process "
    "per device"
)
"""Message for `nn.DataParallel` on several devices."""
_REMEDY = "share the part by itself, share(part, …)"
_state = threading.local()
_WALKS = {f.__code__ for f in (nn.Module.named_parameters, nn.Module.parameters)}
_USES = {
    inspect.unwrap(use).__code__: name
    for name, use in {
        "clip_grad_norm_": nn.utils.clip_grad_norm_,
        "clip_grad_value_": nn.utils.clip_grad_value_,
        "autograd.grad": torch.autograd.grad,
        "zero_grad": nn.Module.zero_grad,
        "parameters_to_vector": nn.utils.parameters_to_vector,
        "vector_to_parameters": nn.utils.vector_to_parameters,
        "stack_module_state": torch.func.stack_module_state,
    }.items()
}
"""Code of the functions that mean all parameters of the module whose `parameters()` they get, and their names."""
_INSTALLED = tuple(
    {
        *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        *(os.path.dirname(package) + os.sep for package in (torch.__file__, dist_ssn.errors.__file__)),
    }
)
_OF_LIGHTNING = {"freeze": False, "make_trainable": True}
"""Functions of Lightning's `BaseFinetuning` that set `requires_grad` in each module by itself, and to what."""
_listed: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules whose parameters somebody has listed, and was told


def _contains(key: Any, start: nn.Module, source: Any) -> bool:
    """True if `source` is a module inside `start`; `key` is an object that only this walk has."""
    if not _is_known(key, start):
        _state.known = (key, id(start), {id(module) for module in start.modules()})
    return id(source) in _state.known[2]


def _is_known(key: Any, start: nn.Module) -> bool:
    """True if a shared layer of this walk was seen before."""
    known = getattr(_state, "known", None)
    return known is not None and known[0] is key and known[1] == id(start)


def _lacking(layer: nn.Module, key: Any, start: nn.Module | None) -> list[str]:
    """Names of the layer's weights whose bank is outside of `start`."""
    if start is None:
        return []
    return [s.weight_name(i) for s, i in slots_of(layer).values() if not _contains(key, start, s)]


def _start(code: Any, local: str, value: Any) -> nn.Module | None:
    """The module at which a recursive method of `nn.Module` began; None if the method is not running.

    torch passes no note of it on, so the callers' frames are read.

    Args:
        code: the method's code.
        local: a local variable that all frames of this walk have in common.
        value: its value.
    """
    found, frame = None, sys._getframe(2)
    while frame is not None:
        if frame.f_code is code and frame.f_locals.get(local) is value:
            found = frame.f_locals["self"]
        frame = frame.f_back
    return found


def check_saved(layer: nn.Module, destination: Any) -> None:
    """Refuses `part.state_dict()`, which would lack the part's weights.

    Args:
        layer: a shared layer whose entries are being saved.
        destination: the state dict that is being filled.

    Raises:
        ShareError: the walk did not begin around the layer's bank.
    """
    start = _start(nn.Module.state_dict.__code__, "destination", destination)
    key = getattr(destination, "_metadata", destination)
    if start is not None and not _is_known(key, start):
        warn_of_places(start)
    if names := _lacking(layer, key, start):
        raise ShareError(
            f"the state dict of this {type(start).__name__} would lack its weights ({listed(names)}), which a bank outside of it "
            f"generates: save the whole model's state dict or materialize(part)'s, or {_REMEDY}"
        )


def check_loaded(layer: nn.Module, missing: list[str], prefix: str) -> None:
    """Adds the weights that `part.load_state_dict()` cannot load to the missing keys.

    Args:
        layer: a shared layer that is being loaded.
        missing: the missing keys of this walk.
        prefix: of the layer's keys.
    """
    start, frame = None, sys._getframe(1)
    while frame is not None and start is None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            start = frame.f_locals["self"]
        frame = frame.f_back
    if start is None:
        return
    for name, (source, _) in slots_of(layer).items():
        if not _contains(missing, start, source):
            missing.append(f"{prefix}{name} (generated by a bank outside of this part: load the whole model)")


def check_copied(layer: nn.Module) -> None:
    """Refuses `copy.deepcopy(part)`, whose weights nothing could train, average or move any more.

    Args:
        layer: a shared layer that is being copied or pickled; pickling is allowed, since the bank travels along.

    Raises:
        ShareError: no module around the bank is being copied.
    """
    frame: Any = sys._getframe(2)
    if frame.f_code is not copy.deepcopy.__code__:
        return
    memo, around = frame.f_locals["memo"], layer
    sources = {id(source): source for source, _ in slots_of(layer).values()}
    inside = memo.setdefault(COPIED, set())
    while frame is not None and not sources.keys() <= inside:
        if frame.f_code is copy.deepcopy.__code__ and frame.f_locals["memo"] is memo:
            copied = frame.f_locals["x"]
            if isinstance(copied, nn.Module):
                around = copied
                if id(copied) not in inside:
                    inside.update(id(module) for module in copied.modules())
        frame = frame.f_back
    if sources.keys() <= inside:
        return
    names = [source.weight_name(index) for source, index in slots_of(layer).values()]
    raise ShareError(
        f"a deep copy of this {type(around).__name__} would have no parameters for its weights ({listed(names)}), which a bank "
        f"outside of it generates: copy the whole model, or materialize(part) for a dense copy, or {_REMEDY}"
    )


def check_converted(layer: nn.Module, fn: Any) -> None:
    """Refuses `part.half()`, `part.to(…)` and their kind, which would leave the part's bank as it is.

    Args:
        layer: a shared layer that is being converted.
        fn: the conversion of a tensor.

    Raises:
        ShareError: the walk did not begin around the layer's bank, and the conversion would change it.
    """
    for source, index in slots_of(layer).values():
        probe = torch.empty(0, dtype=source.dtype, device=source.device)
        with torch.no_grad():
            result = fn(probe)
        same = (result.dtype, result.device) == (source.dtype, source.device)
        if same and (source.device.type != "cpu" or not result.is_shared() or next(source.parameters()).is_shared()):
            continue
        start = _start(MODULE_APPLY.__code__, "fn", fn) or layer
        if not _contains(fn, start, source):
            what = f"to {result.dtype}, {result.device}" if not same else "to shared memory"
            raise ShareError(
                f"converting this {type(start).__name__} {what} would leave {source.weight_name(index)} as it is, because a bank "
                f"outside of it generates the weight: convert the whole model, or {_REMEDY}"
            )


def check_listed(layer: nn.Module) -> None:
    """Warns, once for a part, if somebody runs through `part.parameters()`, which lacks the part's banks.

    `part.requires_grad_(…)`, which runs through them, too, works: it freezes or trains the layer's weights with the others.

    Told are the functions in `_USES`, and all code that is not installed: a script's lists and loops. An installed framework
    is not judged, because nobody knows what it wants them for, and an optimizer is checked at its first step.

    Args:
        layer: a shared layer whose modules have been listed. `next(part.parameters())` stops before, at the first parameter.
    """
    frame: Any = sys._getframe(2)
    depth = 3  # of the frame in which the use was called, for the warning
    while frame is not None and frame.f_code is nn.Module.named_modules.__code__:
        frame, depth = frame.f_back, depth + 1
    if frame is not None and frame.f_code is nn.Module.modules.__code__:
        _follow_lightning(layer, frame.f_back)
    if frame is None or frame.f_code is not MODULE_MEMBERS:
        return
    walk, frame = frame, frame.f_back
    while frame is not None and frame.f_code in _WALKS:
        frame, depth = frame.f_back, depth + 1
    if frame is not None and frame.f_code is nn.Module.requires_grad_.__code__:
        start, trained = walk.f_locals["self"], frame.f_locals["requires_grad"]
        key = walk.f_locals["get_members_fn"]
        # Of a model that is frozen whole, the banks get the flag.
        if trained or not all(_contains(key, start, source) for source, _ in slots_of(layer).values()):
            set_trained(layer, trained)
        return
    if frame is None or (start := walk.f_locals["self"]) in _listed:
        return
    if _is_installed(frame.f_code.co_filename):
        while frame is not None and frame.f_code.co_name == "<listcomp>":
            frame, depth = frame.f_back, depth + 1
        if frame is None or (name := _USES.get(frame.f_code)) is None:
            return
        while frame.f_back is not None and frame.f_back.f_code.co_filename == frame.f_code.co_filename:
            frame, depth = frame.f_back, depth + 1  # a decorator
        depth += 1
        told, remedy = f"{name} got the parameters of this {type(start).__name__}, which lack", ""
    else:
        told = f"the parameters() of this {type(start).__name__} lack"
        remedy = "; if they shall not train, dist_ssn.freeze(model, …)"
    _listed.add(start)
    if lacking := listed(weight for weights in outside(start).values() for weight in weights):
        warnings.warn(
            f"{told} the bank outside of it that generates {lacking}: use dist_ssn.parameters_of(part){remedy}",
            stacklevel=depth + 1,
        )


def _follow_lightning(layer: nn.Module, frame: Any) -> None:
    """Freezes or trains a layer's weights where Lightning does so with its parameters, of which it may have none."""
    while frame is not None and frame.f_code.co_name in ("<listcomp>", "flatten_modules"):
        frame = frame.f_back
    if frame is None or frame.f_code.co_name not in _OF_LIGHTNING:
        return
    if frame.f_code.co_filename.endswith(os.path.join("callbacks", "finetuning.py")):
        set_trained(layer, _OF_LIGHTNING[frame.f_code.co_name])


@functools.cache
def _is_installed(file: str) -> bool:
    """True for the standard library, this package, and all that pip has installed."""
    return file.startswith(("<frozen", *_INSTALLED))
