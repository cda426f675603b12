"""Recipes from YAML files, command lines and JSON.

A YAML file and the command line go through one jsonargparse parser. Every mistake in them is found before anything starts, and
all are reported together.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from dist_ssn.errors import RecipeError
from dist_ssn.files import parse_json
from dist_ssn.safe_yaml import read_yaml, yaml_value
from dist_ssn.train.recipe.check import recipe_problems
from dist_ssn.train.recipe.keys import (
    bundled_recipes,
    checker,
    key_kinds,
    key_problem,
    option_problem,
    raise_all,
    recipe_parser,
    shown,
    type_problems,
)
from dist_ssn.train.recipe.schema import Recipe


def load_recipe(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from a YAML file, if one is given, and `--any.key=value` overrides.

    Args:
        path: a YAML file, or the name of a recipe that comes with this package; None: the default recipe.
        overrides: `--any.key=value`; the two dashes may be left out.

    Raises:
        RecipeError: one sentence that names every mistake with its file, key and value.
    """
    config = [] if path is None else [f"--config={os.fspath(path)}"]
    dashed = [override if override.startswith("--") else f"--{override}" for override in overrides]
    return parse_recipe(config + dashed)


@overload
def parse_recipe(arguments: Sequence[str], other_options: Sequence[str] = ()) -> Recipe: ...
@overload
def parse_recipe(
    arguments: Sequence[str], other_options: str, description: str | None = None, flags: Mapping[str, str] = ...
) -> tuple[Recipe, set[str]]: ...
def parse_recipe(
    arguments: Sequence[str],
    other_options: Sequence[str] | str = (),
    description: str | None = None,
    flags: Mapping[str, str] = MappingProxyType({}),
) -> Recipe | tuple[Recipe, set[str]]:
    """Reads a recipe from command-line arguments; what the command line says wins over the file.

    Args:
        arguments: `--config=FILE`, `--any.key=value`, each also as two words.
        other_options: names of options that the command has besides, for "did you mean".

    Raises:
        RecipeError: one sentence that names every mistake with its file, key and value.
    """
    settings, given, parser = _Settings(), set(), checker()
    legacy = isinstance(other_options, str)  # until the command line prints its own help
    others = [flag.strip("-") for flag in (flags if legacy else other_options)]
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument in flags:
            given.add(argument)
        elif legacy and (argument in ("-h", "--help") or argument.partition("=")[0] == "--print_config"):
            parser = recipe_parser(str(other_options), description, flags)
            settings.options.append(argument)
        elif not argument.startswith("--"):
            settings.problems.append(f"command line: unexpected {argument!r}: options are written --key=value")
        elif key != "config" and (problem := key_problem(key, ["config", *others])):
            settings.problems.append(f"command line: {problem}")
        elif not equals and (not remaining or remaining[0].startswith("--")):
            settings.problems.append(f"command line: --{key} needs a value, as in --{key}=value")
        else:
            settings.add(key, value if equals else remaining.pop(0))
    raise_all(settings.problems)
    recipe = _recipe(settings.parsed(parser))
    processes = os.environ.get("WORLD_SIZE", "1")  # torchrun's; a malformed one is reported where processes meet
    found = recipe_problems(recipe, int(processes) if processes.isdigit() else 1)
    raise_all([f"{settings.where(key)}: {problem}" for key, problem in found.items()])
    return (recipe, given) if legacy else recipe


def recipe_to_yaml(recipe: Recipe) -> str:
    """A recipe as YAML text, which `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(json.loads(recipe.to_json()), sort_keys=False, allow_unicode=True)


class _Settings:
    """What files and the command line have said so far, where each key was set, and every mistake in it."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.files: list[str] = []
        self.options: list[str] = []
        self._origin: dict[str, str] = {}
        self._model_args: dict[str, Any] = {}
        self._one_by_one: dict[str, Any] = {}  # those of the model's arguments that were set as model_args.NAME

    def add(self, key: str, value: str) -> None:
        """`--key=value` of the command line; `config` reads a file."""
        if key == "config":
            path = _find(value)
            self.files.append(str(path))
            leaves = dict(_leaves(read_yaml(path), str(path), self.problems))
            self._origin |= dict.fromkeys(leaves, str(path))
            self._model_args = leaves.get("model_args", self._model_args)
            found = type_problems(leaves)
        elif key.startswith("model_args."):
            self._one_by_one[key.removeprefix("model_args.")] = yaml_value(value)
            self._origin["model_args"] = "command line"
            found = {}
        else:
            value = _unquoted(value)
            self.options.append(f"--{key}={value}")
            self._origin[key] = "command line"
            self._model_args = yaml_value(value) if key == "model_args" else self._model_args
            found = option_problem(key, value)
        self.problems += [f"{self._origin[key]}: {problem}" for key, problem in found.items()]

    def parsed(self, parser: ArgumentParser) -> Namespace:
        options = [*(f"--config={path}" for path in self.files), *self.options]
        if self._one_by_one:
            options.append(f"--model_args={json.dumps(self._model_args | self._one_by_one, default=str)}")
        try:
            return parser.parse_args(options)
        except ArgumentError as error:
            raise RecipeError(f"the recipe cannot be read: {' '.join(str(error).split())}") from None

    def where(self, key: str) -> str:
        return self._origin.get(key, self.files[-1] if self.files else "command line")


def _unquoted(value: str) -> str:
    """What a script writes with `json.dumps` has quotes, which a shell would have taken away."""
    try:
        return json.loads(value) if value.startswith('"') else value
    except json.JSONDecodeError:
        return value


def _recipe(namespace: Namespace) -> Recipe:
    values = namespace.as_dict()
    made = {}
    for part in dataclasses.fields(Recipe):
        value = values[part.name]
        made[part.name] = part.default_factory(**value) if dataclasses.is_dataclass(part.default_factory) else value
    return Recipe(**made)


def _find(name: str) -> Path:
    path, bundled = Path(name), bundled_recipes()
    if path.is_file():
        return path
    if name.removesuffix(".yaml") in bundled:
        return bundled[name.removesuffix(".yaml")]
    problem = "is not a file" if path.exists() else f"does not exist in {Path.cwd()}"
    raise RecipeError(f"the recipe {name!r} {problem}; the built-in ones are {', '.join(bundled)}")


def _leaves(content: Any, source: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """The known keys in a file's content with their values; unknown ones go to `problems`."""
    if not isinstance(content, dict):
        problems.append(f"{source}: a recipe is a dict of keys and values, such as 'steps: 1000'")
        return
    groups = {key.partition(".")[0] for key in key_kinds() if "." in key}
    for name, value in content.items():
        if name not in groups:
            inner = {str(name): value}
        elif isinstance(value, dict):
            inner = {f"{name}.{key}": part for key, part in value.items()}
        else:
            members = ", ".join(key for key in key_kinds() if key.startswith(f"{name}."))
            problems.append(f"{source}: {name} must be a dict of keys and values ({members}), got {shown(value)}")
            continue
        for key, part in inner.items():
            if problem := key_problem(key):
                problems.append(f"{source}: {problem}")
            else:
                yield key, part


def recipe_from_json(text: str, source: str = "recipe.json") -> Recipe:
    """The recipe in JSON text. Raises: RecipeError, whose sentence names `source`."""
    problems: list[str] = []
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"{source}: line {error.lineno} cannot be read as JSON ({error.msg})") from None
    except ValueError as error:  # too deep, or a number of thousands of digits
        raise RecipeError(f"{source}: cannot be read as JSON ({error})") from None
    leaves = dict(_leaves(content, source, problems))
    problems += [f"{source}: {problem}" for problem in type_problems(leaves).values()]
    raise_all(problems)
    return _recipe(checker().parse_object(content))
