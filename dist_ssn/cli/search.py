"""`dist-ssn search`: a recipe's keys, and the options of a search beside them; a table of trials while it runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from dist_ssn.errors import RecipeError

WithoutOption = Callable[[Sequence[str], str], tuple[list[str], str | None]]
_TEXTS = ("trials", "cluster", "split")


def search(arguments: Sequence[str], description: str, without_option: WithoutOption) -> None:
    """Runs `dist-ssn search`.

    Args:
        without_option: takes an option that is no key of a recipe out of the arguments.
    """
    from dist_ssn.mapping_search.setting import Options
    from dist_ssn.train.recipe.read import parse_recipe

    taken: dict[str, str | None] = {}
    rest = list(arguments)
    for name in ("method", "output", "picture", *(field.name for field in dataclasses.fields(Options))):
        rest, taken[name] = without_option(rest, f"--{name.replace('_', '-')}")
    recipe, given = parse_recipe(rest, "dist-ssn search", description, {"--no-progress": "show no table of trials"})
    output, method, picture = taken.pop("output"), taken.pop("method") or "auto", taken.pop("picture")
    if output is None:
        raise RecipeError("command line: --output needs the plan's file, as in --output=plan.json")
    options = {name: _value(name, text) for name, text in taken.items() if text is not None}
    from rich.console import Console

    from dist_ssn.mapping_search.run import run
    from dist_ssn.mapping_search.table import Progress
    from dist_ssn.report.picture import check_picture, draw_plan, plan_picture

    if picture is not None:
        check_picture(picture)  # before hours of searching
    console = Console()
    with Progress(console, shown="--no-progress" not in given) as progress:
        plan = run(recipe, method, output, options, progress.report)
    if progress.note is None:  # another rank speaks
        return
    console.print(plan_picture(plan))
    console.print(f"{progress.note}\n{plan}\nwritten to {output}: train with --share.plan={output}", markup=False)
    if picture is not None:
        console.print(f"drawn to {draw_plan(plan, picture)}", markup=False)


def _value(name: str, text: str) -> Any:
    if name in _TEXTS:
        return text
    if re.fullmatch(r"\d{1,12}", text):
        return int(text)
    if name == "max_seconds" and re.fullmatch(r"\d{1,12}\.\d{1,9}", text):
        return float(text)
    raise RecipeError(f"command line: --{name.replace('_', '-')} must be a number, got {text!r:.40}")
