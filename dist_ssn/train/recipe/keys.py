"""The keys of a recipe, for `--help`, the docs and editors; the recipes that come with this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_ssn.checked import Key, keys_of, schema_of
from dist_ssn.train.recipe.schema import Recipe

__all__ = ["Key", "bundled_recipes", "recipe_keys", "recipe_schema"]


def recipe_keys() -> tuple[Key, ...]:
    """Every key of a recipe, in the order of its fields."""
    return keys_of(Recipe)


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe's file, with which an editor completes and checks it."""
    return schema_of(Recipe)


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with this package: name without ending → file."""
    folder = Path(__file__).parents[2] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
