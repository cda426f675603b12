"""`GeneratedWeight`: a layer's weight, read outside of a forward of torch's own. Reading is allowed, writing is an error.

A generated weight is a temporary tensor: values that `nn.init` or `weight.data.normal_()` writes to it would be lost silently.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_ssn.errors import ShareError
from dist_ssn.torch_private import BASE_OF, without_torch_function


class GeneratedWeight(Tensor):
    """A weight that a user's code has read: a temporary tensor that must not be written to."""

    _dist_ssn_name: str = ""
    _dist_ssn_inside: bool = False
    """Read in the forward of its layer."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # it traces these lines, and cannot read names
            if func in _WRITERS and isinstance(args[0], GeneratedWeight):
                raise ShareError(no_write(args[0]._dist_ssn_name, args[0]._dist_ssn_inside))
            with without_torch_function():
                return func(*args, **(kwargs or {}))
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        written: Any = kwargs.get("out")
        foreach = name.startswith("_foreach_")
        if (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__"):
            written = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        elif name.startswith("__i") and name[3:-2] in _IN_PLACE:
            written = args[0]
        elif kwargs.get("max_norm") is not None and len(args) > 1:  # of an embedding
            written = args[1]
        mine = next((a for a in (args[0] if foreach and args else args) if isinstance(a, GeneratedWeight)), None)
        with without_torch_function():
            for target in written if isinstance(written, (list, tuple)) else [written]:
                if isinstance(target, GeneratedWeight) and name not in _HARMLESS:
                    raise ShareError(no_write(target._dist_ssn_name, target._dist_ssn_inside))
            if name in _EXPORTS and mine is not None:
                raise ShareError(
                    f"{mine._dist_ssn_name} is generated from a bank, so what is written through DLPack would be lost: export a "
                    "copy, weight.detach().clone()"
                )
            if name in _OF_THIS_TENSOR and mine is not None:
                warnings.warn(
                    f"{name} on {mine._dist_ssn_name} is for the tensor of this one read: the layer's forward generates another, "
                    "so the loss does not reach it there; take the gradient with respect to the bank, or train materialize(model)",
                    stacklevel=3,
                )
            result = func(*args, **kwargs)
            if isinstance(result, np.ndarray):
                result.flags.writeable = False  # it may share the weight's memory
            return result if mine is None or foreach or func == BASE_OF else _guard_views(result, mine)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute, with a warning if it is lost with this tensor; `nn.Parameter` of the weight is refused."""
        if name == "_is_param":  # nn.Parameter sets it
            raise ShareError(
                f"a Parameter made of {self._dist_ssn_name} would train without the bank that generates it: use the weight itself, "
                "or a copy, nn.Parameter(weight.detach().clone())"
            )
        known = getattr(Tensor, name, None)  # writing to `data` and `grad` is refused where they are set
        if not hasattr(known, "__set__") and not name.startswith(OF_FRAMEWORKS):
            warnings.warn(
                f"{name} of {self._dist_ssn_name} is set on the tensor of this one read: the next read generates another, and an "
                "optimizer holds the bank; set it before share(), on weights that have a bank of their own (mapping=)",
                stacklevel=2,
            )
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A copy of the values, without a graph: torch refuses to copy a tensor that is the result of an operation."""
        with without_torch_function():
            memo[id(self)] = copied = guarded(self.detach().as_subclass(Tensor).clone(), self._dist_ssn_name)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the values as an ordinary tensor, which torch loads without this package."""
        with without_torch_function():
            return self.detach().as_subclass(Tensor).__reduce_ex__(protocol)


def _guard_views(result: Any, weight: GeneratedWeight) -> Any:
    """`result`, with the tensors that share the weight's memory guarded like the weight."""
    if isinstance(result, (list, tuple)) and type(result) in (list, tuple):
        return type(result)(_guard_views(part, weight) for part in result)
    if type(result) is not Tensor or result.layout is not torch.strided or not result.numel():
        return result
    same = result.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
    return guarded(result, weight._dist_ssn_name, weight._dist_ssn_inside) if same else result


_IN_PLACE = {"add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"}
_EXPORTS = {"__dlpack__", "to_dlpack"}
_OF_THIS_TENSOR = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
OF_FRAMEWORKS = ("_dist_ssn", "_dynamo", "_is_hf_initialized")
"""Beginnings of attributes by which a program keeps notes of its own."""
_HARMLESS = {"requires_grad_", "retain_grad", "rename_"}
_WRITERS = frozenset(
    getattr(Tensor, name)
    for name in {*dir(Tensor)} - _HARMLESS
    if name == "__setitem__"
    or (name.endswith("_") and not name.endswith("__"))
    or (name.startswith("__i") and name[3:-2] in _IN_PLACE)
)
"""Methods that write to their tensor."""


def guarded(weight: Tensor, name: str, inside: bool = False) -> Tensor:
    """The weight as a tensor that must not be written to.

    Args:
        weight: as it was generated.
        name: in error messages.
        inside: it is read in the forward of its layer.
    """
    result = weight.as_subclass(GeneratedWeight)
    result._dist_ssn_name, result._dist_ssn_inside = name, inside
    return result


def no_write(name: str, inside: bool = False) -> str:
    """The error message for a write to the weight `name`; arguments as of `guarded`."""
    others = "initialize before share(), train the bank, or write to materialize(model)"
    if inside:
        others = (
            "compute with a copy, as in F.linear(x, self.weight * mask), or keep the layer dense, share(exclude=...)"
        )
    return f"{name} is generated from a bank, so writing to it would be lost: {others}"
