"""Initial scales that are the same for every random seed, for decisions: a plan's groups.

The standard error of a deviation that is measured on n normal values is 1/√(2n) of it. So a large weight's own value decides, as
long as no threshold is near the ratios that formulas give. A small weight's is too noisy. Unless its layer's own default fits, it
follows the rule that fits the weights of its kind of layer best, such as "in proportion to 1/√fan out". If its values are far from
that, it follows the large weight of the nearest scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_LARGE = 2**14
"""Elements from which on a measured deviation decides by itself: five of its standard errors are 2.8 %."""
_POOLED = 2**12
"""Elements of all weights of a kind from which on a rule is looked for."""
_APART = 3.08
"""Factor by which a small weight's values must differ from the rule of its kind, so that it does not follow it. Formulas differ by
the square roots of whole numbers mostly, and 3.08² is between 9 and 10."""


class Measured(NamedTuple):
    """Facts about a weight's initial scale."""

    kind: str
    """Class of the layer."""
    numel: int
    init_std: float
    rules: tuple[float, ...]
    """Standard deviations in proportion to which initializers draw; the layer's own `reset_parameters` first, if it is known."""


def rules_for(default: float | None, fans: tuple[int, int], groups: int) -> tuple[float, ...]:
    """The `rules` of a weight.

    Args:
        default: standard deviation of the layer's own `reset_parameters`; None for unknown layers.
        fans: (fan in, fan out).
        groups: of a convolution, else 1. Some initializers divide the fan out by it.
    """
    fan_in, fan_out = fans
    usual = (1.0, fan_in**-0.5, fan_out**-0.5, (fan_out / groups) ** -0.5, (fan_in + fan_out) ** -0.5)
    return (usual[0] if default is None else default, *usual)


def settled_stds(weights: Sequence[Measured]) -> list[float]:
    """The scale of each weight as it decides.

    Args:
        weights: all weights of a model.
    """
    kinds: dict[str, list[Measured]] = {}
    for weight in weights:
        if 0 < weight.init_std < math.inf:
            kinds.setdefault(weight.kind, []).append(weight)
    fits = {kind: _fit(members) for kind, members in kinds.items()}
    large = sorted(weight.init_std for weight in weights if weight.numel >= _LARGE and 0 < weight.init_std < math.inf)
    return [_settled(weight, fits, large) for weight in weights]


def _fit(weights: Sequence[Measured]) -> tuple[int, float] | None:
    """The rule that these weights follow best (its index, its factor); None if they have too few elements."""
    total = sum(weight.numel for weight in weights)
    if total < _POOLED:
        return None
    fits = []
    for index in range(len(weights[0].rules)):
        logarithms = [math.log(weight.init_std / weight.rules[index]) for weight in weights]
        mean = sum(w.numel * x for w, x in zip(weights, logarithms, strict=True)) / total
        spread = sum(w.numel * (x - mean) ** 2 for w, x in zip(weights, logarithms, strict=True)) / total
        fits.append((round(spread, 3), index, math.exp(mean)))  # rules that fit alike: the first of them
    _, best, factor = min(fits)
    return best, factor


def _settled(weight: Measured, fits: dict[str, tuple[int, float] | None], large: Sequence[float]) -> float:
    std = weight.init_std
    fit = fits.get(weight.kind)
    if weight.numel >= _LARGE or std == weight.rules[0] or not 0 < std < math.inf:
        return std
    if fit is not None and _is_near(std, expected := weight.rules[fit[0]] * fit[1]):
        return expected
    nearest = min(large, key=lambda other: abs(math.log(other / std)), default=std)
    return nearest if _is_near(std, nearest) else std


def _is_near(std: float, other: float) -> bool:
    return other / _APART < std < other * _APART
