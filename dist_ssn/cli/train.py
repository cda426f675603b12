"""`dist-ssn train`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_ssn.cli.declare import Command, Group, Option
from dist_ssn.cli.recipe_options import RECIPE, read_recipe

if TYPE_CHECKING:
    from dist_ssn.tracking.wandb_settings import Picture


def run(given: argparse.Namespace, rest: list[str]) -> None:
    """Trains by the recipe; every process of a job runs this."""
    recipe = read_recipe(TRAIN, given, rest)
    if recipe is None:
        return
    from dist_ssn.train import loop

    loop.train(recipe, progress=not given.no_progress, draw=_draw)


def _draw(rows: Sequence[dict[str, Any]], folder: Path) -> Sequence[Picture]:
    from dist_ssn.report import draw  # with it comes matplotlib, which only W&B's pictures need

    return draw(rows, folder)


TRAIN = Command(
    "train",
    "train and compare",
    "Train a model by a recipe, alone or under a launcher; write its metrics, checkpoints, and ledger of bytes sent.",
    (
        "dist-ssn train --config quickstart --share.budget=5% --steps=200",
        "torchrun --nproc-per-node=4 -m dist_ssn.cli train --config quickstart",
    ),
    run,
    (RECIPE, Group("display", (Option("--no-progress", "Show no progress bar."),))),
    takes_recipe=True,
)
