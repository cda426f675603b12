"""`dist-ssn search`, with a table of trials while it runs."""

from __future__ import annotations

import argparse

from dist_ssn.cli.declare import CLUSTERS, FILES, Command, Group, Option, seconds, whole_number
from dist_ssn.cli.recipe_options import RECIPE, read_recipe
from dist_ssn.errors import RecipeError

METHODS = ("auto", "weights-free", "pretrain", "gradients", "network", "random", "manual")
OPTIONS = ("groups", "split", "short_steps", "templates", "cluster", "max_steps", "max_seconds", "trials")
"""Options that `search_recipe` takes by the same names."""


def run(given: argparse.Namespace, rest: list[str]) -> None:
    """Searches a mapping and writes its plan; every process of a job runs this."""
    recipe = read_recipe(SEARCH, given, rest)
    if recipe is None:
        return
    if given.output is None:
        raise RecipeError("command line: --output needs the plan's file, as in --output=plan.json")
    options = {name: value for name in OPTIONS if (value := getattr(given, name)) is not None}
    from rich.console import Console

    from dist_ssn.mapping_search.run import run as search
    from dist_ssn.mapping_search.table import Progress
    from dist_ssn.report.picture import check_picture, draw_plan, plan_picture

    if given.picture is not None:
        check_picture(given.picture)  # before hours of searching
    console = Console()
    with Progress(console, shown=not given.no_progress) as progress:
        plan = search(recipe, given.method or "auto", given.output, options, progress.report)
    if progress.note is None:  # another rank speaks
        return
    console.print(plan_picture(plan))
    written = f"written to {given.output}: train with --share.plan={given.output}"
    console.print(f"{progress.note}\n{plan}\n{written}", markup=False)
    if given.picture is not None:
        console.print(f"drawn to {draw_plan(plan, given.picture)}", markup=False)


SEARCH = Command(
    "search",
    "before a run",
    "Find which weights should share a bank, and write the plan, which share.plan of a recipe reads.",
    (
        "dist-ssn search --config quickstart --method=weights-free --output=plan.json",
        "dist-ssn search --config quickstart --max-seconds=600 --output=plan.json",
    ),
    run,
    (
        RECIPE,
        Group(
            "output",
            (
                Option(
                    "--output",
                    "File to write the plan to.",
                    "FILE.json",
                    example="plan.json",
                    completes=FILES,
                    required=True,
                ),
                Option(
                    "--picture",
                    "Draw the mapping in this file too.",
                    "FILE.png",
                    default="no picture",
                    example="plan.png",
                    completes=FILES,
                ),
                Option("--no-progress", "Show no table of trials."),
            ),
        ),
        Group(
            "method",
            (
                Option(
                    "--method",
                    "How to find the mapping. auto tries several on short runs.",
                    "NAME",
                    default="auto",
                    example="weights-free",
                    choices=METHODS,
                ),
                Option(
                    "--groups",
                    "Number of groups (weights-free, pretrain, gradients, network, random).",
                    "N",
                    default="chosen by silhouette; 4 for random, the cheapest for network",
                    example="6",
                    read=whole_number,
                ),
                Option(
                    "--split",
                    "Split the budget between groups in proportion to their size, or to their weights' sensitivity too.",
                    "HOW",
                    default="size",
                    example="sensitivity",
                    choices=("size", "sensitivity"),
                ),
                Option(
                    "--short-steps",
                    "Optimizer steps of the short run (pretrain, gradients, auto).",
                    "N",
                    default="100 for pretrain, 24 for gradients",
                    example="50",
                    read=whole_number,
                ),
                Option(
                    "--templates",
                    "Coefficients that describe a layer (pretrain, gradients, auto).",
                    "K",
                    default="8",
                    example="4",
                    read=whole_number,
                ),
                Option(
                    "--cluster",
                    "Cluster whose network the mapping is made for, a file or a name of clusters/ (network).",
                    "FILE",
                    default="none; network needs one",
                    example="ethernet-1g",
                    completes=CLUSTERS,
                ),
            ),
        ),
        Group(
            "budget of an auto search",
            (
                Option(
                    "--max-steps",
                    "Optimizer steps of all trials together (auto).",
                    "N",
                    default="the recipe's steps",
                    example="2000",
                    read=whole_number,
                ),
                Option(
                    "--max-seconds",
                    "Seconds of all trials together, instead of --max-steps (auto).",
                    "S",
                    default="no limit of time",
                    example="600",
                    read=seconds,
                ),
                Option(
                    "--trials",
                    "JSON-lines file of trials, from which a search that was stopped continues (auto).",
                    "FILE.jsonl",
                    default="beside the output",
                    example="plan.trials.jsonl",
                    completes=FILES,
                ),
            ),
        ),
    ),
    takes_recipe=True,
)
