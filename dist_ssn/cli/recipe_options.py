"""Recipe keys as options of `train`, `plan` and `search`."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import TYPE_CHECKING, Any

from dist_ssn.cli.declare import RECIPES, Command, Group, Option

if TYPE_CHECKING:
    from dist_ssn.train.recipe.keys import Key
    from dist_ssn.train.recipe.schema import Recipe

RECIPE = Group(
    "recipe",
    (
        Option(
            "--config",
            "YAML file of a recipe, or the name of a built-in one. Recipe keys on the command line win over it.",
            "FILE",
            default="every key's own default",
            example="quickstart",
            completes=RECIPES,
            of_recipe=True,
        ),
        Option("--print_config", "Print the whole recipe as YAML, and stop."),
    ),
)

# Values that say more than a number derived from the default does; other keys need no line here.
_EXAMPLES = {
    "name": "my-run",
    "output": "/scratch/runs",
    "model": "wide_resnet",
    "model_args": "{layers: 2, width: 64}",
    "data.name": "cifar10",
    "data.path": "corpus/*.txt",
    "data.limit": "10000",
    "share.budget": "10%",
    "share.mapping": "depth:2",
    "share.morph": "offset",
    "share.include": "[Linear]",
    "share.exclude": "[tokens.weight]",
    "share.plan": "plan.json",
    "share.control": "lowrank",
    "optimizer.name": "sgd",
    "optimizer.betas": "[0.9, 0.999]",
    "schedule.name": "constant",
    "schedule.warmup": "100",
    "schedule.milestones": "[500, 800]",
    "distill.teacher": "dense",
    "distill.hidden": "[blocks.*]",
    "prune.final": "0.5",
    "prune.what": "weights",
    "prune.begin": "200",
    "prune.end": "800",
    "precision": "bf16",
    "patience": "5",
    "checkpoint.every": "100",
    "checkpoint.every_seconds": "600",
    "engine.name": "fsdp",
    "engine.stage": "2",
    "engine.config": "deepspeed.json",
    "engine.overlap": "segments:4",
    "engine.compress": "fp16",
    "wandb.mode": "offline",
    "wandb.project": "my-project",
    "wandb.entity": "my-team",
    "wandb.tags": "[baseline]",
    "predicted": "costs.json",
    "threads": "2",
}
_METAVARS = {
    "a whole number": "N",
    "a number": "X",
    "true or false": "true|false",
    "text": "TEXT",
    "a list": "LIST",
    "a dict": "DICT",
}


def recipe_groups() -> tuple[Group, ...]:
    """Every recipe key as an option, by section."""
    from dist_ssn.train.recipe.keys import recipe_keys

    sections: dict[str, list[Option]] = {"": []}
    for key in recipe_keys():
        sections.setdefault(key.section, []).append(_option(key))
        if key.name == "model_args":
            text = "One argument of the model's function, as any YAML value. Example: --model_args.width=64"
            sections[key.section].append(Option("--model_args.NAME", text, "VALUE", of_recipe=True))
    return tuple(Group(f"recipe keys, {name or 'run'}", tuple(options)) for name, options in sections.items())


def read_recipe(command: Command, given: argparse.Namespace, rest: list[str]) -> Recipe | None:
    """The recipe of a command line; None when --print_config asked for its text, which is printed then.

    Raises:
        RecipeError: one sentence that names every mistake with its file, key and value.
    """
    from dist_ssn.train.recipe.read import parse_recipe, recipe_to_yaml

    own = [option.name for option in command.options() if not option.of_recipe]
    recipe = parse_recipe(rest, own)
    if not given.print_config:
        return recipe
    print(recipe_to_yaml(recipe), end="")
    return None


def _option(key: Key) -> Option:
    metavar = next((short for start, short in _METAVARS.items() if key.type.startswith(start)), "VALUE")
    is_flag = key.type == "true or false"
    return Option(
        f"--{key.name}",
        f"{key.help.rstrip('.')}. Type: {key.type.partition(' (')[0]}.",
        metavar,
        default=_text(key.default) or "empty",
        example=shlex.quote(_EXAMPLES.get(key.name) or _other(key.default)),
        choices=("true", "false") if is_flag else (),
        of_recipe=True,
    )


def _text(value: Any) -> str:
    """A default as one writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _other(default: Any) -> str:
    """A value that differs from the default where the type lets one derive it."""
    if isinstance(default, bool):
        return _text(not default)
    if isinstance(default, int):
        return _text(2 * default or 1)
    if isinstance(default, float):
        return _text(default / 2 or 0.5)
    return _text(default) if default else "VALUE"
