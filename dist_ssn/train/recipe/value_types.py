"""Types of a recipe's values: numbers with bounds, and functions that check texts and collections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, StrictFloat, StrictInt

from dist_ssn.checked import mistake
from dist_ssn.errors import unknown_choice

Count = Annotated[StrictInt, Ge(1)]
Ordinal = Annotated[StrictInt, Ge(0)]
Positive = Annotated[StrictFloat, Gt(0)]
NotNegative = Annotated[StrictFloat, Ge(0)]
Fraction = Annotated[StrictFloat, Ge(0), Le(1)]
BelowOne = Annotated[StrictFloat, Ge(0), Lt(1)]


def _plain_name(name: str) -> str:
    if Path(_not_empty(name)).name != name or name == "..":
        raise mistake(f"must be a plain name, for it names the run's folder, got {name!r}")
    return name


def _not_empty(text: str) -> str:
    if not text.strip():
        raise mistake("must not be empty")
    return text


# Rules of other parts are imported where a value is checked: with them comes torch, for which --help should not wait.


def _known_model(model: str) -> str:
    from dist_ssn.train.models import MODELS

    if _not_empty(model) not in MODELS and "." not in model:
        known = unknown_choice("name", model, MODELS)
        raise mistake(f"is an {known}; a model of your own is an import path such as my_module.build")
    return model


def _plain_values(values: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise mistake("must hold only text, numbers, true, false, null, lists and dicts of them") from None
    return values


def _known_mapping(mapping: dict[str, str] | str) -> dict[str, str] | str:
    if mapping != "auto":
        from dist_ssn.plan.mapping import check_mapping

        check_mapping(mapping)
    return mapping


def _known_morph(morph: str) -> str:
    if morph != "auto":
        from dist_ssn.plan.rules import parse_morph

        parse_morph(morph)
    return morph


def _known_overlap(overlap: str) -> str:
    from dist_ssn.plan.overlap import parse_overlap

    parse_overlap(overlap)
    return overlap


def _known_limit(limit: str | None) -> str | None:
    if limit is not None:
        from dist_ssn.sync.rounds import parse_limit

        parse_limit(limit)
    return limit


def _rising(steps: tuple[int, ...]) -> tuple[int, ...]:
    if list(steps) != sorted(set(steps)) or any(step < 1 for step in steps):
        raise mistake(f"must be rising step numbers, got {list(steps)}")
    return steps


RunName = Annotated[str, AfterValidator(_plain_name)]
NotEmpty = Annotated[str, AfterValidator(_not_empty)]
ModelName = Annotated[str, AfterValidator(_known_model)]
PlainValues = Annotated[dict[str, Any], AfterValidator(_plain_values)]
MappingChoice = Annotated[dict[str, str] | str, AfterValidator(_known_mapping)]
MorphChoice = Annotated[str, AfterValidator(_known_morph)]
OverlapChoice = Annotated[str, AfterValidator(_known_overlap)]
ByteLimit = Annotated[str | None, AfterValidator(_known_limit)]
RisingSteps = Annotated[tuple[StrictInt, ...], AfterValidator(_rising)]
