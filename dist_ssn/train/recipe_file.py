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
from typing import Any

from jsonargparse import ArgumentError, Namespace

from dist_ssn.errors import RecipeError
from dist_ssn.train.bounded import parse_json
from dist_ssn.train.recipe import Recipe
from dist_ssn.train.recipe_keys import (
    bundled_recipes,
    checker,
    key_problem,
    option_problem,
    raise_all,
    recipe_keys,
    recipe_parser,
    shown,
    type_problems,
)
from dist_ssn.train.recipe_values import recipe_problems
from dist_ssn.train.recipe_yaml import read_yaml, yaml_value


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
    return parse_recipe(config + dashed)[0]


def parse_recipe(
    arguments: Sequence[str],
    prog: str = "dist-ssn",
    description: str | None = None,
    flags: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Recipe, set[str]]:
    """Reads a recipe from command-line arguments; what the command line says wins over the file.

    Args:
        arguments: `--config=FILE`, `--any.key=value`, flags. `--help` and `--print_config` print and exit.
        prog, description, flags: see `recipe_parser`.

    Returns:
        The recipe, and those flags that were given.

    Raises:
        RecipeError: one sentence that names every mistake with its file, key and value.
    """
    problems: list[str] = []
    origin: dict[str, str] = {}  # key → where it was set
    files: list[str] = []
    options: list[str] = []
    given: set[str] = set()
    model_args: dict[str, Any] = {}
    model_arg: dict[str, Any] = {}  # those that are set one by one
    parser = checker()
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument in flags:
            given.add(argument)
            continue
        if argument in ("-h", "--help") or argument.partition("=")[0] == "--print_config":
            parser = recipe_parser(prog, description, flags)
            options.append(argument)
            continue
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            problems.append(f"command line: unexpected {argument!r}: options are written --key=value")
            continue
        if key != "config" and (problem := key_problem(key, ["config", *(flag.strip("-") for flag in flags)])):
            problems.append(f"command line: {problem}")
            continue
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                problems.append(f"command line: --{key} needs a value, as in --{key}=value")
                continue
            value = remaining.pop(0)
        if key == "config":
            path = _find(value)
            files.append(f"--config={path}")
            leaves = dict(_leaves(read_yaml(path), str(path), problems))
            found = type_problems(leaves)
            origin |= dict.fromkeys(leaves, str(path))
            model_args = leaves.get("model_args", model_args)
        elif key.startswith("model_args."):
            model_arg[key.removeprefix("model_args.")] = yaml_value(value)
            origin["model_args"] = "command line"
            found = {}
        else:
            value = _unquoted(value)
            options.append(f"--{key}={value}")
            found = option_problem(key, value)
            origin[key] = "command line"
            model_args = yaml_value(value) if key == "model_args" else model_args
        problems += [f"{origin[key]}: {problem}" for key, problem in found.items()]
    raise_all(problems)
    if model_arg:
        options.append(f"--model_args={json.dumps(model_args | model_arg, default=str)}")
    try:
        namespace = parser.parse_args(files + options)
    except ArgumentError as error:
        raise RecipeError(f"the recipe cannot be read: {' '.join(str(error).split())}") from None
    recipe = _recipe(namespace)
    somewhere = files[-1].partition("=")[2] if files else "command line"
    processes = os.environ.get("WORLD_SIZE", "1")  # torchrun's; a malformed one is reported where processes meet
    found = recipe_problems(recipe, int(processes) if processes.isdigit() else 1)
    raise_all([f"{origin.get(key, somewhere)}: {problem}" for key, problem in found.items()])
    return recipe, given


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
    groups = {key.partition(".")[0] for key in recipe_keys() if "." in key}
    for name, value in content.items():
        if name not in groups:
            inner = {str(name): value}
        elif isinstance(value, dict):
            inner = {f"{name}.{key}": part for key, part in value.items()}
        else:
            members = ", ".join(key for key in recipe_keys() if key.startswith(f"{name}."))
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
