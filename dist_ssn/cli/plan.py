"""`dist-ssn plan`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dist_ssn.cli.declare import CLUSTERS, FILES, Command, Group, Option
from dist_ssn.cli.recipe_options import RECIPE, read_recipe
from dist_ssn.errors import RecipeError

if TYPE_CHECKING:
    from dist_ssn.plan import Plan
    from dist_ssn.train.recipe.schema import Recipe

MOST_WORKERS = 2**20


def workers(text: str) -> list[int]:
    """Numbers of processes, as in 2,8,64.

    Raises:
        ValueError: the text is something else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and 0 < int(word) <= MOST_WORKERS for word in words):
        raise ValueError(f"numbers from 1 to {MOST_WORKERS}, as in 2,8,64")
    return [int(word) for word in words]


def run(given: argparse.Namespace, rest: list[str]) -> None:
    """Shows the plan of a recipe, or its costs on a cluster."""
    recipe = read_recipe(PLAN, given, rest)
    if recipe is None:
        return
    if recipe.share.control is not None:
        raise RecipeError(
            f"share.control is {recipe.share.control}, which has no banks and so no plan: leave it null, or train it"
        )
    if given.cluster is not None:
        from dist_ssn.cli.plan_costs import show

        return show(recipe, given)
    if lonely := [name for name in ("workers", "compute", "calibrate") if getattr(given, name) is not None]:
        raise RecipeError(f"command line: --{lonely[0]} goes with --cluster=FILE")
    _say_that_a_limit_is_open(recipe)
    made, left_out = _plan_of(recipe)
    if given.picture is not None:
        from dist_ssn.report.picture import draw_plan

        draw_plan(made, given.picture)
    if given.json:
        print(made.to_json())
    else:
        _print(made, left_out, with_picture=given.picture is not None)


def _say_that_a_limit_is_open(recipe: Recipe) -> None:
    """Says that this plan is without what `sync.limit` chooses.

    Raises:
        RecipeError: the limit chooses the budget too, so there is no plan.
    """
    if recipe.sync.limit is None:
        return
    said = f"sync.limit {recipe.sync.limit} chooses for a number of processes, which --cluster=FILE gives"
    if recipe.share.budget is None and recipe.share.plan is None:
        raise RecipeError(f"{said}: add it, or a share.budget, such as --share.budget=10%")
    print(f"dist-ssn: {said}: this is the plan whatever it chooses", file=sys.stderr)


def _print(plan: Plan, left_out: Sequence[tuple[str, str]], with_picture: bool) -> None:
    from rich.console import Console

    from dist_ssn.sharing.summary import left_out_text

    console = Console()
    console.print(plan.table())
    if with_picture:
        from dist_ssn.report.picture import plan_picture

        console.print(plan_picture(plan))
    if left_out:
        console.print(f"left as they are: {left_out_text(left_out)}", markup=False, highlight=False)


def _plan_of(recipe: Recipe) -> tuple[Plan, Sequence[tuple[str, str]]]:
    """The plan, and every weight that is not shared with its reason."""
    import torch

    from dist_ssn.model.specs import find_specs
    from dist_ssn.plan import make_plan
    from dist_ssn.sharing.train_beside import specs_of_kept
    from dist_ssn.train.build import plan_of_file
    from dist_ssn.train.data import data_hints
    from dist_ssn.train.models import build_model

    share = recipe.share
    followed = None if share.plan is None else plan_of_file(share.plan)
    if followed is None and share.budget is None:
        raise RecipeError("share.budget is null, which leaves the model dense: give one, such as --share.budget=10%")
    hints = data_hints(recipe.data, context=recipe.model_args.get("context"))
    torch.manual_seed(recipe.seed)  # as in training, for a model function that draws random numbers
    model = build_model(recipe.model, recipe.model_args, hints)
    if followed is not None:
        names = [slot.name for _, slot in followed.slots()]
        of_this_model = set(names) <= {name for name, _ in model.named_parameters(remove_duplicate=False)}
        return followed, find_specs(model, include=names).left_out if of_this_model else ()
    assert share.budget is not None
    if share.keep:
        specs = specs_of_kept(model, share.include, share.exclude, share.train)
    else:
        specs = find_specs(model, share.include, share.exclude)
    made = make_plan(specs, share.budget, mapping=share.mapping, morph=share.morph, seed=share.seed, keep=share.keep)
    return made, specs.left_out


PLAN = Command(
    "plan",
    "before a run",
    "Show how a recipe's model would share its weights, without reading its data or training it.",
    (
        "dist-ssn plan --config quickstart --share.budget=5%",
        "dist-ssn plan --config quickstart --cluster=ethernet-1g --workers=2,8,64",
    ),
    run,
    (
        RECIPE,
        Group(
            "output",
            (
                Option("--json", "Print JSON: the plan, which share.plan reads; with --cluster, the costs."),
                Option(
                    "--picture",
                    "Draw the mapping, here and in this file.",
                    "FILE.png",
                    default="no picture",
                    example="plan.png",
                    completes=FILES,
                ),
            ),
        ),
        Group(
            "costs on a cluster",
            (
                Option(
                    "--cluster",
                    "Instead of the plan, show what a step would cost on this cluster, a file or a name of clusters/: dense "
                    "and shared, with each kind of overlap, each engine, and the best rounds of local updates; and the "
                    "bandwidth in Mbit/s below which sharing pays.",
                    "FILE",
                    default="no costs",
                    example="ethernet-1g",
                    completes=CLUSTERS,
                ),
                Option(
                    "--workers",
                    "Numbers of processes to show the costs for, separated by commas; with --cluster.",
                    "N,...",
                    default="the cluster's processes only",
                    example="2,8,64",
                    read=workers,
                ),
                Option(
                    "--compute",
                    "Read the compute time of a step from this file, which --calibrate wrote; with --cluster.",
                    "FILE.json",
                    default="measure it here",
                    example="compute.json",
                    completes=FILES,
                ),
                Option(
                    "--calibrate",
                    "Write the compute time of a step, measured here, to this file; with --cluster.",
                    "FILE.json",
                    default="not written",
                    example="compute.json",
                    completes=FILES,
                ),
            ),
        ),
    ),
    takes_recipe=True,
)
