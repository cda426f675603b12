"""Scales of a plan's banks: data beside its structure, because an initial standard deviation may have been measured.

A plan is a function of the architecture and the options alone. The scales are of one model: they lie beside its banks, in a buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from dist_ssn.model.specs import LayerSpec
from dist_ssn.plan.mapping import group_std
from dist_ssn.plan.plan import Plan
from dist_ssn.plan.rules import RULES
from dist_ssn.plan.slots import Group

Scales = tuple[float, ...]
"""Standard deviation of a bank's initial values, then for each of its slots the fixed gain that gives the weight its own."""


def scales_of(plan: Plan, weights: Iterable[LayerSpec]) -> Mapping[str, Scales]:
    """The scales of each bank: those that the plan's file has recorded, else those of the model's initial values.

    Args:
        plan: belongs to the model.
        weights: the model's weights.

    Returns:
        Name of a group → its scales.
    """
    if plan.scales is not None:
        return plan.scales
    known = {weight.name: weight for weight in weights}
    if plan.keep:
        return {g.name: kept_scales(g, [known[slot.name] for slot in g.slots]) for g in plan.groups}
    return {group.name: group_scales(group, [known[slot.name] for slot in group.slots]) for group in plan.groups}


def group_scales(group: Group, weights: Iterable[LayerSpec]) -> Scales:
    """Scales of one bank, for its weights in the order of the slots."""
    weights = list(weights)
    std = float(np.float32(group_std(weights)))  # as the buffer has it, from which a bank can start again
    return std, *(RULES[s.morph].gain(s) * w.init_std / std for s, w in zip(group.slots, weights, strict=True))


def kept_scales(group: Group, weights: Iterable[LayerSpec]) -> Scales:
    """Scales of a bank of differences, which starts at zero.

    Under Adam a step moves each element of a bank by about the learning rate, and each element of a weight by the scale times that.
    So the scale is 1, and the learning rate of `parameter_groups` is right here, too (measured: docs/results/transfer.md).
    """
    return 0.0, *(RULES[slot.morph].gain(slot) for slot in group.slots)


def changed_scales(group: Group, scales: Scales, stds: Mapping[str, float]) -> Scales:
    """The scales of one bank, where some weights have other initial standard deviations.

    Args:
        group: of the bank.
        scales: the former ones.
        stds: name of a weight → its initial standard deviation.
    """
    gains = [RULES[slot.morph].gain(slot) for slot in group.slots]
    former = [scales[0] * scale / gain for scale, gain in zip(scales[1:], gains, strict=True)]
    new = [stds.get(slot.name, std) for slot, std in zip(group.slots, former, strict=True)]
    squares = sum(slot.numel * std**2 for slot, std in zip(group.slots, new, strict=True))
    bank = float(np.float32(math.sqrt(squares / group.numel)))
    return bank, *(gain * std / bank for gain, std in zip(gains, new, strict=True))
