"""Reading of a plan from an untrusted file: every field is checked before anything is built or allocated."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any

from dist_ssn.errors import PlanError
from dist_ssn.plan.mapping import GROUP_NAME
from dist_ssn.plan.rules import RULES, SLOT_MORPHS
from dist_ssn.plan.slots import LARGEST, Group, Slot

FORMAT = 2
"""Number of the JSON format. Format 1 had the initial scales among the fields of groups and slots."""
_MOST_DIMENSIONS = 64  # as in torch


@dataclasses.dataclass(frozen=True)
class _Fields:
    """Fields of a `Plan`, with their types."""

    groups: tuple[Group, ...]
    budget: int
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Slot1(Slot):
    """A slot of format 1."""

    scale: float
    init_std: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Group1(Group):
    """A group of format 1."""

    slots: tuple[_Slot1, ...]
    init_std: float


@dataclasses.dataclass(frozen=True)
class _Fields1:
    """Fields of a plan of format 1."""

    groups: tuple[_Group1, ...]
    budget: int
    seed: int


def fields_of_plan(data: Any) -> dict[str, Any]:
    """The fields of the `Plan` that the JSON value `data` describes.

    Raises:
        PlanError: a field is missing, unknown, of the wrong type or out of range; the message names it.
    """
    if not isinstance(data, dict) or data.get("format") not in (1, FORMAT) or isinstance(data["format"], bool):
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise PlanError(
            f"not a plan of format 1 or {FORMAT} (found {_shown(found)}): give the output of Plan.to_json()"
        )
    apart = {"format"} if data["format"] == 1 else {"format", "scales", "keep"}
    fields = {key: value for key, value in data.items() if key not in apart}
    plan = _build(_Fields1 if data["format"] == 1 else _Fields, fields, "plan")
    names = [slot.name for group in plan.groups for slot in group.slots]
    if len(set(names)) != len(names):
        raise PlanError(f"plan: weight {next(n for n in names if names.count(n) > 1)!r} is in it twice")
    if not names:
        raise PlanError("plan: it has no weights")
    if len({group.name for group in plan.groups}) != len(plan.groups):
        raise PlanError("plan: two groups have the same name")
    for group in plan.groups:
        _check_group(group)
    parameters = sum(group.parameters for group in plan.groups)
    if parameters > plan.budget:
        raise PlanError(f"plan: its {parameters} parameters are over its budget of {plan.budget}")
    if data["format"] == 1:
        scales = {group.name: (group.init_std, *(slot.scale for slot in group.slots)) for group in plan.groups}
        groups = tuple(_without_scales(group) for group in plan.groups)
    else:
        scales, groups = _scales(data.get("scales"), plan.groups), plan.groups
    keep = data.get("keep", False)
    if not isinstance(keep, bool):
        raise PlanError(f"plan.keep: {_shown(keep)} is no valid bool")
    return {"groups": groups, "budget": plan.budget, "seed": plan.seed, "keep": keep, "scales": scales}


def _without_scales(group: _Group1) -> Group:
    slots = tuple(Slot(**{name: getattr(slot, name) for name in Slot.__dataclass_fields__}) for slot in group.slots)
    return Group(group.name, group.size, slots)


def _scales(data: Any, groups: tuple[Group, ...]) -> dict[str, tuple[float, ...]] | None:
    """The recorded scales, checked: for each bank one number, and one for each of its slots."""
    if data is None:
        return None
    if not isinstance(data, dict) or set(data) != {group.name for group in groups}:
        raise PlanError("plan.scales: an object with the name of each bank is needed")
    hint = tuple[float, ...]
    scales = {group.name: _value(hint, data[group.name], f"plan.scales.{group.name}") for group in groups}
    for group in groups:
        if len(scales[group.name]) != 1 + len(group.slots) or min(scales[group.name]) <= 0:
            raise PlanError(f"plan.scales.{group.name}: {1 + len(group.slots)} numbers above zero are needed")
    return scales


def _build(cls: type, data: Any, where: str) -> Any:
    """An instance of the dataclass `cls` from a dict with exactly its fields, typed as annotated."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(data, dict):
        raise PlanError(f"{where}: an object is needed, not {type(data).__name__}")
    if set(data) != set(fields):
        odd = sorted(set(data) ^ set(fields))
        raise PlanError(f"{where}: field {odd[0]!r:.60} is {'unknown' if odd[0] in data else 'missing'}")
    hints = _hints_of(cls)
    return cls(**{name: _value(hints[name], data[name], f"{where}.{name}") for name in fields})


@functools.cache
def _hints_of(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields: to work them out takes longer than to read one."""
    return typing.get_type_hints(cls)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _value(arguments[0], value, where)
    if origin is tuple:
        if not isinstance(value, list) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            raise PlanError(f"{where}: a list is needed, not {_shown(value)}")
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)  # type: ignore[arg-type]
    if hint is int and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return value
    if hint is float and isinstance(value, float) and math.isfinite(value):
        return value
    if hint is float and isinstance(value, int):
        return float(_value(int, value, where))
    if hint in (str, bool) and isinstance(value, hint):
        return value
    raise PlanError(f"{where}: {_shown(value)} is no valid {getattr(hint, '__name__', hint)}")


def _shown(value: Any) -> str:
    """A short text for `value`; lists and objects may be nested too deep to be printed."""
    return {list: "a list", dict: "an object"}.get(type(value), f"{value!r:.60}")


def _check_group(group: Group) -> None:
    where = f"plan, bank {group.name!r:.200}"
    if not GROUP_NAME.fullmatch(group.name):
        raise PlanError(f"{where}: a group's name has letters, digits, - and _, a letter first")
    if group.size < 1 or not group.slots or (isinstance(group, _Group1) and group.init_std <= 0):
        raise PlanError(f"{where}: it needs at least one element, one weight, and init_std > 0")
    for slot in group.slots:
        problem = _problem(slot, group.size)
        if problem:
            raise PlanError(f"{where}, weight {slot.name!r:.200}: {problem}")


def _problem(slot: Slot, bank: int) -> str | None:
    if not 2 <= len(slot.shape) <= _MOST_DIMENSIONS or min(slot.shape) < 1 or slot.numel > LARGEST:
        return f"its shape {slot.shape!r:.60} is not the shape of a weight"
    if not slot.name:
        return "its name is empty"
    if slot.morph not in SLOT_MORPHS:
        return f"unknown morph {slot.morph!r:.60}: known are {', '.join(SLOT_MORPHS)}"
    if not 0 <= slot.start < bank or slot.templates < 1 or min(slot.rank, slot.chunk, slot.coefficients) < 0:
        return "start, templates, rank, chunk or coefficients are out of range"
    if isinstance(slot, _Slot1) and (slot.scale <= 0 or slot.init_std <= 0):
        return "scale and init_std must be above zero"
    if slot.rank > min(slot.rows, slot.columns):
        return f"rank {slot.rank} is more than its matrix {slot.rows}×{slot.columns} can have"
    if slot.zero_row is not None and not 0 <= slot.zero_row < slot.rows:
        return f"zero_row {slot.zero_row} is outside its {slot.rows} rows"
    rule = RULES[slot.morph]
    fits, coefficients = rule.needs(slot, bank)
    if slot.chunk and not rule.has_chunks:
        return f"morph {slot.morph!r} has no chunks"
    if any(slot.template_shape) and not rule.has_template_shape:
        return f"morph {slot.morph!r} has no template_shape"
    if not fits:
        return f"its templates do not fit morph {slot.morph!r} and a bank of {bank}"
    if slot.coefficients != coefficients and not (slot.morph == "mask" and slot.coefficients > coefficients):
        return f"morph {slot.morph!r} needs {coefficients} coefficients, not {slot.coefficients}"
    return None
