"""model → `Specs`: every weight of any `nn.Module`, once, with what a plan needs to know of it.

A *weight* is a floating-point parameter of two or more dimensions that is generated instead of stored. Everything else stays
with the model and is called an *own parameter*. Nothing here changes the model.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from .errors import ShareError

Selector = str | type[nn.Module]
"""A parameter's or a module's name, a glob over either, or a class of modules (as a class, or by its name).

A module selects every parameter inside it.
"""

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_FLOAT_QUANTIZED = ("FloatFunctional", "FXFloatFunctional")
"""Modules of torch's quantized packages that belong to float models."""
_USUAL_STD = (1.0, 0.02, 0.01)


@dataclass(frozen=True)
class LayerSpec:
    """One weight: its first name in the model, its shape, and the statistics of its initialization.

    As a matrix it has `rows` = shape[0] and `columns` = the product of the other dimensions.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    """Class name of the module that holds it, "Linear" say."""
    fan_in: int
    init_std: float
    """Root mean square of the weight when it was read: analytic where a usual initialization is recognized."""
    aliases: tuple[str, ...] = ()
    """A tied weight's name in each other module that holds it."""
    zero_row: int | None = None
    """Row that stays zero (an embedding's `padding_idx`)."""
    is_measured: bool = False
    """Whether `init_std` was measured on random values, so that another seed gives another number."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.numel // self.shape[0]


@dataclass(frozen=True)
class Specs:
    """The weights of a model, and what was left out.

    `own_parameters` counts the trainable numbers that stay with the model; `left_out` gives, for each parameter of two or
    more dimensions that is not shared, its name and the reason.
    """

    weights: tuple[LayerSpec, ...]
    own_parameters: int = 0
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def numel(self) -> int:
        """The number of numbers in all the weights, which a budget's fraction refers to."""
        return sum(weight.numel for weight in self.weights)


class _Place(NamedTuple):
    """Where a parameter stands: the model knows it as `name`, and `module` holds it as `local`."""

    name: str
    module: nn.Module
    local: str


def find_specs(
    model: nn.Module,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
) -> Specs:
    """Lists every weight of `model` once; tied weights are recognized by identity.

    Args:
        model: any module, on any device but "meta", initialized as it would be for dense training.
        include: if given, only weights that one of these selects are shared.
        exclude: weights that one of these selects stay own parameters.

    Raises:
        ShareError: no weight is left; a selector selects nothing; a parameter is lazy, on "meta", or holds NaN; the weights
            differ in dtype or device; the model is quantized, scripted, wrapped for training, or shared already.
    """
    _check_model(model)
    wanted, unwanted = _as_list("include", include), _as_list("exclude", exclude)
    selectors = {*wanted, *unwanted}
    globs = [
        selector for selector in selectors if isinstance(selector, str) and any(sign in selector for sign in "*?[")
    ]
    modules = dict(model.named_modules(remove_duplicate=False))
    weights: list[LayerSpec] = []
    left_out: list[tuple[str, str]] = []
    problems: list[str] = []
    kinds: dict[tuple[torch.dtype, torch.device], str] = {}
    used: set[Any] = set()
    own = 0
    for parameter, places in _parameters(modules).items():
        selected = _selected(selectors, globs, places, modules)
        used |= selected
        reason = _reason_to_leave(parameter, places)
        if reason is None and wanted and selected.isdisjoint(wanted):
            reason = "not included"
        if reason is None and not selected.isdisjoint(unwanted):
            reason = "excluded"
        if reason is None and _is_constant(parameter):
            reason = "starts constant"
        if reason is None:
            kinds.setdefault((parameter.dtype, parameter.device), places[0].name)
            weights.append(_spec(parameter, places))
            if not math.isfinite(weights[-1].init_std):
                problems.append(f"{places[0].name} holds NaN or Inf: initialize it first")
            continue
        own += parameter.numel() if parameter.requires_grad else 0
        if parameter.ndim >= 2:
            left_out.append((places[0].name, reason))

    idle = [selector for selector in dict.fromkeys([*wanted, *unwanted]) if selector not in used]
    problems += [f"{_shown(selector)} selects no parameter" for selector in idle]
    if len(kinds) > 1:
        found = ", ".join(f"{name} is {dtype} on {device}" for (dtype, device), name in kinds.items())
        problems.append(
            f"weights must have one dtype and one device, but {found}: convert with model.to(...) before sharing"
        )
    if not weights and not problems:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out[:3])
        problems.append(
            "there is no trainable floating-point parameter of two or more dimensions to share"
            + (f" (left out are {reasons})" if reasons else "")
        )
    _raise(model, problems)
    return Specs(tuple(_residual(weights)), own, tuple(left_out))


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
        elif hasattr(parameter, "ds_id"):
            problems.append(
                f"{name} was taken apart by DeepSpeed (zero.Init, or an engine made before): share the model first, outside of "
                "zero.Init; its bank is small enough to be made whole on every process"
            )
        elif parameter.is_meta:
            problems.append(
                f"{name} is on 'meta' and has no values: use model.to_empty(device=...) and initialize it first"
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


def _reason_to_leave(parameter: nn.Parameter, places: Sequence[_Place]) -> str | None:
    """Why this is no weight, as far as one can tell without reading its values."""
    if parameter.ndim < 2:
        return "one dimension"
    if parameter.is_complex():
        return "complex numbers"
    if not parameter.is_floating_point():
        return "integers"
    if parameter.dtype.itemsize < 2:
        return "quantized"
    if not parameter.requires_grad:
        return "frozen"
    if parameter.numel() < 2:
        return "fewer than two numbers"
    for _, module, local in places:
        if isinstance(module, _NORMS):
            return "normalization"
        if local == "bias" or local.startswith("bias_"):
            return "bias"
        if _is_weight_norm_magnitude(module, local):
            return "magnitudes of a weight norm"
        if isinstance(module, _EMBEDDINGS) and module.sparse:
            return "sparse gradients"
        if isinstance(module, _EMBEDDINGS) and module.max_norm is not None:
            return "max_norm writes to the weight in place"
    return None


def _is_weight_norm_magnitude(module: nn.Module, local: str) -> bool:
    if isinstance(module, ParametrizationList):
        return local == "original0" and any(type(step).__name__ == "_WeightNorm" for step in module)
    return local.endswith("_g") and f"{local[:-1]}v" in module._parameters  # torch.nn.utils.weight_norm, the older one


def _is_constant(parameter: nn.Parameter) -> bool:
    low, high = parameter.detach().aminmax()
    return bool(low == high)


def _spec(parameter: nn.Parameter, places: Sequence[_Place]) -> LayerSpec:
    name, module, _ = places[0]
    shape = tuple(parameter.shape)
    fans = _fans(module, shape)
    padding = [p.module.padding_idx for p in places if isinstance(p.module, _EMBEDDINGS)]
    zero_row = next((row for row in padding if row is not None), None)
    holders: dict[tuple[int, str], str] = {}  # a module that is used in two places holds its weight once
    for place in places:
        holders.setdefault((id(place.module), place.local), place.name)
    init_std, is_measured = _init_std(parameter, module, fans, zero_row)
    return LayerSpec(
        name=name,
        shape=shape,
        kind=type(module).__name__,
        fan_in=fans[0],
        init_std=init_std,
        is_measured=is_measured,
        aliases=tuple(holders.values())[1:],
        zero_row=zero_row,
    )


def _fans(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """(fan in, fan out) of one output number."""
    receptive = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * receptive, shape[0] * receptive
    is_hugging_face = type(module).__name__ == "Conv1D"  # whose weight is (in, out)
    turned = is_hugging_face or isinstance(module, _TRANSPOSED)
    return (fan_out, fan_in) if turned else (fan_in, fan_out)


def _init_std(
    parameter: nn.Parameter, module: nn.Module, fans: tuple[int, int], zero_row: int | None
) -> tuple[float, bool]:
    """The measured root mean square, snapped to the usual initialization that it is a sample of; whether there was none.

    Snapping makes the plan independent of the random seed, so that ranks that seeded differently agree: for the layer's own
    initialization in torch at any size, for other usual ones where the weight is large enough to tell them apart. What
    matches none is rounded to three digits, and does depend on the seed.
    """
    values, count = parameter.detach(), parameter.numel()
    blocks = values.reshape(-1).split(2**20)  # so that no float64 copy of a large weight is ever alive
    squares = float(torch.stack([block.double().square().sum() for block in blocks]).sum())
    if zero_row is not None and not values[zero_row].any():
        count -= values[zero_row].numel()
    measured = math.sqrt(squares / count)
    if not math.isfinite(measured):
        return measured, True
    default = _default_std(module, tuple(values.shape))
    if default is not None and _is_sample(values, measured, count, *default):
        return default[0], False
    fan_in, fan_out = fans
    # The packed projections of attention and LSTM have 3 and 4 blocks of rows.
    usual = [math.sqrt(v / f) for f in (fan_in, fan_out, fan_out / 3, fan_out / 4) for v in (1 / 3, 1.0, 2.0)]
    usual += [math.sqrt(2 / (fan_in + fan_out)), *_USUAL_STD]
    # Formulas for the same number may differ in its last bit: rounded, the first of them wins, whatever the sample.
    nearest = min(usual, key=lambda std: round(abs(std / measured - 1), 9))
    tolerance = max(0.005, 2 / math.sqrt(count))
    if abs(nearest / measured - 1) < tolerance:
        return nearest, False
    return float(f"{measured:.3g}"), True


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


def _default_std(module: nn.Module, shape: tuple[int, ...]) -> tuple[float, bool] | None:
    """(standard deviation, whether it is uniform) of what the layer's `reset_parameters` draws; None for unknown layers."""
    if isinstance(module, _EMBEDDINGS):
        return 1.0, False
    if isinstance(module, nn.MultiheadAttention):
        return math.sqrt(2 / (shape[0] + shape[1])), True
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return math.sqrt(1 / 3 / module.hidden_size), True
    if isinstance(module, nn.Bilinear):
        return math.sqrt(1 / 3 / shape[1]), True
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return math.sqrt(1 / 3 / math.prod(shape[1:])), True
    return None


def _is_sample(values: torch.Tensor, measured: float, count: int, std: float, uniform: bool) -> bool:
    """Whether `count` numbers of root mean square `measured` can be drawn with `std`: within five standard errors of it."""
    error = math.sqrt((0.2 if uniform else 0.5) / count)
    if abs(measured / std - 1) > 5 * error:
        return False
    # A uniform sample never leaves its interval; one per cent is room for a weight that was rounded to bf16.
    return not uniform or max(abs(float(v)) for v in values.aminmax()) <= 1.01 * math.sqrt(3) * std


def _as_list(what: str, selectors: Selector | Iterable[Selector] | None) -> list[Selector]:
    if selectors is None:
        return []
    single = isinstance(selectors, (str, type)) or not isinstance(selectors, Iterable)
    listed: list[Any] = [selectors] if single else list(selectors)  # pyright: ignore[reportArgumentType]
    for selector in listed:
        if not isinstance(selector, (str, type)):
            raise ShareError(
                f"{what} holds an object of type {type(selector).__name__}: give names, globs or classes of modules"
            )
    return listed


def _shown(selector: Selector) -> str:
    return repr(selector) if isinstance(selector, str) else f"class {selector.__name__}"


def _selected(
    selectors: set[Any], globs: Sequence[str], places: Sequence[_Place], modules: dict[str, nn.Module]
) -> set[Any]:
    """Those that select the parameter: by its name, that of a module around it, or such a module's class."""
    if not selectors:
        return set()
    paths = {path for place in places for path in _paths(place.name)}
    classes = {cls for path in paths | {""} if path in modules for cls in type(modules[path]).__mro__}
    labels = paths | classes | {cls.__name__ for cls in classes - {nn.Module, object}}
    return labels & selectors | {glob for glob in globs if any(fnmatch.fnmatchcase(path, glob) for path in paths)}


def _paths(name: str) -> Iterator[str]:
    """ "a.b.c" → "a.b.c", "a.b", "a"."""
    while name:
        yield name
        name = name.rpartition(".")[0]
