"""Rules of a recipe that depend on where it runs: on the number of processes, and on the files there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from dist_ssn.checked import Problem, one_sentence
from dist_ssn.errors import RecipeError
from dist_ssn.train.recipe.prediction_file import alternative_of, read_prediction
from dist_ssn.train.recipe.schema import DENSE, Recipe


def validate(recipe: Recipe, world_size: int) -> None:
    """Checks that a recipe can run here, on `world_size` processes; all else was checked when it was made.

    Raises:
        RecipeError: names every wrong key, its value, and what would be right.
    """
    if problems := [f"recipe {recipe.name!r}: {found.key} {found.text}" for found in problems_here(recipe, world_size)]:
        raise RecipeError(one_sentence(problems))


def problems_here(recipe: Recipe, world_size: int) -> Iterator[Problem]:
    """Reasons why a recipe cannot run here, on `world_size` processes."""
    parts = world_size * recipe.accumulation
    if recipe.batch_size % parts:
        text = (
            f"must be divisible by processes × accumulation = {world_size} × {recipe.accumulation} = {parts}, "
            f"got {recipe.batch_size}; the next one is {parts * math.ceil(recipe.batch_size / parts)}"
        )
        yield Problem("batch_size", text, ("accumulation",))
    if Path(recipe.output).exists() and not Path(recipe.output).is_dir():
        yield Problem("output", f"must be a folder, but {recipe.output!r} is a file")
    for key, path, noun in (
        ("model_weights", recipe.model_weights, "a safetensors file"),
        ("share.plan", recipe.share.plan, "a plan's JSON file"),
        ("engine.config", recipe.engine.config, "DeepSpeed's JSON file"),
    ):
        if path is not None and not Path(path).is_file():
            yield Problem(key, f"must be {noun}, but {path!r} does not exist")
    teacher = recipe.distill.teacher
    if teacher not in (None, DENSE) and not (Path(teacher) / "recipe.json").is_file():
        files = "where its recipe.json and checkpoints are"
        yield Problem("distill.teacher", f"must be {DENSE} or the folder of a run, {files}, but is {teacher!r}")
    if recipe.predicted is not None:
        yield from _prediction_problems(recipe, recipe.predicted)


def _prediction_problems(recipe: Recipe, path: str) -> Iterator[Problem]:
    alternative = alternative_of(recipe.share.budget, recipe.share.mapping, recipe.engine.overlap)
    try:
        read_prediction(Path(path), alternative)
    except (OSError, ValueError) as error:
        text = f"must be what dist-ssn plan --cluster … --json printed, but {path}: {error}"
        yield Problem("predicted", text, ("share.budget", "share.mapping", "engine.overlap"))
