"""Reads of weights in the forward of a shared layer, and what autograd saves of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_ssn.sharing.weight_source import Values, WeightSource, autocast_dtype
from dist_ssn.torch_private import CONVOLUTION, FAST_PATH, Hooks, saved_tensor_hooks

_CAST = (nn.Linear, *CONVOLUTION)
_state = threading.local()


class _Origin(NamedTuple):
    """Replacement of a generated weight in autograd's saved tensors: its source, its index there, and the source's values."""

    source: WeightSource
    index: int
    dtype: torch.dtype | None
    values: Values

    def has(self, view: Tensor) -> bool:
        """True if a view of the weight is given by its shape, strides and offset: not one as complex numbers, or a conjugate."""
        return view.dtype == (self.dtype or self.source.dtype) and not view.is_conj() and not view.is_neg()


class _Packed(NamedTuple):
    """A view of a generated weight that is generated again in backward."""

    origin: _Origin
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def make(self) -> Tensor:
        with torch.no_grad():
            source, index, dtype, values = self.origin
            weight = source(index, dtype=dtype, values=values)
            return weight.as_strided(self.shape, self.stride, self.offset)


class Scope:
    """One layer's forward: the weights that it has read, and the hooks that replace them in autograd's saved tensors."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.weights: dict[tuple[int, int, bool, torch.dtype | None], Tensor] = {}
        self.origins: dict[int, _Origin] = {}

    def read(self, source: WeightSource, index: int) -> Tensor:
        """The weight `index` of a source, generated at its first read."""
        dtype = autocast_dtype(source)
        if dtype is not None and not is_lowered(self.layer):
            dtype = None
        key = (id(source), index, torch.is_grad_enabled(), dtype)
        if key not in self.weights:
            weight = self.weights[key] = source(index, dtype=dtype)
            self.origins[weight.untyped_storage().data_ptr()] = _Origin(source, index, dtype, source.values())
        return self.weights[key]

    def __enter__(self) -> Scope:
        self.outer = current_scope()
        _state.scope = self
        # torch calls only the innermost pair of hooks, so ours call the pair around them (such as an activation checkpoint's).
        self.hooks: AbstractContextManager[object] = nullcontext()
        if FAST_PATH:
            around = saved_tensor_hooks()
            self.hooks = torch.autograd.graph.saved_tensors_hooks(*_hooks(self.origins, around))
        self.hooks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.hooks.__exit__(None, None, None)
        _state.scope = self.outer
        self.weights.clear()  # a storage's address may be used again from here on, but no tensor is packed any more


class AtHand:
    """The forward of a layer whose weights have been generated: autograd saves them as ordinary tensors.

    Args:
        layer: whose forward it is.
        weights: of the layer, by name.
    """

    def __init__(self, layer: nn.Module, weights: dict[str, Tensor]):
        self.layer, self.weights = layer, weights

    def read(self, source: WeightSource, index: int) -> Tensor:
        """The weight `index` of a source of another layer."""
        return source(index)

    def __enter__(self) -> None:
        self.outer = current_scope()
        _state.scope = self

    def __exit__(self, *_: object) -> None:
        _state.scope = self.outer


def _hooks(
    origins: dict[int, _Origin], around: Hooks | None
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    def pack(tensor: Tensor) -> Any:
        plain = tensor.layout is torch.strided and tensor.numel()  # sparse tensors have no storage to ask for
        origin = origins.get(tensor.untyped_storage().data_ptr()) if plain else None
        if origin is not None and origin.has(tensor):
            return _Packed(origin, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
        if around is not None:
            return around[0](tensor)
        # Trap: an operation's own output, saved without `detach`, would make a cycle through its node that is never collected.
        return tensor.detach(), tensor._version

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, _Packed):
            return packed.make()
        if around is not None:
            return around[1](packed)
        tensor, version = packed
        if tensor._version != version:  # autograd does not check this itself for tensors that went through hooks
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} that a shared layer needs for its gradient was modified in place: "
                "use the out-of-place form of that operation"
            )
        return tensor

    return pack, unpack


def is_lowered(layer: nn.Module) -> bool:
    """True if autocast lowers the layer's weight before anything else reads it."""
    return (isinstance(layer, _CAST) and runs_torchs_code(layer)) or type(layer).__name__ == "Conv1D"


def runs_torchs_code(layer: nn.Module | type[nn.Module]) -> bool:
    """True if the layer's forward is torch's own, so that it is known what reads its weights."""
    calls = (getattr(layer, name, None) for name in ("forward", "_conv_forward"))
    return all(call is None or (call.__module__ or "").startswith("torch.") for call in calls)


def current_scope() -> Scope | AtHand | None:
    """The layer's forward that runs in this thread; None outside of one."""
    return getattr(_state, "scope", None)
