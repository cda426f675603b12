"""model → `Specs`: every weight of any `nn.Module`, once, with what a plan needs to know of it.

A *weight* is a floating-point parameter of two or more dimensions that is generated instead of stored. Everything else stays
with the model and is called an *own parameter*. Nothing here changes the model.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .errors import ShareError

Selector = str | type[nn.Module]
"""A parameter's name, a module's name, a glob over either, or a class of modules (as a class, or by its name)."""

_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
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
    """The other names of a tied weight."""
    zero_row: int | None = None
    """Row that stays zero (an embedding's `padding_idx`)."""

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
        ShareError: no weight is left, a selector selects nothing, a parameter is lazy or on "meta", the weights differ in
            dtype or device, or the model is shared already. All problems are reported at once.
    """
    wanted, unwanted = _as_list(include), _as_list(exclude)
    _check_model(model)
    names: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for name, module, parameter in _parameters(model):
        names.setdefault(parameter, []).append((name, module))

    weights: list[LayerSpec] = []
    left_out: list[tuple[str, str]] = []
    own = 0
    hit: set[int] = set()
    dtypes: dict[tuple[torch.dtype, torch.device], str] = {}
    for parameter, places in names.items():
        selected = {i for i, selector in enumerate(wanted + unwanted) if _selects(selector, places)}
        hit |= selected
        reason = _reason_to_leave(parameter, places)
        if reason is None and wanted and not any(i < len(wanted) for i in selected):
            reason = "not included"
        if reason is None and any(i >= len(wanted) for i in selected):
            reason = "excluded"
        if reason is None:
            dtypes.setdefault((parameter.dtype, parameter.device), places[0][0])
            weights.append(_spec(parameter, places))
            continue
        own += parameter.numel() if parameter.requires_grad else 0
        if parameter.ndim >= 2:
            left_out.append((places[0][0], reason))

    problems = [f"{s!r} selects no parameter" for i, s in enumerate(wanted + unwanted) if i not in hit]
    if len(dtypes) > 1:
        kinds = ", ".join(f"{name} is {dtype} on {device}" for (dtype, device), name in dtypes.items())
        problems.append(f"weights must have one dtype and one device, but {kinds}: convert with model.to(...) before sharing")
    if not weights and not problems:
        problems.append("there is no trainable floating-point parameter of two or more dimensions to share")
    if problems:
        raise ShareError(f"cannot share {type(model).__name__}: " + "; ".join(problems))
    return Specs(tuple(weights), own, tuple(left_out))


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ShareError(f"cannot share a {type(model).__name__}: a torch.nn.Module is needed")
    problems = []
    for name, module in model.named_modules():
        where = name or "the model itself"
        if getattr(type(module), "_dist_ssn_names", None):
            problems.append(f"{where} is shared already: share a model once, or share materialize(model)")
            break
        if "quantized" in type(module).__module__.split("."):
            problems.append(f"{where} ({type(module).__name__}) is quantized: share the float model, quantize materialize(model)")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            problems.append(f"{name} is lazy and has no shape yet: run one batch through the model first")
        elif parameter.is_meta:
            problems.append(f"{name} is on 'meta' and has no values: use model.to_empty(device=...) and initialize it first")
    if problems:
        raise ShareError(f"cannot share {type(model).__name__}: " + "; ".join(problems[:8]))


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """(name, module that holds it, parameter), tied ones under each of their names."""
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), module, parameter


def _reason_to_leave(parameter: nn.Parameter, places: list[tuple[str, nn.Module]]) -> str | None:
    if parameter.ndim < 2:
        return "one dimension"
    if parameter.is_complex():
        return "complex numbers"
    if not parameter.is_floating_point():
        return "integers"
    if not parameter.requires_grad:
        return "frozen"
    for _, module in places:
        if isinstance(module, _NORMS):
            return "normalization"
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            if module.sparse:
                return "sparse gradients"
            if module.max_norm is not None:
                return "max_norm writes to the weight in place"
    values = parameter.detach()
    if parameter.numel() < 2 or bool((values == values.reshape(-1)[0]).all()):
        return "starts constant"
    return None


def _spec(parameter: nn.Parameter, places: list[tuple[str, nn.Module]]) -> LayerSpec:
    name, module = places[0]
    shape = tuple(parameter.shape)
    receptive = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * receptive, shape[0] * receptive
    if isinstance(module, _TRANSPOSED) or type(module).__name__ == "Conv1D":  # the latter: Hugging Face's, (in, out)
        fan_in, fan_out = fan_out, fan_in
    padding = {m.padding_idx for _, m in places if isinstance(m, (nn.Embedding, nn.EmbeddingBag))} - {None}
    return LayerSpec(
        name=name,
        shape=shape,
        kind=type(module).__name__,
        fan_in=fan_in,
        init_std=_init_std(parameter, fan_in, fan_out),
        aliases=tuple(other for other, _ in places[1:]),
        zero_row=padding.pop() if padding else None,
    )


def _init_std(parameter: nn.Parameter, fan_in: int, fan_out: int) -> float:
    """The measured root mean square, snapped to the usual initialization that it is a sample of.

    Snapping makes the plan independent of the random seed, so that ranks that seeded differently still agree. What matches
    no usual initialization is rounded to three digits.
    """
    measured = float(parameter.detach().double().square().mean().sqrt())
    if not math.isfinite(measured):
        raise ShareError(f"a parameter of shape {tuple(parameter.shape)} holds NaN or Inf before training: initialize it")
    fans = [fan_in, fan_out, fan_out / 3, fan_out / 4]  # packed projections of attention and LSTM: 3 and 4 blocks of rows
    usual = [math.sqrt(v / f) for f in fans for v in (1 / 3, 1.0, 2.0)]
    usual += [math.sqrt(2 / (fan_in + fan_out)), *_USUAL_STD]
    nearest = min(usual, key=lambda std: abs(std - measured))
    tolerance = max(0.005, 2 / math.sqrt(parameter.numel()))
    return nearest if abs(nearest / measured - 1) < tolerance else float(f"{measured:.3g}")


def _as_list(selectors: Selector | Iterable[Selector] | None) -> list[Selector]:
    if selectors is None:
        return []
    return [selectors] if isinstance(selectors, (str, type)) else list(selectors)


def _selects(selector: Selector, places: list[tuple[str, nn.Module]]) -> bool:
    for name, module in places:
        if isinstance(selector, type):
            if isinstance(module, selector):
                return True
        elif fnmatch.fnmatchcase(name, selector) or name.startswith(f"{selector}."):
            return True
        elif any(cls.__name__ == selector for cls in type(module).__mro__ if cls is not nn.Module):
            return True
    return False
