"""What holds for every plan: never over the budget, none of it idle, every weight once, every number of a bank read, no luck."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dist_ssn.errors import BudgetError, PlanError, ShareError, UserError
from dist_ssn.model.specs import LayerSpec, Specs, find_specs
from dist_ssn.plan import MAPPINGS, Group, Morph, Plan, make_plan
from dist_ssn.plan.rules import EMBEDDING_SIZE, reach
from dist_ssn.plan.scales import scales_of
from dist_ssn.sharing.morphs import MORPHS, Chunks, readings

MORPH_TEXTS = (
    *("auto", "avg", "wavg", "emb", "inter", "mask", "repeat", "offset", "hash"),
    *("emb/inter", "avg/mask", "wavg/repeat", "emb/wavg"),
    *("offset:rank=3,gains=true", "offset:templates=2,chunk=5,gains=false", "hash:chunk=7,templates=3"),
    *("wavg:templates=6,rank=1", "inter:templates=1,gains=true", "auto:rank=2"),
)
MAPPING_TEXTS = ("auto", "single", "shape", "scale", "blocks", "depth", "depth:3", "random", "random:2")
BUDGETS = st.one_of(
    st.sampled_from([0.001, 0.02, 0.1, 0.5, 0.99, 1.0, 1.01, 1.5, 2.0, 4.0, 8.0]),
    st.floats(0.001, 8.0),
    st.integers(1, 100_000),
)
STDS = st.one_of(st.sampled_from([0.02, 0.1, 1.0]), st.floats(1e-4, 10.0))


@st.composite
def some_specs(draw: st.DrawFn, most: int = 40, largest: int = 200, numbers: int = 5_000) -> Specs:
    """1 to `most` weights of 2 to 4 dimensions; many share a shape, as in real models."""
    sizes = st.sampled_from([size for size in (1, 2, 3, 5, 8, 16, 27, 64, 200, 1000, 50_000) if size <= largest])
    shapes = st.lists(sizes, min_size=2, max_size=4).map(tuple).filter(lambda shape: 2 <= math.prod(shape) <= numbers)
    known = draw(st.lists(shapes, min_size=1, max_size=5))
    chosen = draw(st.lists(st.tuples(st.sampled_from(known), STDS), min_size=1, max_size=most))
    once = draw(st.sets(st.integers(0, len(chosen) - 1), max_size=3))
    tables = draw(st.sets(st.integers(0, len(chosen) - 1), max_size=2))
    names = [f"once-{chr(97 + i)}" if i in once else f"layer{i}.weight" for i in range(len(chosen))]
    return Specs(
        tuple(
            LayerSpec(name, s, "Linear", s[1], std, is_table=i in tables)
            for i, (name, (s, std)) in enumerate(zip(names, chosen, strict=True))
        )
    )


def plan_or_least(specs: Specs, budget: Any, **how: Any) -> Plan | int:
    """The plan, or the smallest possible budget that the error names."""
    try:
        return make_plan(specs, budget, **how)
    except BudgetError as error:
        found = re.search(r"the smallest possible budget is ([\d,]+)$", str(error))
        assert found, error
        return int(found[1].replace(",", ""))


@settings(max_examples=250)
@given(some_specs(), BUDGETS, st.sampled_from(MORPH_TEXTS), st.sampled_from(MAPPING_TEXTS), st.integers(0, 3))
def test_every_plan(specs: Specs, budget: float | int, morph: str, mapping: str, seed: int) -> None:
    how = {"morph": morph, "mapping": mapping, "seed": seed}
    plan = plan_or_least(specs, budget, **how)
    if isinstance(plan, int):
        check_least(specs, budget, plan, how)
        return
    assert plan == make_plan(specs, budget, **how)
    check_slots(specs, plan)
    check_use(specs, plan)
    for group in plan.groups:
        check_readings(group, plan.seed, morph)
    assert Plan.from_json(plan.to_json()) == plan


@given(some_specs(), BUDGETS, st.sampled_from(MORPH_TEXTS), st.sampled_from(MAPPING_TEXTS), st.data())
def test_a_demand_changes_the_shares_alone(
    specs: Specs, budget: float | int, morph: str, mapping: str, data: st.DataObject
) -> None:
    how: dict[str, Any] = {"morph": morph, "mapping": mapping}
    demand = {weight.name: data.draw(st.floats(0.25, 4)) for weight in specs.weights}
    plain, plan = plan_or_least(specs, budget, **how), plan_or_least(specs, budget, **how, demand=demand)
    if isinstance(plain, int) or isinstance(plan, int):
        assert plain == plan
        return
    check_slots(specs, plan)
    assert plan.parameters <= plan.budget
    assert [[slot.name for slot in group.slots] for group in plan.groups] == [
        [slot.name for slot in group.slots] for group in plain.groups
    ]
    if "hash" not in morph:  # it draws an order for each template; `test_every_plan` checks them
        for group in plan.groups:
            check_readings(group, plan.seed, morph)
    assert make_plan(specs, budget, **how, demand=dict.fromkeys(demand, 0.7)) == plain


def test_a_group_that_demands_twice_as_much_gets_twice_as_much() -> None:
    specs = Specs(tuple(LayerSpec(f"layer{i}.weight", (64, 64), "Linear", 64, 0.1) for i in range(6)))
    mapping = {f"layer{i}.weight": "ab"[i % 2] for i in range(6)}
    demand = {name: {"a": 1.0, "b": 2.0}[group] for name, group in mapping.items()}
    first, second = make_plan(specs, 0.1, mapping=mapping, morph="offset:gains=false", demand=demand).groups
    assert first.name == "a" and second.size == pytest.approx(2 * first.size, rel=0.01)


@pytest.mark.parametrize(
    ("demand", "problem"),
    [
        ({"layer0.weight": 1.0}, "demand must name each weight once; 'layer1.weight' is only in one of them"),
        (
            {"layer0.weight": 1.0, "layer1.weight": 0.0},
            "the demand of layer1.weight is 0.0: it must be a number above 0",
        ),
        ({"layer0.weight": 1.0, "layer1.weight": math.nan}, "the demand of layer1.weight is nan"),
    ],
)
def test_a_wrong_demand_is_named(demand: dict[str, float], problem: str) -> None:
    specs = Specs(tuple(LayerSpec(f"layer{i}.weight", (8, 8), "Linear", 8, 0.1) for i in range(2)))
    with pytest.raises(PlanError, match=problem):
        make_plan(specs, 0.5, demand=demand)


@settings(max_examples=60)
@given(some_specs(largest=50_000, numbers=2**44), BUDGETS, st.sampled_from(MORPH_TEXTS), st.sampled_from(MAPPING_TEXTS))
def test_large_weights(specs: Specs, budget: float | int, morph: str, mapping: str) -> None:
    """Up to 10^13 numbers in a weight: nothing of that size is allocated, and nothing is lost to floating point."""
    plan = plan_or_least(specs, budget, morph=morph, mapping=mapping)
    if isinstance(plan, int):
        check_least(specs, budget, plan, {"morph": morph, "mapping": mapping})
        return
    check_slots(specs, plan)
    check_use(specs, plan)
    assert Plan.from_json(plan.to_json()) == plan


def check_least(specs: Specs, budget: float | int, least: int, how: dict[str, Any]) -> None:
    allowed = budget if isinstance(budget, int) else math.floor(budget * specs.numel)
    assert allowed < least
    enough = make_plan(specs, least, **how)
    check_use(specs, enough)
    assert plan_or_least(specs, least - 1, **how) == least if least > 1 else True


def check_slots(specs: Specs, plan: Plan) -> None:
    """Every weight stands in exactly one slot, with what its spec says of it."""
    slots = {slot.name: slot for _, slot in plan.slots()}
    assert sorted(slot.name for _, slot in plan.slots()) == sorted(weight.name for weight in specs.weights)
    for weight in specs.weights:
        slot = slots[weight.name]
        assert (slot.shape, slot.zero_row) == (weight.shape, weight.zero_row) and slot.morph in MORPHS
    stds = {weight.name: weight.init_std for weight in specs.weights}
    for group, (std, *scales) in zip(plan.groups, scales_of(plan, specs.weights).values(), strict=True):
        squares = sum(slot.numel * stds[slot.name] ** 2 for slot in group.slots) / group.numel
        assert std == pytest.approx(math.sqrt(squares), rel=1e-6)
        assert len(scales) == len(group.slots) and all(0 < scale < math.inf for scale in scales)
        assert all(0 <= slot.start < group.size for slot in group.slots)


def check_use(specs: Specs, plan: Plan) -> None:
    """All of the budget is used, but for two cases: odd banks, and models that stay dense as a whole."""
    dense = all(len(group.slots) == 1 and group.size == group.parameters == group.numel for group in plan.groups)
    if dense:
        assert plan.parameters == specs.numel <= plan.budget
        return
    may_be_one_less = sum({slot.morph for slot in group.slots} == {"offset"} for group in plan.groups)
    assert plan.budget - may_be_one_less <= plan.parameters <= plan.budget
    if plan.budget >= 100 * len(plan.groups):
        assert plan.parameters >= 0.99 * plan.budget


def check_readings(group: Group, seed: int, morph: str) -> None:
    """Reads stay inside the bank, and reach every number, but for the cases that `dist_ssn.plan.allocate` names."""
    unread = set_of_unread(group, seed)
    morphs = {slot.morph for slot in group.slots}
    if morphs & {"hash"}:
        if any(slot.numel >= group.size for slot in group.slots):
            assert unread < max(slot.chunk for slot in group.slots)
        return
    # The stretches lie end to end, so that what they leave is what they are too short for.
    assert unread == max(0, group.size - sum(reach(slot, group.size) for slot in group.slots))
    if group.size > group.numel and ("templates" in morph or "emb" in morph):
        return
    allowed = {"inter": lambda s: s.templates * (s.template_shape[0] + 1), "wavg-up": lambda s: s.templates}
    remainders = max((allowed[slot.morph](slot) for slot in group.slots if slot.morph in allowed), default=0)
    next_template = (EMBEDDING_SIZE if "emb" in morph else 2) * len(group.slots) + EMBEDDING_SIZE**2 * ("emb" in morph)
    assert unread <= max(remainders, next_template)


def set_of_unread(group: Group, seed: int) -> int:
    """How many numbers of the bank no slot reads."""
    read: list[tuple[int, int]] = []
    for slot in group.slots:
        parts = readings(slot, seed, group.size)
        assert len(parts) == slot.templates
        for part in parts:
            if isinstance(part, Chunks):
                places = part.at(torch.arange(min(part.length, 3 * group.size)), group.size).unique()
                assert int(places.min()) >= 0 and int(places.max()) < group.size
                read += [(place, place + 1) for place in places.tolist()]
            else:
                assert 0 <= part.start < group.size and part.length >= 1
                end = min(part.start + part.length, part.start + group.size)
                read += [(part.start, min(end, group.size)), (0, max(0, end - group.size))]
    return group.size - measure(read)


def measure(intervals: Sequence[tuple[int, int]]) -> int:
    """Total length of a union of half-open intervals."""
    total, reached = 0, 0
    for start, end in sorted(intervals):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


@given(some_specs(), st.sampled_from(MORPH_TEXTS), st.sampled_from(MAPPING_TEXTS))
def test_what_is_left_out_of_the_budget_stays_feasible(specs: Specs, morph: str, mapping: str) -> None:
    """Above the smallest budget every budget works."""
    least = plan_or_least(specs, 1, morph=morph, mapping=mapping)
    least = least if isinstance(least, int) else 1
    for more in (1, 2, 3, 7, 50, 1000, specs.numel):
        assert isinstance(plan_or_least(specs, least + more, morph=morph, mapping=mapping), Plan)


@pytest.mark.processes
def test_the_same_in_another_process() -> None:
    """Neither the hash seed nor the process matters: all ranks make the same plan."""
    here = fingerprints()
    program = (
        f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\nfrom {__name__.rpartition('.')[2]} import *\n"
    )
    program += "print(' '.join(fingerprints()))"
    environment = {**os.environ, "PYTHONHASHSEED": "4321", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == here, done.stderr


def fingerprints() -> list[str]:
    """Of plans of many kinds, for a model whose weights follow from no seed."""
    shapes = [(3 + i % 4, 5 + i % 3, 1 + i % 2) for i in range(12)]
    weights = [LayerSpec(f"w{i}", shape, "X", 5, 0.1 + i % 3, (f"v{i}", f"u{i}")) for i, shape in enumerate(shapes)]
    specs = Specs((*weights, LayerSpec("head", (7, 11), "X", 11, 0.1)))
    names = {f"w{i}": f"g{i % 3}" for i in range(12)} | {"head": "g0"}
    mappings = [*MAPPING_TEXTS, names]
    pairs = [(morph, mappings[(i + shift) % len(mappings)]) for i, morph in enumerate(MORPH_TEXTS) for shift in (0, 4)]
    plans = [plan_or_least(specs, 0.6, morph=morph, mapping=mapping) for morph, mapping in pairs]
    return [plan.fingerprint if isinstance(plan, Plan) else str(plan) for plan in plans]


@pytest.mark.parametrize("seed", [0, 1, -7, 2**53])
def test_the_seed_is_in_the_plan(seed: int) -> None:
    specs = Specs(tuple(LayerSpec(f"w{i}", (20, 30), "Linear", 30, 0.1) for i in range(9)))
    plan = make_plan(specs, 0.3, mapping="random", seed=seed)
    assert plan.seed == seed and Plan.from_json(plan.to_json()) == plan


def test_a_lone_weight_with_room_stays_dense() -> None:
    """And what it has to spare goes to the others."""
    specs = Specs(
        (LayerSpec("a", (10, 10), "Linear", 10, 0.1), *(LayerSpec(n, (5, 8), "Linear", 8, 0.2) for n in "bc"))
    )
    lone, pair = make_plan(specs, 2.0, mapping="shape").groups
    assert (lone.size, lone.slots[0].morph) == (100, "repeat")
    assert lone.parameters + pair.parameters == 360
    everything = make_plan(Specs(specs.weights[:1]), 3.0)
    assert (everything.parameters, everything.budget) == (100, 300)


def test_a_small_group_gets_what_it_needs() -> None:
    """In proportion it would get half a number, and the plan would fail although the budget is ample."""
    small, large = LayerSpec("a", (1, 5), "Linear", 5, 0.1), LayerSpec("b", (100, 100), "Linear", 100, 0.1)
    plan = make_plan(Specs((small, large)), 0.01, mapping="shape", morph="inter")
    assert [group.size for group in plan.groups] == [1, 99] and plan.parameters == 100


def test_inter_reads_one_template_as_the_papers_code_does() -> None:
    """Several are smaller, so that a resized one has a lower rank."""
    weights = tuple(LayerSpec(name, (64, 64, 3, 3), "Conv2d", 576, 0.06) for name in "ab")
    one, four = (
        make_plan(Specs(weights), 0.1, morph=morph).groups[0].slots[0] for morph in ("inter", "inter:templates=4")
    )
    assert (one.morph, one.templates, one.coefficients) == ("inter", 1, 0)
    assert (four.morph, four.templates, four.coefficients) == ("inter", 4, 4)
    assert min(one.template_shape) > 1.6 * min(four.template_shape)


@pytest.mark.parametrize("morph", ["auto", "inter", "mask", "wavg", "emb", "hash"])
@pytest.mark.parametrize("budget", [0.1, 0.9, 1.3, 4.0])
def test_a_thousand_weights_take_less_than_a_second(morph: str, budget: float) -> None:
    shapes = [(64, 64), (128, 64, 3, 3), (1000, 300), (4096, 1024), (50_000, 512)]
    specs = Specs(tuple(LayerSpec(f"w{i}", shapes[i % 5], "Linear", 64, 0.1) for i in range(1000)))
    start = time.process_time()
    make_plan(specs, budget, morph=morph)
    assert time.process_time() - start < 1


def test_an_impossible_budget_for_a_hundred_groups_is_told_soon() -> None:
    specs = Specs(tuple(LayerSpec(f"w{i}", (64, 64 + i), "Linear", 64, 0.1) for i in range(100)))
    start = time.process_time()
    assert isinstance(plan_or_least(specs, 10, morph="wavg", mapping="shape"), int)
    assert time.process_time() - start < 5


def test_a_model_is_read_as_its_specs_are() -> None:
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20))
    assert make_plan(model, 0.2) == make_plan(find_specs(model), 0.2)
    assert [slot.name for _, slot in make_plan(model, 0.2, exclude="0").slots()] == ["1.weight"]


SPECS = Specs((LayerSpec("a.weight", (10, 20), "Linear", 20, 0.1), LayerSpec("b.weight", (20, 10), "Linear", 10, 0.1)))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"morph": "ofset"}, "unknown morph 'ofset': known are .*; did you mean 'offset'"),
        ({"morph": ""}, "unknown morph ''"),
        ({"morph": "inter/avg"}, "a pair is down/up, one of avg, wavg, emb and one of inter, mask, repeat, wavg"),
        ({"morph": "avg/inter/mask"}, "a pair is down/up"),
        ({"morph": "offset:rank"}, "cannot read 'rank'; options are templates=N"),
        ({"morph": "offset:rank=-1"}, "cannot read 'rank=-1'"),
        ({"morph": "offset:rank=²"}, "cannot read 'rank=²'"),
        ({"morph": "offset:rank=" + "9" * 5000}, "cannot read 'rank=9"),
        ({"morph": "offset:gains=yes"}, "cannot read 'gains=yes'.* gains=true|false"),
        ({"morph": "offset:templates=0"}, "templates=0 must be an integer of at least 1"),
        ({"morph": "emb:templates=9"}, "templates=9 is more than the 8 elements of an embedding"),
        ({"morph": "inter:chunk=8"}, "morph 'inter' has no chunks: chunk=N goes with offset and hash"),
        ({"morph": Morph("offset", rank=2.5)}, "rank=2.5 must be an integer of at least 0"),  # type: ignore[arg-type]
        ({"morph": Morph("offset", templates=True)}, "templates=True must be an integer"),
        ({"morph": Morph("offset", gains="no")}, "gains='no' must be true or false"),  # type: ignore[arg-type]
        ({"morph": 3}, "morph 3 is of type int: give a text"),
        ({"morph": None}, "morph None is of type NoneType"),
        ({"seed": 1.5}, "seed 1.5 must be an integer"),
        ({"seed": "0"}, "seed '0' must be an integer"),
        ({"seed": True}, "seed True must be an integer"),
        ({"seed": 2**53 + 1}, "must be an integer of at most 53 bits"),
        ({"include": "a"}, "include and exclude select among a model's weights"),
        ({"exclude": ["a"]}, "include and exclude select among a model's weights"),
    ],
)
def test_wrong_arguments(how: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        make_plan(SPECS, 0.5, **how)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 6000


@pytest.mark.parametrize("thing", [Specs(()), [1, 2], None, "model"])
def test_nothing_to_plan_for(thing: Any) -> None:
    with pytest.raises(PlanError, match="give a model, or the result of find_specs"):
        make_plan(thing, 0.5)
    with pytest.raises(ShareError, match="no trainable floating-point parameter"):
        make_plan(nn.LayerNorm(3), 0.5)


def test_no_budget_is_enough_for_a_difference_of_a_lone_weight_that_must_share() -> None:
    """Two tiny weights whose options alone are larger than themselves still get a plan, with a budget above 1."""
    weights = tuple(replace(weight, shape=(2, 2)) for weight in SPECS.weights)
    least = plan_or_least(Specs(weights), 0.5, morph="offset:rank=2,gains=true", mapping="single")
    assert least == 25  # one number of bank; 4 gains and 8 of a difference for each
    with pytest.raises(
        UserError, match="allows 2 trainable parameters, too few for 2 weights with mapping 'single' and morph"
    ):
        make_plan(Specs(weights), 2, morph="offset:rank=2,gains=true", mapping="single")


def test_every_mapping_and_morph_is_tried_here() -> None:
    assert {text.partition(":")[0] for text in MAPPING_TEXTS} == {"auto", *MAPPINGS}
    assert {name.removesuffix("-up") for name in MORPHS} <= {p for t in MORPH_TEXTS for p in re.split("[/:]", t)}
