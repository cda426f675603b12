"""Shared layers: a subclass per base class, made once, whose weights are properties that a bank generates.

`isinstance(layer, nn.Linear)` stays true, and the class's own `forward` runs. Around it:

- a weight is generated once per forward, however often it is read;
- an operation that saves the weight for backward keeps its origin instead, from which it is generated again, so that no copy of
  the model's weights is alive between forward and backward;
- under autocast the weight is generated in the lower precision at once, if the operation would cast it.

Outside of a layer's `forward`, and while torch traces, autograd saves the generated weight as an ordinary tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dist_ssn.errors import ShareError
from dist_ssn.sharing import part_check, walks
from dist_ssn.sharing.parts import set_trained
from dist_ssn.sharing.read_only import guarded, no_write
from dist_ssn.sharing.registrations import watch_registrations
from dist_ssn.sharing.scopes import AtHand, Scope, current_scope, runs_torchs_code
from dist_ssn.sharing.weight_source import WeightSource
from dist_ssn.torch_private import assert_soon, is_tracing, leaves_out_recurrent_layers

_NORM = "a norm cannot replace it: register the norm before share(), or on"
_MADE_OF_A_WEIGHT = {"orig": "torch cannot prune it: prune", "g": _NORM, "v": _NORM}
"""End of the name under which torch registers what it makes of a weight → why it cannot, for the message."""


class SharedLayer:
    """Additions of a shared layer's subclass to its base class."""

    _dist_ssn_base: type[nn.Module]
    _dist_ssn_names: tuple[str, ...]

    def __init_subclass__(cls, **_: Any) -> None:
        """Does not call the base class's, which may keep a list of its subclasses, or need arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the base class's `forward`; weights that it reads are generated."""
        if is_tracing():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        slots: dict[str, tuple[WeightSource, int]] = self.__dict__["_dist_ssn_slots"]
        layer: nn.Module = self  # type: ignore[assignment]
        weights = {name: source.at_hand(index) for name, (source, index) in slots.items()}
        has_all = all(weight is not None for weight in weights.values())
        with AtHand(layer, weights) if has_all else Scope(layer):  # type: ignore[arg-type]
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        _check_write(self, name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        _check_write(self, name)
        # Torch's older norms, and its pruning, keep beside a weight what they compute it from.
        computed = any(hasattr(self, name + end) for end in ("_g", "_u", "_mask"))
        for original in (f"{name}_v", f"{name}_orig") if computed else ():
            if original in self._dist_ssn_names:
                reason = "what computes from it cannot be removed: remove it before share(), or from"
                raise ShareError(_no_tool(self, original, reason))
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a parameter; raises `ShareError` for a generated one, and for what pruning or a norm makes of it."""
        _check_write(self, name)
        weight, end = name.rpartition("_")[::2]
        if weight in self._dist_ssn_names and end in _MADE_OF_A_WEIGHT:
            parameters: dict[str, Any] = self._parameters  # type: ignore[attr-defined]
            if (
                weight not in parameters
            ):  # the older weight norm has taken its place away: it comes first, as in most layers
                others = dict(parameters)
                parameters.clear()
                parameters.update({weight: None, **others})
            raise ShareError(_no_tool(self, weight, _MADE_OF_A_WEIGHT[end]))
        super().register_parameter(name, param)  # type: ignore[misc]

    def __prepare_scriptable__(self) -> Any:
        """Is called by `torch.jit.script`; always raises `ShareError`."""
        raise ShareError(_no_tool(self, self._dist_ssn_names[0], "TorchScript cannot compile that: script"))

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: list[str],
    ) -> None:
        """Rejects a weight of a dense model, even if `strict` is False; names the weights whose bank is not loaded."""
        walks.check_loaded(self, missing, prefix)  # type: ignore[arg-type]
        for name in self._dist_ssn_names:
            if state_dict.pop(prefix + name, None) is not None:
                errors.append(no_write(prefix + name))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)  # type: ignore[misc]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        walks.check_saved(self, destination)  # type: ignore[arg-type]
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        walks.check_converted(self, fn)  # type: ignore[arg-type]
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """Every list of a model's parameters calls it."""
        yield from super().named_modules(*args, **kwargs)  # type: ignore[misc]
        if not torch.compiler.is_compiling():
            walks.check_listed(self)  # type: ignore[arg-type]

    def _replicate_for_data_parallel(self) -> Any:
        raise ShareError(walks.NO_REPLICAS)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freezes the generated weights, or trains them again, with the other parameters."""
        set_trained(self, requires_grad)  # type: ignore[arg-type]
        return super().requires_grad_(requires_grad)  # type: ignore[misc]

    def reset_parameters(self) -> None:
        """Always raises `ShareError`, because the parameters of a bank belong to many layers."""
        raise ShareError(no_write(_full_name(self, self._dist_ssn_names[0])))

    def __reduce_ex__(self, protocol: Any) -> Any:
        walks.check_copied(self)  # type: ignore[arg-type]
        state = getattr(self, "__getstate__", self.__dict__.copy)()
        return _new_layer, (self._dist_ssn_base, self._dist_ssn_names), state


def _full_name(layer: Any, name: str) -> str:
    """Name of a generated parameter in the model."""
    source, index = layer.__dict__["_dist_ssn_slots"][name]
    return source.weight_name(index)


def _no_tool(layer: Any, name: str, reason: str) -> str:
    """The error message for a tool of torch that needs stored weights."""
    return f"{_full_name(layer, name)} is generated from a bank, and {reason} materialize(model)"


def _check_write(layer: Any, name: str) -> None:
    """Refuses to set or delete an attribute of a shared layer that is a generated weight, or a configuration of quantization.

    Raises:
        ShareError: it is one.
    """
    if name in layer._dist_ssn_names:
        raise ShareError(no_write(_full_name(layer, name)))
    if name == "qconfig":  # torch.ao.quantization sets it in every layer, and then leaves out those of unknown classes
        raise ShareError(_no_tool(layer, layer._dist_ssn_names[0], "quantization needs stored weights: quantize"))


class _SharedRNN(SharedLayer):
    """A recurrent layer; its list of weights is generated whenever it is read."""

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        layer: nn.RNNBase = self  # type: ignore[assignment]
        return [getattr(self, name, None) for name in layer._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Any) -> None:
        """Ignores the list that the base class stores, because ours is derived."""

    def __setattr__(self, name: str, value: Any) -> None:
        _check_write(self, name)
        if name != "_flat_weights":
            nn.Module.__setattr__(self, name, value)  # type: ignore[arg-type]  # the base class's reads its list of weights

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # type: ignore[arg-type]  # the base class's reads the weights, which may not be there yet

    def _init_flat_weights(self) -> None:
        """Does nothing, because no list is stored."""

    def _weights_have_changed(self) -> bool:
        return False

    def flatten_parameters(self) -> None:
        """Does nothing, because generated weights are not in one cuDNN buffer."""


class _SharedParameterList(SharedLayer):
    """A list of weights; a slice of it is a plain list, because a `ParameterList` would make parameters of its items."""

    def __getitem__(self, index: Any) -> Any:
        items: nn.ParameterList = self  # type: ignore[assignment]
        if isinstance(index, slice):
            return [items[i] for i in range(*index.indices(len(items)))]
        return super().__getitem__(index)  # type: ignore[misc]


_ROW_COST = 8
"""Time to generate one row by itself, in rows of a whole table (on a CPU, 1/8 to 1/4 of the rows take as long as the table)."""


_INDICES = (torch.int32, torch.int64)
"""Dtypes of the rows that torch looks up."""


class _SharedEmbedding(SharedLayer):
    """An embedding; only the rows that are looked up are generated, if that is cheaper than the whole table."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table: indices (…) → (…, embedding_dim)."""
        layer: nn.Embedding = self  # type: ignore[assignment]
        if is_tracing():
            return super().forward(input)
        few = input.numel() * _ROW_COST < layer.num_embeddings and not layer.scale_grad_by_freq
        if not few or type(input) is not Tensor or input.dtype not in _INDICES:
            return super().forward(input)  # torch refuses other dtypes, and looks nested tensors up
        source, index = layer.__dict__["_dist_ssn_slots"]["weight"]
        rows = input.reshape(-1).long()
        inside = ((rows >= 0) & (rows < layer.num_embeddings)).all()
        if rows.device.type != "cpu":
            assert_soon(inside, "index out of range in embedding")
        elif not inside:
            raise IndexError("index out of range in self")
        return source(index, rows).view(*input.shape, layer.embedding_dim)


@functools.cache
def shared_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of `base` with generated parameters `names`; the same class for the same arguments."""
    mixin: type = SharedLayer
    if issubclass(base, nn.RNNBase):
        mixin = _SharedRNN
    elif issubclass(base, nn.ParameterList):
        mixin = _SharedParameterList
    elif base.forward is nn.Embedding.forward:
        mixin = _SharedEmbedding
    body: dict[str, Any] = {name: _weight_property(name, not runs_torchs_code(base)) for name in names}
    body |= {"_dist_ssn_base": base, "_dist_ssn_names": names, "__module__": base.__module__, "__doc__": base.__doc__}
    cls: Any = type(base.__name__, (mixin, base), body)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:  # its signature is the base class's
        return super(cls, self).forward(*args, **kwargs)

    plain: Any = base

    @functools.wraps(plain.__init__)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:  # `type(layer)(16, 4)` makes an ordinary layer
        object.__setattr__(self, "__class__", base)
        self.__init__(*args, **kwargs)

    cls.__init__ = init
    cls.forward = _untraced(forward) if issubclass(base, nn.RNNBase) else forward
    return cls


def _untraced(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The `forward` of a recurrent layer, which torch.compile runs outside of its graphs where it does so with torch's own.

    Without this it would compile our code around torch's again and again, up to its limit.
    """
    outside = torch.compiler.disable(forward)

    @functools.wraps(forward)
    def inside_or_outside(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = outside if leaves_out_recurrent_layers() else forward
        return run(self, *args, **kwargs)

    return inside_or_outside


def _weight_property(name: str, may_write: bool) -> property:
    """The weight `name` of a layer.

    Args:
        name: of the weight.
        may_write: the layer's forward is not torch's, and might write to it.
    """

    def read(layer: nn.Module) -> Tensor:
        source, index = layer.__dict__["_dist_ssn_slots"][name]
        if layer._parameters.get(name) is not None:  # put there by functional_call, for example
            raise ShareError(no_write(source.weight_name(index)))
        scope = current_scope()
        if not may_write and type(scope) is AtHand and scope.layer is layer:
            return scope.weights[name]
        try:
            if is_tracing():
                return source(index)
            weight = source.at_hand(index)
            if scope is None:
                if weight is not None and weight.dtype != source.dtype:
                    weight = None  # lowered for its layer, and somebody else reads it
                return guarded(source(index) if weight is None else weight, source.weight_name(index))
            weight = scope.read(source, index) if weight is None else weight
            return guarded(weight, source.weight_name(index), inside=True) if may_write else weight
        except AttributeError as error:  # nn.Module.__getattr__ would turn it into "no attribute 'weight'"
            raise RuntimeError(f"generating {name} failed: {error}") from error
        except NameError as error:  # torch.fx does not find the bank
            raise ShareError(
                f"torch.fx traces a part of the model without the bank of {source.weight_name(index)} ({error}): trace the whole "
                "model, or materialize(model)"
            ) from error

    return property(read)


def _new_layer(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    watch_registrations()
    cls = shared_class(base, names)
    layer = cls.__new__(cls)
    part_check.register(layer)
    return layer


def share_layer(layer: nn.Module, slots: dict[str, tuple[WeightSource, int]]) -> None:
    """Makes `layer` generate the parameters named in `slots`, in place.

    The banks are not registered as its submodules, because they belong to the model's root.

    Args:
        layer: is changed.
        slots: name of a parameter → (its source, its index there).
    """
    watch_registrations()
    for name in slots:
        layer._parameters[name] = None  # keeps its place in the order of parameters; the property comes first
    for name in ("_flat_weights", "_flat_weight_refs"):  # a recurrent layer's second list of its weights
        layer.__dict__.pop(name, None)
    layer.__dict__["_dist_ssn_slots"] = dict(slots)
    layer.__class__ = shared_class(type(layer), tuple(slots))
    part_check.register(layer)


def unshare_layer(layer: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    """Restores the layer's class and gives it ordinary parameters, in place."""
    part_check.forget(layer)
    layer.__class__ = type(layer)._dist_ssn_base  # type: ignore[attr-defined]
    del layer.__dict__["_dist_ssn_slots"]
    for name, weight in weights.items():
        layer._parameters[name] = weight
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()
