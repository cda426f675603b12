"""Recipe keys as options of `train`, `plan` and `search`."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dist_ssn.cli.declare import RECIPES, Command, Group, Option

if TYPE_CHECKING:
    from dist_ssn.train.recipe.keys import Key
    from dist_ssn.train.recipe.schema import Recipe

RECIPE = Group(
    "recipe",
    (
        Option(
            "--config",
            "YAML file of a recipe, or the name of a built-in one. Recipe keys on the command line win over it.",
            "FILE",
            default="every key's own default",
            example="quickstart",
            completes=RECIPES,
            of_recipe=True,
        ),
        Option("--print_config", "Print the whole recipe as YAML, and stop."),
    ),
)

_METAVARS = {
    "a whole number": "N",
    "a number": "X",
    "true or false": "true|false",
    "text": "TEXT",
    "a list": "LIST",
    "a dict": "DICT",
}


def recipe_groups() -> tuple[Group, ...]:
    """Every recipe key as an option, by section."""
    from dist_ssn.train.recipe.keys import recipe_keys, recipe_schema

    fields = _fields(recipe_schema())
    sections: dict[str, list[Option]] = {"": []}
    for key in recipe_keys():
        sections.setdefault(key.section, []).append(_option(key, fields[key.name]))
        if key.name == "model_args":
            text = "One argument of the model's function, as any YAML value. Example: --model_args.width=64"
            sections[key.section].append(Option("--model_args.NAME", text, "VALUE", of_recipe=True))
    return tuple(Group(f"recipe keys, {name or 'run'}", tuple(options)) for name, options in sections.items())


def read_recipe(command: Command, given: argparse.Namespace, rest: list[str]) -> Recipe | None:
    """The recipe of a command line; None when --print_config asked for its text, which is printed then.

    Raises:
        RecipeError: one sentence that names every mistake with its file, key and value.
    """
    from dist_ssn.train.recipe.read import parse_recipe, recipe_to_yaml

    own = [option.name for option in command.options() if not option.of_recipe]
    recipe = parse_recipe(rest, own)
    if not given.print_config:
        return recipe
    print(recipe_to_yaml(recipe), end="")
    return None


def _fields(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Full key → its part of the JSON schema."""
    found = {}
    for name, field in schema["properties"].items():
        if "$ref" in field:
            section = schema["$defs"][field["$ref"].rpartition("/")[2]]
            found |= {f"{name}.{inner}": part for inner, part in section["properties"].items()}
        found[name] = field
    return found


def _option(key: Key, field: Mapping[str, Any]) -> Option:
    flag = key.type == "true or false"
    choices = [choice for part in (field, *field.get("anyOf", ())) for choice in part.get("enum", ())]
    metavar = next((short for start, short in _METAVARS.items() if key.type.startswith(start)), "VALUE")
    other = [example for example in field.get("examples", ()) if example != key.default and example is not None]
    return Option(
        f"--{key.name}",
        key.help if flag else f"{key.help} Type: {key.type.partition(' (')[0]}.",
        "NAME" if choices else metavar,
        default=_text(key.default) or "empty",
        example=shlex.quote(_text(other[0] if other else _derived(key.default, choices, field))),
        choices=("true", "false") if flag else tuple(choices),
        of_recipe=True,
    )


def _text(value: Any) -> str:
    """A value as one writes it in YAML."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _derived(default: Any, choices: Sequence[str], field: Mapping[str, Any]) -> Any:
    """An example that differs from the default, as far as default and type allow one."""
    types = [part.get("type") for part in (field, *field.get("anyOf", ()))]
    if choices:
        return next(choice for choice in choices if choice != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int) or (default is None and "integer" in types):
        return 2 * (default or 0) or 1
    if isinstance(default, float) or (default is None and "number" in types):
        return (default or 1.0) / 2
    return default or "NAME"
