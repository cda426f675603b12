"""A plan is a function of the architecture and the options: random values of the weights are data, and decide nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dist_ssn import make_plan, share
from dist_ssn.model.settled_scale import Measured, rules_for, settled_stds
from dist_ssn.model.specs import LayerSpec, Specs, find_specs
from dist_ssn.plan.mapping import map_weights
from dist_ssn.plan.scales import group_scales, scales_of
from testing.architectures import ARCHITECTURES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_of_several_seeds_have_one_plan(name: str) -> None:
    texts, scales = set(), set()
    for seed in range(3):
        torch.manual_seed(seed)
        specs = find_specs(ARCHITECTURES[name].build())
        plan = make_plan(specs, 0.2)
        texts.add(plan.to_json())
        scales.add(str(scales_of(plan, specs.weights)))
    assert len(texts) == 1
    assert len(scales) > 1 or name not in ("T5", "Mamba")  # of which some scales are measured


@pytest.mark.parametrize("ratio", [math.sqrt(64), math.sqrt(9), math.sqrt(72), math.sqrt(10)])
def test_measured_values_near_a_ratio_of_formulas_fall_on_one_side(ratio: float) -> None:
    for mapping in ("scale", "blocks"):
        groups = set()
        for noise in (-0.02, -0.002, 0.0, 0.002, 0.02):
            weights = [LayerSpec(f"blocks.{i}.weight", (200, 100), "Linear", 100, 0.01) for i in range(2)]
            weights.append(LayerSpec("head.weight", (200, 100), "Linear", 100, 0.01 * ratio * (1 + noise)))
            found = map_weights(weights, mapping, 0)
            groups.add(str({name: [w.name for w in group] for name, group in found.items()}))
        assert len(groups) == 1, (mapping, ratio)


def measured(kind: str, shape: tuple[int, int], std: float, default: float | None = None) -> Measured:
    return Measured(kind, math.prod(shape), std, rules_for(default, (shape[1], shape[0]), 1))


def test_a_small_weight_follows_the_rule_of_its_kind() -> None:
    """Here the deviation is 1.5 over the square root of the fan out, of which a small weight's values show too little."""
    large = [measured("Conv2d", (rows, 200), 1.5 * rows**-0.5) for rows in (100, 200, 400)]
    small = [measured("Conv2d", (25, 4), std) for std in (0.2, 0.3, 0.4)]
    other = [measured("Linear", (25, 4), std) for std in (0.2, 0.3, 0.4)]  # a kind of which there is too little
    found = settled_stds([*large, *small, *other])
    assert found[:3] == [weight.init_std for weight in large]
    assert found[3:6] == pytest.approx([0.3, 0.3, 0.3], rel=1e-3)
    assert found[6:] == pytest.approx([0.15] * 3)  # the nearest of the large weights


def test_a_small_weight_far_from_its_kind_follows_the_nearest_large_one_or_itself() -> None:
    large = [measured("Embedding", (2000, 64), 1.0), measured("Linear", (200, 200), 0.04)]
    small = [measured("Embedding", (32, 8), std) for std in (0.03, 0.05, 0.001)]
    assert settled_stds([*large, *small])[2:] == [0.04, 0.04, 0.001]
    own = measured("Linear", (8, 4), 0.29, 0.29)
    assert settled_stds([*large, own])[2] == 0.29  # its own default


def test_scales_of_a_plan_are_those_of_the_model() -> None:
    """The bank has the root mean square of its weights, each slot the rest and the gain of its morph."""
    weights = (LayerSpec("a", (30, 20), "Linear", 20, 0.3), LayerSpec("b", (20, 10), "Linear", 10, 0.1))
    plan = make_plan(Specs(weights), 3.0, mapping="single", morph="avg")
    (std, first, second) = group_scales(plan.groups[0], weights)
    assert std == pytest.approx(math.sqrt((600 * 0.3**2 + 200 * 0.1**2) / 800), rel=1e-7)
    templates = [slot.templates for slot in plan.groups[0].slots]
    assert (first, second) == pytest.approx((0.3 / std * math.sqrt(templates[0]), 0.1 / std * math.sqrt(templates[1])))


def test_one_plan_serves_models_of_other_scales() -> None:
    """The weights get the standard deviations of the model that is shared, not those of the model that was planned."""
    plan = make_plan(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), 0.3)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for layer, std in zip(model, (0.05, 0.02), strict=True):
        nn.init.normal_(layer.weight, std=std)  # pyright: ignore
    share(model, plan=plan)
    assert [float(layer.weight.detach().std()) for layer in model] == pytest.approx([0.05, 0.02], rel=0.1)  # pyright: ignore
