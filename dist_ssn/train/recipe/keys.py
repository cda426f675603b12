"""The keys of a recipe and the types of their values, as jsonargparse reads them from the dataclasses of `recipe.py`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from dist_ssn.errors import RecipeError
from dist_ssn.train.recipe.schema import Recipe

# How the types of the keys are called in messages.
_EXPECTED = {
    "int": "a whole number",
    "int | None": "a whole number or null",
    "float": "a number",
    "float | None": "a number or null",
    "bool": "true or false",
    "str": "text (in quotes, if it looks like something else)",
    "str | None": "text or null",
    "dict": "a dict of argument names to values",
    "dict[str, str] | str": "a name, or a dict of globs to groups",
    "int | float | str | None": 'a budget such as 0.1, "10%" or "5MB", or null',
    "tuple[str, ...]": "a list of texts, such as [a, b]",
    "tuple[str, ...] | None": "a list of texts, such as [a, b], or null",
    "tuple[float, float]": "a list of two numbers, such as [0.9, 0.95]",
    "tuple[int, ...]": "a list of whole numbers, such as [500, 800]",
}


@functools.cache
def key_kinds() -> dict[str, str]:
    """Full key → the text of its type; the dataclasses inside `Recipe` are the groups."""
    keys: dict[str, str] = {}
    for outer in dataclasses.fields(Recipe):
        if dataclasses.is_dataclass(outer.default_factory):
            keys |= {
                f"{outer.name}.{inner.name}": str(inner.type) for inner in dataclasses.fields(outer.default_factory)
            }
        else:
            keys[outer.name] = str(outer.type)
    return keys


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a recipe, for `--help` and the docs.

    Args:
        name: full name, such as share.budget.
        type: what a value may be, in words.
        default: value that a recipe has without it.
        help: sentence that says what it does.
        section: section of the recipe it stands in, such as share; empty at the top.
    """

    name: str
    type: str
    default: Any
    help: str
    section: str


@functools.cache
def recipe_keys() -> tuple[Key, ...]:
    """Every key of a recipe, in the order of the file."""
    keys = []
    for outer in dataclasses.fields(Recipe):
        section = outer.default_factory if dataclasses.is_dataclass(outer.default_factory) else None
        for field in dataclasses.fields(section) if section else (outer,):
            default = dict() if field.default_factory is dict else field.default
            helps = re.findall(rf"^ *{field.name}: (.*)$", (section or Recipe).__doc__ or "", re.MULTILINE)
            name = f"{outer.name}.{field.name}" if section else field.name
            kind = _EXPECTED.get(str(field.type), str(field.type))
            keys.append(Key(name, kind, default, "".join(helps), outer.name if section else ""))
    return tuple(keys)


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with this package: name without ending → file."""
    folder = Path(__file__).parents[2] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_parser(
    prog: str = "dist-ssn", description: str | None = None, flags: Mapping[str, str] = MappingProxyType({})
) -> ArgumentParser:
    """The parser of every key of a recipe, from a YAML file (`--config`) and the command line (`--any.key=value`).

    Args:
        flags: options without a value that are not keys of a recipe, for the help: name → what it does.
    """
    # Abbreviations are off: with them, a new key can change what an old command line means.
    parser = ArgumentParser(
        prog=prog,
        usage=" ".join([prog, *(f"[{flag}]" for flag in flags), "[--config FILE] [--any.key=value ...]"]),
        description=description,
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
    )
    bundled = ", ".join(bundled_recipes())
    parser.add_argument("--config", action="config", help=f"YAML file of a recipe, or one that is built in: {bundled}")
    for flag, text in flags.items():
        parser.add_argument(flag, action="store_true", default=SUPPRESS, help=text)
    parser.add_class_arguments(Recipe)
    for action in parser._actions:
        if any(key.startswith(f"{action.dest}.") for key in key_kinds()):
            action.help = SUPPRESS  # --data=FILE, which we don't take: one file is a whole recipe
    return parser


@functools.cache
def checker() -> ArgumentParser:
    """One parser for all checks: making it takes longer than using it."""
    return recipe_parser()


def key_problem(key: str, others: Sequence[str] = ()) -> str | None:
    known = [*key_kinds(), *others]
    if key in known or (key.startswith("model_args.") and key.count(".") == 1):
        return None
    if key.startswith("model_args."):
        return f"{key} is too deep: write --{'.'.join(key.split('.')[:2])}={{...}}"
    if members := [name for name in known if name.startswith(f"{key}.")]:
        return f"{key} is a group of keys: {', '.join(members)}"
    last = {name: name.rpartition(".")[2] for name in known}
    near = difflib.get_close_matches(key, known, n=1) or [
        name for name in known if last[name] in difflib.get_close_matches(key.rpartition(".")[2], last.values(), n=1)
    ]
    hint = f"did you mean {' or '.join(near)}?" if near else "--help lists all keys"
    return f"unknown key {key}; {hint}"


def type_problems(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Key → what is wrong with the type of its value, one by one, for the parser stops at the first."""
    problems = {}
    for key, value in leaves.items():
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        try:
            checker().parse_object(nested, defaults=False)
            right = value is not None or "None" in key_kinds()[key]  # the parser lets null through for every type
        except ArgumentError:
            right = False
        if not right:
            problems[key] = f"{key} must be {_expected(key)}, got {shown(value)}"
    return problems


def option_problem(key: str, value: str) -> dict[str, str]:
    try:
        checker().parse_args([f"--{key}={value}"], defaults=False)
    except ArgumentError:
        return {key: f"{key} must be {_expected(key)}, got {value!r}"}
    return {}


def _expected(key: str) -> str:
    kind = key_kinds().get(key, "str")
    return _EXPECTED.get(kind, f"of type {kind}")


def shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def raise_all(problems: Sequence[str]) -> None:
    if len(problems) == 1:
        raise RecipeError(problems[0])
    if problems:
        numbered = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems, 1))
        raise RecipeError(f"{len(problems)} problems: {numbered}")
