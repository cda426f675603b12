"""Clustering and the arithmetic of halving: pure functions, by hand and by their properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ssn.cost.overlap import Exposure
from dist_ssn.errors import BudgetError, UserError
from dist_ssn.mapping_search.aligned import aligned_plan
from dist_ssn.mapping_search.grouping import by_distance, by_kmeans, by_ward, features, indices_to_group, mapping_of
from dist_ssn.mapping_search.halving import LEAST_STEPS, Candidate, candidates, rungs_of, schedule, steps_of
from dist_ssn.mapping_search.methods import cheapest, distances_of
from dist_ssn.model.specs import LayerSpec, Specs

THREE = np.array([[0.0, 0.0], [0.1, 0], [5, 5], [5.1, 5], [9, 0], [9, 0.1]])


def same(labels: list[int]) -> set[frozenset[int]]:
    return {frozenset(i for i, other in enumerate(labels) if other == label) for label in labels}


PAIRS = {frozenset({0, 1}), frozenset({2, 3}), frozenset({4, 5})}


def test_groups_are_found_and_counted_by_silhouette() -> None:
    for labels, note in (by_kmeans(THREE, None, 0), by_ward(THREE, None)):
        assert same(labels) == PAIRS and note.startswith("3 groups by silhouette 0.9")
    distances = np.linalg.norm(THREE[:, None] - THREE[None], axis=-1)
    assert same(by_distance(distances, None)[0]) == PAIRS


def test_as_many_groups_as_asked_for() -> None:
    labels, note = by_kmeans(THREE, 2, 0)
    assert len(same(labels)) == 2 and note == "2 groups as asked for"
    assert len(same(by_ward(THREE, 6)[0])) == 6
    assert len(same(by_ward(np.zeros((4, 2)), 3)[0])) == 1  # which are all the same
    assert by_ward(THREE[:2], None) == ([0, 0], "1 group")


def test_kmeans_follows_its_seed() -> None:
    vectors = np.random.RandomState(0).standard_normal((30, 4))
    assert by_kmeans(vectors, 5, 1) == by_kmeans(vectors, 5, 1)


def weight(name: str, std: float = 0.02, shape: tuple[int, ...] = (8, 4), kind: str = "Linear") -> LayerSpec:
    return LayerSpec(name, shape, kind, shape[1], std)


def test_weights_of_other_scale_are_parted() -> None:
    weights = [weight("a"), weight("b", 1.0), weight("c"), weight("d")]
    assert mapping_of(weights, [0, 0, 0, 1]) == {"a": "group-0", "c": "group-0", "b": "group-1", "d": "group-2"}


def test_layers_that_a_model_has_once_stand_alone() -> None:
    """Under any labels; the groups around them stay as they are."""
    weights = [weight("stem", 0.1), weight("0.up"), weight("0.down"), weight("1.up"), weight("1.down"), weight("head")]
    ups, downs = {"0.up": "group-1", "1.up": "group-1"}, {"0.down": "group-2", "1.down": "group-2"}
    assert indices_to_group(weights) == [1, 2, 3, 4]
    assert mapping_of(weights, [0, 1, 0, 1]) == {"stem": "group-0", **ups, **downs, "head": "group-3"}


def test_features_tell_kind_depth_and_sensitivity() -> None:
    weights = [weight("a"), weight("b"), weight("c", kind="Embedding"), weight("d", shape=(80, 40))]
    found = features(weights, [1.0, 1.0, 1.0, 5.0])
    assert np.isfinite(found).all() and np.allclose(found[:, :5].mean(0), 0)
    assert np.linalg.norm(found[0] - found[1]) < np.linalg.norm(found[0] - found[2])  # only depth differs
    assert np.isfinite(features(weights[:1], [0.0])).all()


def test_distances_from_cosines() -> None:
    found = distances_of(np.array([[1.0, 0.5, -1.0], [0.4999, 1.1, 0], [-1, 0, 0.9]]))
    assert (found == found.T).all() and (np.diag(found) == 0).all()
    assert found[0, 2] == 2 and found[0, 1] == pytest.approx(0.5, abs=1e-3)


def test_the_cheapest_is_the_smallest_within_two_per_cent() -> None:
    costs = {n: Exposure(n, 0, 0.0, step) for n, step in {1: 1.2, 2: 1.01, 3: 1.0, 4: 1.0}.items()}
    assert cheapest(costs) == 2
    assert cheapest({n: Exposure(n, 0, 0.0, step) for n, step in {1: 1.2, 2: 1.1, 3: 1.0}.items()}) == 3


def test_the_aligned_plan_reads_the_same_templates_everywhere() -> None:
    specs = Specs((weight("a", shape=(40, 30)), weight("b", 1.0, shape=(3, 5, 3, 3)), weight("c", shape=(2, 2))))
    plan = aligned_plan(specs, 500, 4, 0)
    (group,) = plan.groups
    assert plan.parameters == plan.budget <= 500 and group.size == 4 * 11 * 11
    assert {(slot.start, slot.templates, slot.template_shape) for slot in group.slots} == {(0, 4, (11, 11))}
    with pytest.raises(BudgetError, match="too small to compare 3 weights by 4 templates"):
        aligned_plan(specs, 15, 4, 0)


def test_halving_keeps_the_better_half_for_twice_the_steps() -> None:
    assert rungs_of(8, 10, 1000) == [(8, 10), (4, 20), (2, 40)]
    assert rungs_of(5, 10, 25) == [(5, 10), (3, 20), (2, 25)]
    assert rungs_of(1, 10, 1000) == [(1, 10)]


@given(st.integers(1, 5000), st.integers(1, 500), st.integers(0, 100), st.integers(0, 30))
def test_a_schedule_is_within_its_budget(budget: int, most: int, cost: int, overhead: int) -> None:
    wanted = candidates("auto")
    costs = {"gradients": cost, "pretrain": 2 * cost}
    least = min(LEAST_STEPS, most)
    if budget < least + overhead:
        wanted_text = f"a budget of {budget} steps is too small for one trial, .* {least + overhead}: give"
        with pytest.raises(UserError, match=wanted_text):
            schedule(wanted, budget, most, costs, overhead)
        return
    count, first = schedule(wanted, budget, most, costs, overhead)
    mappings = {one.mapping: costs[one.method] + overhead for one in wanted[:count] if one.method in costs}

    def all_steps(first: int) -> int:
        return steps_of(rungs_of(count, first, most), overhead) + sum(mappings.values())

    assert least <= first <= most and all_steps(first) <= budget
    assert first == most or all_steps(first + 1) > budget


def test_the_default_is_always_tried_first() -> None:
    assert candidates("auto")[0] == Candidate("auto", "auto")
    assert {one.morph for one in candidates("wavg")} == {"wavg"}
    assert len(set(candidates("auto"))) == len(candidates("auto"))
