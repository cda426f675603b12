"""Comparison of a run with the prediction that `dist-ssn plan --cluster … --json` made for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_ssn.train.recipe.prediction_file import FIGURES, alternative_of, read_prediction
from dist_ssn.train.recipe.schema import Recipe


def prediction_of(recipe: Recipe) -> dict[str, float] | None:
    """The prediction for a recipe; None if it names no file.

    Raises:
        ValueError: as `read_prediction`.
        OSError: as `read_prediction`.
    """
    if recipe.predicted is None:
        return None
    name = alternative_of(recipe.share.budget, recipe.share.mapping, recipe.engine.overlap)
    return read_prediction(Path(recipe.predicted), name)


def comparison(predicted: Mapping[str, float], measured: Mapping[str, float]) -> list[dict[str, Any]]:
    """Each figure that was measured, beside its prediction; "off" is the relative error of the prediction."""
    return [
        {
            "figure": key,
            "predicted": predicted[key],
            "measured": measured[key],
            "off": predicted[key] / measured[key] - 1,
        }
        for key in FIGURES
        if measured.get(key)
    ]
