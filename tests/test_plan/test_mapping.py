"""Mappings: which weights share a bank, by name, by rule and by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ssn.errors import PlanError
from dist_ssn.model.specs import LayerSpec, Specs
from dist_ssn.plan import MAPPINGS, Plan, make_plan
from dist_ssn.plan.mapping import group_std, layers_once, map_weights


def spec(name: str, *shape: int, std: float = 0.1, aliases: tuple[str, ...] = (), is_table: bool = False) -> LayerSpec:
    return LayerSpec(name, shape, "Linear", shape[1], std, aliases, is_table=is_table)


WEIGHTS = (
    spec("table.weight", 50, 8, std=1.0, aliases=("head.weight",), is_table=True),
    spec("blocks.0.up.weight", 32, 8),
    spec("blocks.0.down.weight", 8, 32),
    spec("blocks.1.up.weight", 32, 8),
    spec("blocks.1.down.weight", 8, 32, std=0.02),
    spec("last.weight", 10, 8),
)
TABLE, UP0, DOWN0, UP1, DOWN1, LAST = (weight.name for weight in WEIGHTS)


def grouped(mapping: Any, seed: int = 0) -> dict[str, list[str]]:
    return {name: [w.name for w in weights] for name, weights in map_weights(WEIGHTS, mapping, seed).items()}


@pytest.mark.parametrize(
    ("mapping", "groups"),
    [
        ("single", {"all": [TABLE, UP0, DOWN0, UP1, DOWN1, LAST]}),
        (
            "shape",
            {"shape-50x8": [TABLE], "shape-32x8": [UP0, UP1], "shape-8x32": [DOWN0, DOWN1], "shape-10x8": [LAST]},
        ),
        ("depth:2", {"depth-0": [TABLE, UP0], "depth-1": [DOWN0, UP1, DOWN1, LAST]}),
        ("depth:1", {"depth-0": [TABLE, UP0, DOWN0, UP1, DOWN1, LAST]}),
        ("scale", {"scale-0": [TABLE], "scale-1": [UP0, DOWN0, UP1, DOWN1, LAST]}),
        ("blocks", {"scale-0": [TABLE], "scale-1": [UP0, DOWN0, UP1, DOWN1], "once-0": [LAST]}),
        ({"*": "one"}, {"one": [TABLE, UP0, DOWN0, UP1, DOWN1, LAST]}),
        (
            {"*.up.*": "up", "blocks.*": "rest-of_blocks", "*": "Z9"},
            {"Z9": [TABLE, LAST], "up": [UP0, UP1], "rest-of_blocks": [DOWN0, DOWN1]},
        ),
        ({"head.weight": "io", "last.*": "io", "*": "body"}, {"io": [TABLE, LAST], "body": [UP0, DOWN0, UP1, DOWN1]}),
    ],
    ids=str,
)
def test_groups(mapping: Any, groups: dict[str, list[str]]) -> None:
    """Every weight stands in one group, in the model's order; a tied weight answers to each of its names."""
    assert grouped(mapping) == groups


def test_a_name_that_looks_like_a_glob() -> None:
    weights = (spec("a[0].weight", 2, 3), spec("a0.weight", 2, 3))
    assert [w.name for w in map_weights(weights, {"a[0].weight": "x"}, 0)["x"]] == [
        "a[0].weight",
        "a0.weight",
    ]
    assert [w.name for w in map_weights(weights, {"a0.*": "y", "a[0].weight": "x"}, 0)["x"]] == ["a[0].weight"]


def test_depth_cuts_into_contiguous_stages_of_about_equal_size() -> None:
    weights = tuple(spec(f"w{i}", 10, 10 + i % 3) for i in range(40))
    groups = map_weights(weights, "depth:5", 0)
    assert list(groups) == [f"depth-{i}" for i in range(5)]
    assert [w.name for group in groups.values() for w in group] == [w.name for w in weights]
    sizes = [sum(w.numel for w in group) for group in groups.values()]
    assert max(sizes) - min(sizes) <= 240


def test_random_draws_banks_of_equal_numbers_by_seed() -> None:
    weights = tuple(spec(f"w{i}", 2, 3) for i in range(40))
    first, again, other = (map_weights(weights, "random:7", seed) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(len(group) for group in first.values()) == [5, 5, 6, 6, 6, 6, 6]
    shuffled = map_weights(weights[::-1], "random:7", 0)
    assert {name: {w.name for w in group} for name, group in first.items()} == {
        name: {w.name for w in group} for name, group in shuffled.items()
    }
    assert len(map_weights(weights[:3], "random:7", 0)) == 3


@given(st.lists(st.floats(1e-4, 10), min_size=1, max_size=30))
def test_scale_keeps_near_standard_deviations_together(stds: list[float]) -> None:
    weights = tuple(spec(f"w{i}", 2, 3, std=std) for i, std in enumerate(stds))
    groups = list(map_weights(weights, "scale", 0).values())
    for group in groups:
        low, high = min(w.init_std for w in group), max(w.init_std for w in group)
        assert high <= 10 * low and low <= group_std(group) * (1 + 1e-12) and group_std(group) <= high * (1 + 1e-12)
        assert [w.name for w in group] == [w.name for w in weights if w in group]
    assert sorted(w.name for group in groups for w in group) == sorted(w.name for w in weights)
    spans = sorted((min(w.init_std for w in group), max(w.init_std for w in group)) for group in groups)
    assert all(mine[1] < others[0] for mine, others in itertools.pairwise(spans))


@pytest.mark.parametrize("budget", [0.3, 1.0, 4.0])
def test_the_default_parts_blocks_by_scale_and_keeps_apart_what_there_is_once(budget: float) -> None:
    """At every budget. What is repeated differs in numbers alone, wherever they stand in its name."""
    stds = {"stem": 0.2, "0.up": 1.0, "0.down": 0.05, "1.up": 1.0, "1.down": 0.04, "head": 0.04}
    weights = tuple(spec(name, 64, 32, std=std) for name, std in stds.items())
    groups = {
        group.name: sorted(slot.name for slot in group.slots) for group in make_plan(Specs(weights), budget).groups
    }
    assert groups == {
        "scale-0": ["0.up", "1.up"],
        "scale-1": ["0.down", "1.down"],
        "once-0": ["stem"],
        "once-1": ["head"],
    }


def test_small_budgets_leave_all_together() -> None:
    """A layer alone would have too few numbers."""
    weights = (spec("stem", 64, 32, std=0.02), spec("0.up", 64, 32), spec("1.up", 64, 32), spec("head", 64, 32))
    assert [g.name for g in make_plan(Specs(weights), "2%").groups] == ["blocks", "once-0", "once-1"]
    assert [g.name for g in make_plan(Specs(weights), "1.9%").groups] == ["all"]


def test_embeddings_stay_with_the_blocks_and_without_blocks_all_stay_together() -> None:
    table, head = spec("table", 50, 8, is_table=True), spec("head", 8, 8)
    up, down = spec("0.up", 8, 8), spec("1.up", 8, 8, std=0.02)

    def names(*weights: LayerSpec) -> dict[str, list[str]]:
        return {name: [w.name for w in group] for name, group in map_weights(weights, "blocks", 0).items()}

    assert names(table, up, down) == {"all": ["table", "0.up", "1.up"]}
    assert names(table, up, down, head) == {"blocks": ["table", "0.up", "1.up"], "once-0": ["head"]}
    assert names(table, head) == {"all": ["table", "head"]}
    assert names(up, head) == {"all": ["0.up", "head"]}


@pytest.mark.parametrize(("std", "apart"), [(0.1, False), (0.3, False), (0.31, True), (0.04, False), (0.03, True)])
def test_layers_of_one_initial_scale_stay_together(std: float, apart: bool) -> None:
    """As in a BERT, whose head starts like its blocks; another bank's scales say nothing of it."""
    weights = (
        spec("table", 64, 32, std=5.0),
        spec("0.up", 64, 32),
        spec("1.up", 64, 32),
        spec("head", 64, 32, std=std),
    )
    assert [w.name for w in layers_once(weights)] == ["head"] * apart
    assert ("once-0" in map_weights(weights, "blocks", 0)) == apart


def test_what_counts_as_repeated() -> None:
    """Numbers anywhere in a name, but of one kind of layer; and a weight that is tied over several blocks."""

    def once(*weights: LayerSpec) -> list[str]:
        return [w.name for w in layers_once(weights)]

    block = [spec("1.up", 8, 8), spec("2.up", 8, 8, std=0.02)]
    assert once(replace(spec("0.weight", 8, 8), kind="Conv2d"), *block, spec("3.weight", 8, 8)) == [
        "0.weight",
        "3.weight",
    ]
    assert once(spec("0.weight", 8, 8), *block, spec("3.weight", 8, 8)) == []
    assert once(spec("fc1", 8, 8), spec("fc2", 8, 8, std=0.02), spec("head", 8, 8)) == ["head"]
    assert once(spec("tied.0", 8, 8, aliases=("tied.1",)), *block, spec("head", 8, 8, aliases=("foot",))) == ["head"]
    assert once(*block[:1], spec("head", 8, 8)) == once() == []


def test_the_order_of_a_mapping_by_hand_matters_only_where_globs_overlap() -> None:
    one = {"*.up.*": "u", "*.down.*": "d", "table.*": "t", "last.*": "t"}
    other = dict(reversed(one.items()))
    assert make_plan(Specs(WEIGHTS), 0.5, mapping=one) == make_plan(Specs(WEIGHTS), 0.5, mapping=other)
    assert grouped({"*": "a"}) != grouped({"last*": "b", "*": "a"})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("dept", r"unknown mapping 'dept': known are auto, blocks, depth, .*; did you mean 'depth'\?, or a dict"),
        ("", "unknown mapping ''"),
        ("depth:0", "mapping 'depth:0': a number of groups goes with depth and random only, as \"depth:3\""),
        ("depth:x", "a number of groups goes with depth and random only"),
        ("depth:²", "a number of groups goes with depth and random only"),
        ("depth:" + "9" * 5_000, "a number of groups goes with depth and random only"),
        ("single:2", "a number of groups goes with depth and random only"),
        (None, "mapping None is of type NoneType: give a name, or a dict"),
        (3, "mapping 3 is of type int"),
        ([("*", "a")], "is of type list"),
        (
            {"*.up.*": "u"},
            r"names no group for table.weight, .*, last.weight: add a glob for it, \"\*\" for all the rest",
        ),
        ({"*": "a", "table.*": "b"}, "glob 'table.[*]' applies to no weight: remove it, or put it before a wider one"),
        ({"*": "a", "tabel": "b"}, "glob 'tabel' applies to no weight"),
        ({"*": "1a"}, "group name '1a' in the mapping: use letters, digits, - and _, a letter first"),
        ({"*": "a.b"}, "group name 'a.b' in the mapping"),
        ({"*": "a\n"}, "group name 'a.n' in the mapping"),
        ({"*": ""}, "group name '' in the mapping"),
        ({"*": None}, "group name None in the mapping"),
        ({3: "a"}, "the mapping's key 3 is of type int: give globs"),
        ({}, "the mapping names no group for table.weight"),
    ],
)
def test_wrong_mappings(mapping: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        make_plan(Specs(WEIGHTS), 0.5, mapping=mapping)
    assert "\n" not in str(caught.value)


def test_long_names_survive_json() -> None:
    """A group's name is as long as its shape, or its user, wants."""
    deep = Specs((spec("w", *(1,) * 58, 3, 2), spec("v", 4, 4)))
    for mapping in ("shape", {"w": "x" * 300, "v": "y"}):
        plan = make_plan(deep, 1_000, mapping=mapping)
        assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_mapping_lists_each_weight_once(mapping: str) -> None:
    assert sorted(name for group in grouped(mapping).values() for name in group) == sorted(w.name for w in WEIGHTS)
