"""A plan as JSON: nothing is lost, and what somebody has changed in it is refused in one sentence, before anything is made."""

from __future__ import annotations

import copy
import functools
import io
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dist_ssn.errors import PlanError
from dist_ssn.model.specs import LayerSpec, Specs
from dist_ssn.plan import Plan, make_plan
from dist_ssn.sharing.morphs import MORPHS, readings

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written_by_0_1_0"
WEIGHTS = (
    LayerSpec("table.weight", (50, 8), "Embedding", 8, 1.0, ("head.weight",), 3),
    LayerSpec("a.weight", (24, 16), "Linear", 16, 0.1),
    LayerSpec("b.weight", (24, 16), "Linear", 16, 0.1),
    LayerSpec("c.weight", (8, 4, 3, 3), "Conv2d", 36, 0.05),
    LayerSpec("d[e].weight", (2, 3), "Linear", 3, 0.5),
)
PLANS = {
    f"{morph} {budget}": make_plan(Specs(WEIGHTS), budget, morph=morph, mapping=mapping)
    for morph, budget, mapping in (
        ("offset:rank=1,gains=true,templates=2", 0.3, "auto"),
        ("hash", 0.3, "shape"),
        ("wavg", 1.5, "single"),
        ("wavg", 0.15, "single"),
        ("emb", 1.7, "depth:2"),
        ("avg", 1.4, "single"),
        ("inter", 0.2, "random:2"),
        ("mask", 0.15, "single"),
        ("repeat", 0.2, "single"),
    )
}
by_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())


def test_every_morph_is_tried_here() -> None:
    assert {slot.morph for plan in PLANS.values() for _, slot in plan.slots()} == set(MORPHS)


@by_plan
def test_nothing_is_lost(plan: Plan) -> None:
    for indent in (None, 1):
        again = Plan.from_json(plan.to_json(indent))
        assert again == plan and again.fingerprint == plan.fingerprint


@by_plan
def test_the_order_of_keys_does_not_matter(plan: Plan) -> None:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turned(value[key]) for key in sorted(value, reverse=True)}
        return [turned(item) for item in value] if isinstance(value, list) else value

    text = json.dumps(turned(json.loads(plan.to_json())))
    assert text != plan.to_json(None) and Plan.from_json(text) == plan


def test_another_plan_has_another_fingerprint() -> None:
    assert len({plan.fingerprint for plan in PLANS.values()}) == len(PLANS)
    assert make_plan(Specs(WEIGHTS), 0.3, seed=1).fingerprint != make_plan(Specs(WEIGHTS), 0.3).fingerprint


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@functools.cache
def text_of(plan: Plan) -> str:
    return plan.to_json()


def changed(plan: Plan | str, path: tuple[Any, ...], value: Any) -> str:
    """The plan's JSON with another value at `path`."""
    data = json.loads(plan if isinstance(plan, str) else text_of(plan))
    if not path:
        return json.dumps(value)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return json.dumps(data)


def refused(text: Any) -> str | None:
    """The message, None where the text is a plan after all; and a plan is a sound one, whatever was changed."""
    try:
        plan = Plan.from_json(text)
    except PlanError as error:
        assert "\n" not in str(error).strip() and len(str(error)) < 500
        return str(error)
    assert 0 < plan.parameters <= plan.budget and plan.rows() and str(plan) and plan.fingerprint
    for group, slot in plan.slots():
        if slot.templates < 1000:
            assert all(0 <= getattr(part, "start", 0) < group.size for part in readings(slot, plan.seed, group.size))
    return None


DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP]
WRONG = [None, True, -1, 0, 0.5, 2**53, 2**53 + 1, 10**400, -(10**400), 1e308, 1e999, float("nan"), "", "x", "[red]"]
WRONG += [[], {}, [[]], [0], [2, 2], [2**53] * 3, [1] * 100, {"a": 1}, DEEP, "x" * 10_000, "\x00", "\ud800", [2.0, 3.0]]


@by_plan
def test_wrong_values_everywhere(plan: Plan) -> None:
    """Each field of the plan, of a bank and of each slot takes each of these, and answers with a `PlanError` or a sound plan."""
    data = json.loads(plan.to_json())
    draw = random.Random(0)
    for path in places(data):
        for value in draw.sample(WRONG, 6) if len(path) > 3 else WRONG:
            refused(changed(plan, path, value))


@by_plan
def test_fields_that_come_and_go(plan: Plan) -> None:
    data = json.loads(plan.to_json())
    for path in places(data):
        if path and isinstance(path[-1], str):
            less = copy.deepcopy(data)
            inner = less
            for key in path[:-1]:
                inner = inner[key]
            del inner[path[-1]]
            message = refused(json.dumps(less))
            assert message is not None and (
                f"field {path[-1]!r} is missing" in message or "not a plan of format" in message
            )
            inner["surprise"] = 1
            assert refused(json.dumps(less)) is not None


@settings(max_examples=300)
@given(st.data())
def test_random_mutations(data: st.DataObject) -> None:
    plan = data.draw(st.sampled_from(list(PLANS.values())))
    changes = st.one_of(
        st.integers(-2, 1000),
        st.integers(),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(list(MORPHS)),
        st.booleans(),
    )
    values = st.recursive(changes, lambda inner: st.lists(inner, max_size=4), max_leaves=4)
    text = plan.to_json()
    for _ in range(data.draw(st.integers(1, 3))):
        content = json.loads(text)
        path = data.draw(st.sampled_from([path for path in places(content) if path]))
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = data.draw(values)
        text = json.dumps(content)
    refused(text)


@given(
    st.one_of(
        st.text(max_size=30), st.binary(max_size=10), st.none(), st.integers(), st.lists(st.integers(), max_size=2)
    )
)
def test_what_is_no_json(text: Any) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the plan is not valid JSON"),
        ("{", "the plan is not valid JSON"),
        ("[" * 100_000, "the plan is not valid JSON"),
        ("1" * 5_000, "the plan is not valid JSON"),
        ("[]", "not a plan of format 1 or 2 .found 'list'.: give the output of Plan.to_json"),
        ('{"format": 3}', "not a plan of format 1 or 2 .found 3."),
        ('{"format": [[1]]}', "not a plan of format 1 or 2 .found a list."),
        ('{"format": 1, "budget": 3}', "plan: field 'groups' is missing"),
        ('{"format": 1, "budget": 3, "seed": 0, "groups": []}', "plan: it has no weights"),
    ],
)
def test_what_is_no_plan(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


OFFSET, HASH, WAVG, MIX, EMB, AVG, INTER, MASK, REPEAT = PLANS.values()


@pytest.mark.parametrize(
    ("plan", "field", "value", "message"),
    [
        (OFFSET, "name", "", "its name is empty"),
        (OFFSET, "shape", [24], "is not the shape of a weight"),
        (OFFSET, "shape", [24, 0], "is not the shape of a weight"),
        (OFFSET, "shape", [2**40, 2**40], "is not the shape of a weight"),
        (OFFSET, "shape", [2**53] * 10_000, "is not the shape of a weight"),
        (OFFSET, "shape", "24", "shape: a list is needed, not '24'"),
        (OFFSET, "shape", [24, 1.5], r"shape\[1\]: 1.5 is no valid int"),
        (OFFSET, "morph", "magic", "unknown morph 'magic': known are avg, wavg"),
        (OFFSET, "morph", ["offset"], "morph: a list is no valid str"),
        (OFFSET, "start", -1, "start, templates, rank, chunk or coefficients are out of range"),
        (OFFSET, "start", 2**40, "start, templates, rank, chunk or coefficients are out of range"),
        (OFFSET, "templates", 0, "start, templates, rank, chunk or coefficients are out of range"),
        (OFFSET, "templates", 3, "morph 'offset' needs 3 coefficients, not 2"),
        (OFFSET, "scale", 1.0, "field 'scale' is unknown"),
        (OFFSET, "rank", 10**6, "rank 1000000 is more than its matrix 50×8 can have"),
        (OFFSET, "rank", 8, "parameters are over its budget"),
        (OFFSET, "zero_row", 50, "zero_row 50 is outside its 50 rows"),
        (OFFSET, "chunk", 0, "its templates do not fit morph 'offset'"),
        (OFFSET, "chunk", 10**9, "its templates do not fit morph 'offset'"),
        (OFFSET, "row_gains", 1, "row_gains: 1 is no valid bool"),
        (OFFSET, "template_shape", [2, 2], "morph 'offset' has no template_shape"),
        (OFFSET, "aliases", "head", "aliases: a list is needed"),
        (HASH, "chunk", 10**6, "its templates do not fit morph 'hash'"),
        (AVG, "templates", 10**6, "its templates do not fit morph 'avg'"),
        (REPEAT, "chunk", 8, "morph 'repeat' has no chunks"),
        (REPEAT, "coefficients", 3, "morph 'repeat' needs 0 coefficients, not 3"),
        (MASK, "coefficients", 1, "morph 'mask' needs"),
        (INTER, "template_shape", [0, 3], "its templates do not fit morph 'inter'"),
        (INTER, "template_shape", [1, 2, 3], "template_shape: a list is needed, not a list"),
        (MIX, "template_shape", [1, 1], "its templates do not fit morph 'wavg-up'"),
    ],
)
def test_the_message_says_which_field(plan: Plan, field: str, value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(changed(plan, ("groups", 0, "slots", 0, field), value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("groups", 0, "name"), "1st", "bank '1st': a group's name has letters"),
        (("groups", 0, "name"), "a.b", "a group's name has letters"),
        (("groups", 1, "name"), "scale-0", "two groups have the same name"),
        (("groups", 0, "size"), 0, "needs at least one element"),
        (("groups", 0, "size"), 10**400, "size: 1000.* is no valid int"),
        (("groups", 0, "slots"), [], "needs at least one element, one weight"),
        (("groups", 1, "slots", 0, "name"), "table.weight", "weight 'table.weight' is in it twice"),
        (("budget",), 5, "parameters are over its budget of 5"),
        (("budget",), "5", "plan.budget: '5' is no valid int"),
        (("seed",), 2**60, "plan.seed: 1152921504606846976 is no valid int"),
    ],
)
def test_the_message_says_where(path: tuple[Any, ...], value: Any, message: str) -> None:
    assert [group.name for group in OFFSET.groups] == ["scale-0", "scale-1"]
    with pytest.raises(PlanError, match=message):
        Plan.from_json(changed(OFFSET, path, value))


FORMAT_1 = (WRITTEN / "plans" / "random-mask.json").read_text()


def test_format_1_has_the_scales_among_its_fields() -> None:
    data, plan = json.loads(FORMAT_1), Plan.from_json(FORMAT_1)
    assert plan.scales == {
        group["name"]: (group["init_std"], *(slot["scale"] for slot in group["slots"])) for group in data["groups"]
    }
    for indent in (None, 1):
        again = Plan.from_json(plan.to_json(indent))
        assert again == plan and again.scales == plan.scales and again.fingerprint == plan.fingerprint
    without = replace(plan, scales=None)
    assert without == plan and without.fingerprint == plan.fingerprint and "scales" not in without.to_json()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("groups", 0, "slots", 0, "scale"), 0.0, "scale and init_std must be above zero"),
        (("groups", 0, "slots", 0, "scale"), True, "scale: True is no valid"),
        (("groups", 0, "slots", 0, "init_std"), -1, "scale and init_std must be above zero"),
        (("groups", 0, "init_std"), 1e999, "init_std: inf is no valid float"),
        (("groups", 0, "init_std"), 0, "init_std > 0"),
        (("format",), 2, "field 'init_std' is unknown"),
        (("format",), True, "not a plan of format 1 or 2 .found True"),
    ],
)
def test_format_1_is_checked(path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json(changed(FORMAT_1, path, value))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "plan.scales: an object with the name of each bank"),
        ({"random-0": [1.0]}, "plan.scales: an object with the name of each bank"),
        ({"random-0": [1.0], "random-1": [1.0]}, "plan.scales.random-0: 4 numbers above zero are needed"),
        ({"random-0": [1.0, 0.0, 1.0, 1.0], "random-1": [1.0] * 4}, "plan.scales.random-0: 4 numbers above zero"),
        (
            {"random-0": [1.0, 1.0, None, 1.0], "random-1": [1.0] * 4},
            r"plan.scales.random-0.2.: None is no valid float",
        ),
    ],
)
def test_recorded_scales_are_checked(value: Any, message: str) -> None:
    text = changed(Plan.from_json(FORMAT_1).to_json(), ("scales",), value)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(text)


@by_plan
def test_rows_and_table(plan: Plan) -> None:
    rows = plan.rows()
    assert [row["weight"] for row in rows] == [slot.name for _, slot in plan.slots()]
    assert sum(row["numbers"] for row in rows) == plan.numel == 400 + 2 * 384 + 288 + 6
    banks = sum(group.size + group.projection_parameters for group in plan.groups)
    assert sum(row["own_numbers"] for row in rows) + banks == plan.parameters
    console = Console(width=160, file=io.StringIO())
    console.print(plan.table())
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for text in (
        *(slot.name for _, slot in plan.slots()),
        f"5 weights with {plan.numel:,} elements",
        f"{plan.parameters:,}",
    ):
        assert text in printed
    assert str(plan).startswith(f"5 weights with {plan.numel:,} elements from {plan.parameters:,} parameters (")


@by_plan
def test_a_key_twice_is_refused(plan: Plan) -> None:
    """Of two values JSON would keep the last, without a word."""
    text = plan.to_json(None)
    for key in ("seed", "budget", "groups", "name", "start", "shape"):
        place = text.index(f'"{key}": ')
        twice = f'{text[:place]}"{key}": 5, {text[place:]}'
        with pytest.raises(PlanError, match=f"not valid JSON .the key '{key}' is there twice"):
            Plan.from_json(twice)
