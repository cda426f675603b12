"""A model's weights: `find_specs` lists each weight of any `nn.Module` once, with the facts that a plan needs.

A *weight* is a floating-point parameter of two or more dimensions that is generated instead of stored. Every other parameter
stays with the model and is called an *own parameter*. Nothing here changes the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from dist_ssn.errors import ShareError
from dist_ssn.model.init_scale import EMBEDDINGS, assumed_std, default_std, fans_of, init_std_of
from dist_ssn.model.selectors import Selector, as_list, selected_by, shown
from dist_ssn.model.settled_scale import Measured, rules_for, settled_stds
from dist_ssn.model.structure import structure_of
from dist_ssn.torch_private import CONVOLUTION, NORM

_NORMS = (*NORM, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_FLOAT_QUANTIZED = ("FloatFunctional", "FXFloatFunctional")
"""Modules of torch's quantized packages that belong to float models."""

_FEWEST = 64
"""Least number of elements of a parameter of a module of one's own: a mean of colours or a few anchors are no weights, and a plan
could depend on the deviation of so few values."""
_SOME = 64
"""Elements that are looked at first, where one that differs decides."""


@dataclass(frozen=True)
class LayerSpec:
    """One weight: its first name in the model, its shape, and the statistics of its initialization.

    As a matrix it has `rows` = shape[0] and `columns` = the product of the other dimensions.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    """Class name of the module that holds it, such as "Linear"."""
    fan_in: int
    init_std: float
    """Standard deviation of the initial values: exact where a usual initialization is recognized, else measured. It is data."""
    aliases: tuple[str, ...] = ()
    """Names of a tied weight in the other modules that hold it."""
    zero_row: int | None = None
    """Row that stays zero (an embedding's `padding_idx`)."""
    is_measured: bool = False
    """True if `init_std` was measured on random values, so that another seed gives another value."""
    is_table: bool = False
    """True if an embedding holds it, whose rows are looked up."""
    settled_std: float | None = None
    """`init_std` as far as it is the same for every random seed, see `settled_scale.settled_stds`; None: `init_std` is."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def deciding_std(self) -> float:
        """The initial standard deviation that decides on the weight's group."""
        return self.init_std if self.settled_std is None else self.settled_std

    @property
    def rows(self) -> int:
        """Number of rows of the weight as a matrix."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Number of columns of the weight as a matrix."""
        return self.numel // self.shape[0]


@dataclass(frozen=True)
class Specs:
    """The weights of a model, and the parameters that were left out.

    Args:
        weights: each weight once.
        own_parameters: number of trainable parameters (elements) that stay with the model.
        left_out: (name, reason) of each parameter of two or more dimensions that is not shared.
    """

    weights: tuple[LayerSpec, ...]
    own_parameters: int = 0
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements of all weights; a budget's fraction refers to it."""
        return sum(weight.numel for weight in self.weights)


class _Place(NamedTuple):
    """One occurrence of a parameter: the model knows it as `name`, and `module` holds it as `local`."""

    name: str
    module: nn.Module
    local: str


def find_specs(
    model: nn.Module,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    structure: bool = True,
    frozen: bool = False,
) -> Specs:
    """Lists every weight of `model` once; tied weights are recognized by identity.

    Args:
        model: any module, initialized as it would be for dense training. On "meta" there are no values: the initial scales are
            then assumed (`init_scale.assumed_std`), and no structure is recognized.
        include: if given, only weights that one of these selectors matches are shared. A weight with its full name here is shared
            even if its initial values have a structure.
        exclude: weights that one of these selectors matches stay own parameters.
        structure: whether weights whose values have a structure are left out; False for a model that was trained or pruned.
        frozen: for weights whose values are kept: parameters that require no gradient, or are constant, are weights, too, and all
            others are taken to be frozen.

    Raises:
        ShareError: no weight is left; a selector matches nothing; a parameter is lazy or holds NaN; the weights
            differ in dtype or device; the model is quantized, scripted, wrapped for training, or shared already.
    """
    _check_model(model)
    wanted, unwanted = as_list("include", include), as_list("exclude", exclude)
    selectors = {*wanted, *unwanted}
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = _parameters(modules)
    names = modules.keys() | {place.name for places in parameters.values() for place in places}
    globs = _globs(selectors - names)  # what is a name is no glob, such as "heads.task[0]"
    weights: list[LayerSpec] = []
    left_out: list[tuple[str, str]] = []
    kinds: dict[tuple[torch.dtype, torch.device], str] = {}
    used: set[Any] = set()
    own = 0
    for parameter, places in parameters.items():
        selected = selected_by(selectors, globs, [place.name for place in places], modules)
        used |= selected
        reason = _reason_to_leave(parameter, places, frozen)
        if reason is None and wanted and selected.isdisjoint(wanted):
            reason = "not included"
        if reason is None and not selected.isdisjoint(unwanted):
            reason = "excluded"
        if reason is None:
            is_named = any(place.name in selected for place in places)
            reason = _reason_in_values(parameter, places, is_named, structure, frozen)
        if reason is None:
            kinds.setdefault((parameter.dtype, parameter.device), places[0].name)
            weights.append(_spec(parameter, places, model, frozen))
            continue
        own += parameter.numel() if parameter.requires_grad and not frozen else 0
        if parameter.ndim >= 2:
            left_out.append((places[0].name, reason))

    idle = [selector for selector in dict.fromkeys([*wanted, *unwanted]) if selector not in used]
    _raise(model, [*_bad_weights(weights, kinds, left_out, idle)])
    known = weights if frozen else _settled(_residual(weights), model)
    return Specs(tuple(known), own, tuple(left_out))


def _globs(selectors: Iterable[Selector]) -> list[str]:
    return [one for one in selectors if isinstance(one, str) and any(sign in one for sign in "*?[")]


def _reason_in_values(
    parameter: nn.Parameter, places: Sequence[_Place], is_named: bool, structure: bool, frozen: bool
) -> str | None:
    """The reason to leave a weight out for its size or its initial values; arguments as of `find_specs`."""
    if not frozen and not is_named and _is_small(parameter, places):
        return f"fewer than {_FEWEST} elements, and in no layer of torch"
    if not frozen and _is_constant(parameter):
        return "starts constant"
    if structure and not is_named:
        return structure_of(parameter, _zero_row(places))
    return None


def _bad_weights(
    weights: Sequence[LayerSpec],
    kinds: Mapping[tuple[torch.dtype, torch.device], str],
    left_out: Sequence[tuple[str, str]],
    idle: Sequence[Selector],
) -> Iterator[str]:
    """Problems with the weights that were found, by dtype and device (`kinds`), and with selectors that match nothing (`idle`)."""
    bad = [weight.name for weight in weights if not math.isfinite(weight.init_std)]
    yield from (f"{name} holds NaN or Inf: initialize it first" for name in bad)
    yield from (f"{shown(selector)} selects no parameter" for selector in idle)
    if len(kinds) > 1:
        found = ", ".join(f"{name} is {dtype} on {device}" for (dtype, device), name in kinds.items())
        yield f"weights must have one dtype and one device, but {found}: convert with model.to(...) before sharing"
    if not weights and not idle:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out[:3])
        yield "there is no trainable floating-point parameter of two or more dimensions to share" + (
            f" (left out are {reasons})" if reasons else ""
        )


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ShareError(f"cannot share an object of type {type(model).__name__}: give a torch.nn.Module")
    problems = []
    for name, module in model.named_modules():
        where, kind = name or "the model itself", type(module)
        if getattr(kind, "_dist_ssn_names", None):
            problems.append(f"{where} is shared already: share a model once, or share materialize(model)")
            break
        if isinstance(module, torch.jit.ScriptModule):
            problems.append(f"{where} is compiled by TorchScript: share the Python model")
            break
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            problems.append(f"{where} is a {kind.__name__}: share the model first and wrap it afterwards")
        in_package = kind.__module__.startswith("torch.") and "quantized" in kind.__module__.split(".")
        if in_package and kind.__name__ not in _FLOAT_QUANTIZED:
            problems.append(
                f"{where} ({kind.__name__}) is quantized: share the float model, quantize materialize(model)"
            )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            problems.append(f"{name} is lazy and has no shape yet: run one batch through the model first")
        elif hasattr(parameter, "fake_mode"):
            problems.append(f"{name} is a fake tensor, without values: build and share the model before, or on 'meta'")
        elif hasattr(parameter, "ds_id"):
            problems.append(
                f"{name} is partitioned by DeepSpeed (zero.Init, or an engine made before): share the model first, outside of "
                "zero.Init; its bank is small enough to be created whole on every process"
            )
    _raise(model, problems)


def _raise(model: nn.Module, problems: Sequence[str], most: int = 8) -> None:
    if problems:
        more = f"; and {len(problems) - most} more" if len(problems) > most else ""
        raise ShareError(f"cannot share {type(model).__name__}: " + "; ".join(problems[:most]) + more)


def _parameters(modules: dict[str, nn.Module]) -> dict[nn.Parameter, list[_Place]]:
    """Every parameter, with its place under each of its names."""
    places: dict[nn.Parameter, list[_Place]] = {}
    for prefix, module in modules.items():
        for local, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{prefix}.{local}" if prefix else local
                places.setdefault(parameter, []).append(_Place(name, module, local))
    return places


def _reason_to_leave(parameter: nn.Parameter, places: Sequence[_Place], frozen: bool) -> str | None:
    """Reason for leaving a parameter out, found without reading its values; None if it is a weight."""
    if parameter.ndim < 2:
        return "one dimension"
    if parameter.is_complex():
        return "complex numbers"
    if not parameter.is_floating_point():
        return "integers"
    if parameter.dtype.itemsize < 2:
        return "quantized"
    if not parameter.requires_grad and not frozen:
        return "frozen"
    if parameter.numel() < 2:
        return "fewer than two elements"
    for _, module, local in places:
        if isinstance(module, _NORMS):
            return "normalization"
        if isinstance(module, GraphModule):  # whose copies are made from its class
            return "read by a traced graph itself"
        if local == "bias" or local.startswith("bias_"):
            return "bias"
        if _is_weight_norm_magnitude(module, local):
            return "magnitudes of a weight norm"
        if isinstance(module, EMBEDDINGS) and module.sparse:
            return "sparse gradients"
        if isinstance(module, EMBEDDINGS) and module.max_norm is not None:
            return "max_norm writes to the weight in place"
    return None


def _is_small(parameter: nn.Parameter, places: Sequence[_Place]) -> bool:
    return parameter.numel() < _FEWEST and not any(
        type(place.module).__module__.startswith("torch.") for place in places
    )


def _is_weight_norm_magnitude(module: nn.Module, local: str) -> bool:
    if isinstance(module, ParametrizationList):
        return local == "original0" and any(type(step).__name__ == "_WeightNorm" for step in module)
    return local.endswith("_g") and f"{local[:-1]}v" in module._parameters  # torch.nn.utils.weight_norm, the older one


def _zero_row(places: Sequence[_Place]) -> int | None:
    padding = [place.module.padding_idx for place in places if isinstance(place.module, EMBEDDINGS)]
    return next((row for row in padding if row is not None), None)


def _is_constant(parameter: nn.Parameter) -> bool:
    if parameter.is_meta:
        return False
    values = parameter.detach()
    if values.dim() and (some := values[0].reshape(-1)[:_SOME]).numel() > 1 and bool((some != some[0]).any()):
        return False  # mostly, without reading the whole weight
    low, high = values.aminmax()
    return bool(low == high)


def _spec(parameter: nn.Parameter, places: Sequence[_Place], model: nn.Module, frozen: bool) -> LayerSpec:
    name, module, _ = places[0]
    shape = tuple(parameter.shape)
    fans = fans_of(module, shape)
    zero_row = _zero_row(places)
    holders: dict[tuple[int, str], str] = {}  # a module that is used in two places holds its weight once
    for place in places:
        holders.setdefault((id(place.module), place.local), place.name)
    if frozen:  # a difference starts at zero, and a plan must not depend on trained values
        init_std, is_measured = 1.0 if parameter.is_meta else _one_if_finite(parameter), False
    elif parameter.is_meta:
        init_std, is_measured = assumed_std(module, shape, fans, model), False
    else:
        init_std, is_measured = init_std_of(parameter, module, fans, zero_row)
    return LayerSpec(
        name=name,
        shape=shape,
        kind=type(module).__name__,
        fan_in=fans[0],
        init_std=init_std,
        is_measured=is_measured,
        aliases=tuple(holders.values())[1:],
        zero_row=zero_row,
        is_table=any(isinstance(place.module, EMBEDDINGS) for place in places),
    )


def _one_if_finite(parameter: nn.Parameter) -> float:
    """1, or NaN if an element is not finite."""
    extremes = torch.stack(torch.aminmax(parameter.detach()))  # NaN, if one element is; no temporary
    return 1.0 if bool(extremes.isfinite().all()) else math.nan


def _residual(weights: Sequence[LayerSpec]) -> list[LayerSpec]:
    """Recognizes the n projections back into the residual stream of a GPT, which start with 0.02/√n.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
    """
    unknown = [weight for weight in weights if weight.is_measured]
    for n in reversed(range(2, len(unknown) + 1)):  # of two that fit, the one that explains more
        std = 0.02 / math.sqrt(n)
        near = {w.name for w in unknown if abs(w.init_std / std - 1) < 5 * math.sqrt(0.5 / w.numel) + 0.005}  # rounded
        if len(near) == n:
            return [replace(w, init_std=std, is_measured=False) if w.name in near else w for w in weights]
    return list(weights)


def _settled(weights: Sequence[LayerSpec], model: nn.Module) -> Iterator[LayerSpec]:
    """Gives each weight its `settled_std`."""
    measured = []
    for weight in weights:
        module = model.get_submodule(weight.name.rpartition(".")[0])
        default = default_std(module, weight.shape)
        kind = weight.kind if default else ""  # all that no layer of torch holds
        groups = getattr(module, "groups", 1) if isinstance(module, CONVOLUTION) else 1
        rules = rules_for(default and default[0], fans_of(module, weight.shape), groups)
        measured.append(Measured(kind, weight.numel, weight.init_std, rules))
    for weight, std in zip(weights, settled_stds(measured), strict=True):
        yield weight if std == weight.init_std else replace(weight, settled_std=std)
