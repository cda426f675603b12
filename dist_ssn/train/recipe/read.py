"""Recipes from YAML files, command lines and JSON.

Every mistake in them is found before anything starts, and all are reported together, each with the place that it comes from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dist_ssn.checked import check, flat, members, one_sentence, plain_types, sections_of, unknown_key
from dist_ssn.errors import RecipeError
from dist_ssn.files import parse_json
from dist_ssn.safe_yaml import Kind, read_yaml, to_yaml, yaml_value
from dist_ssn.train.recipe.check import problems_here
from dist_ssn.train.recipe.keys import bundled_recipes, recipe_keys
from dist_ssn.train.recipe.schema import Recipe

_KIND = Kind("recipes", RecipeError)
_COMMAND_LINE = "command line"
_NO_DICT = "a recipe is a dict of keys and values, such as 'steps: 1000'"


def load_recipe(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from a YAML file, if one is given, and `--any.key=value` overrides.

    Args:
        path: a YAML file, or the name of a recipe that comes with this package; None: the default recipe.
        overrides: `--any.key=value`; the two dashes may be left out.

    Raises:
        RecipeError: names every mistake with its file, key and value.
    """
    config = [] if path is None else [f"--config={os.fspath(path)}"]
    return parse_recipe(config + [override if override.startswith("--") else f"--{override}" for override in overrides])


def parse_recipe(arguments: Sequence[str], other_options: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from command-line arguments; what the command line says wins over the file.

    Args:
        arguments: `--config=FILE`, `--any.key=value` and `--model_args.NAME=value`, each also as two words.
        other_options: names of the command's other options, for "did you mean".

    Raises:
        RecipeError: names every mistake with its file, key and value.
    """
    settings = _Settings()
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            settings.refuse(f"unexpected {argument!r}: options are written --key=value")
        elif problem := _key_problem(key, other_options):
            settings.refuse(problem)
        elif not equals and (not remaining or remaining[0].startswith("--")):
            settings.refuse(f"--{key} needs a value, as in --{key}=value")
        else:
            settings.add(key, value if equals else remaining.pop(0))
    return settings.recipe()


def recipe_from_json(text: str, source: str = "recipe.json") -> Recipe:
    """The recipe in JSON text, such as a run has saved; its files need no longer be there.

    Raises:
        RecipeError: names `source`, and every mistake with its key and value.
    """
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{source}: line {error.lineno} cannot be read as JSON ({error.msg})") from None
    except ValueError as error:  # too deep, or a number of thousands of digits
        raise RecipeError(f"{source}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{source}: {_NO_DICT}")
    recipe, problems = check(Recipe, flat(Recipe, content))
    if recipe is None:
        raise RecipeError(one_sentence([f"{source}: {problem}" for problem in problems.values()]))
    return recipe


def recipe_to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML text, which `load_recipe` reads back to an equal recipe."""
    return to_yaml(json.loads(recipe.to_json()))


class _Settings:
    """Values from files and the command line, the place of each, and mistakes in how the command line is written."""

    def __init__(self) -> None:
        self._problems: list[str] = []
        self._file: str | None = None  # the last one
        self._origin: dict[str, str] = {}
        self._of_files: dict[str, Any] = {}
        self._of_options: dict[str, Any] = {}
        self._model_args: dict[str, Any] = {}  # those that were set one by one

    def refuse(self, problem: str) -> None:
        self._problems.append(f"{_COMMAND_LINE}: {problem}")

    def add(self, key: str, text: str) -> None:
        """`--key=text` of the command line; `config` reads a file."""
        if key == "config":
            self._read(_find(text))
        elif key.startswith("model_args."):
            self._model_args[key.removeprefix("model_args.")] = yaml_value(text)
            self._origin["model_args"] = _COMMAND_LINE
        else:
            self._of_options[key] = _value(key, text)
            self._origin[key] = _COMMAND_LINE

    def recipe(self) -> Recipe:
        values = self._of_files | self._of_options
        if self._model_args and isinstance(args := values.get("model_args", {}), dict):
            values["model_args"] = args | self._model_args
        processes = os.environ.get("WORLD_SIZE", "1")  # torchrun's; a malformed one is reported where processes meet
        here = partial(problems_here, world_size=int(processes) if processes.isdigit() else 1)
        recipe, found = check(Recipe, values, here)
        problems = self._problems + [f"{self._where(key)}: {problem}" for key, problem in found.items()]
        if recipe is None or problems:
            raise RecipeError(one_sentence(problems))
        return recipe

    def _read(self, path: Path) -> None:
        self._file = str(path)
        content = read_yaml(path, _KIND)
        if isinstance(content, dict):
            leaves = flat(Recipe, content)
            self._of_files |= leaves
            self._origin |= {key: self._file for key in leaves if self._origin.get(key) != _COMMAND_LINE}
        else:
            self._problems.append(f"{path}: {_NO_DICT}")

    def _where(self, key: str) -> str:
        return self._origin.get(key, self._file or _COMMAND_LINE)


def _key_problem(key: str, other_options: Sequence[str]) -> str | None:
    """Mistake in the key of an option, if there is one."""
    names = [known.name for known in recipe_keys()]
    if key in (*names, "config") or (key.startswith("model_args.") and key.count(".") == 1):
        return None
    if key.startswith("model_args."):
        return f"{key} is too deep: write --{'.'.join(key.split('.')[:2])}={{...}}"
    if key in sections_of(Recipe):
        return f"{key} is a section: {members(Recipe, key)}"
    return unknown_key(key, [*names, "config", *(name.strip("-") for name in other_options)])


def _value(key: str, text: str) -> Any:
    """An option's value: what YAML makes of the text where the key takes such a value, else the text."""
    takes = plain_types(Recipe, key)
    if text.startswith('"'):  # of a script that writes with `json.dumps`: a shell would have taken the quotes away
        try:
            text = json.loads(text)
        except json.JSONDecodeError:
            pass
        else:
            if str in takes:
                return text
    if (
        takes == {str} or not text.strip()
    ):  # YAML would make null of an empty text, which a shell makes of an unset variable
        return text
    value = yaml_value(text)
    return value if type(value) in takes else text


def _find(name: str) -> Path:
    path, bundled = Path(name), bundled_recipes()
    if path.is_file():
        return path
    if name.removesuffix(".yaml") in bundled:
        return bundled[name.removesuffix(".yaml")]
    problem = "is not a file" if path.exists() else f"does not exist in {Path.cwd()}"
    raise RecipeError(f"the recipe {name!r} {problem}; the built-in ones are {', '.join(bundled)}")
